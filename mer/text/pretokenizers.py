"""Pre-tokenizers of the byte-level BPE vocabularies, by the name in `tokenizer.ggml.pre`.

The patterns are facts of the published models (the `pre_tokenizer` and `normalizer` of their `tokenizer.json`). A wrong
pattern still encodes any text, only into other tokens than the model was trained on: so an unknown name is an error.
"""

from __future__ import annotations

import attrs
from tokenizers import Regex, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN35 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_GPT4O = _CASED.replace("{0}", _SUFFIXES + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
# Kimi K2: words of the letters of other scripts, and no slash after punctuation; \p{Han} runs are words of their own.
_KIMI = r"\p{Han}+|" + _GPT4O.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace(r"[\r\n/]*", r"[\r\n]*")
_EXAONE_MOE = (
    _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _TAIL
)
# The scripts that have cases, as the tokenizer of DeepSeek LLM lists them.
_CASED_SCRIPTS = (
    r"\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    r"\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    r"\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    r"\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    r"\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    r"\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    r"\uff41-\uff5a\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+"
)
_WIDE_PUNCTUATION = r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_EAST_ASIAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@attrs.frozen
class PreTokenizer:
    """One way to cut text into words.

    Attributes:
        patterns: applied one after the other; each match becomes a word, as does the text between two matches.
        nfc: whether text is brought to Unicode normalization form C first.
        ignore_merges: whether a word that is a token is taken whole, even where no merges lead to it.
        add_bos: whether prompts begin with the beginning-of-sequence token where the file does not say.
        words_hold_spaces: whether letters on both sides of a space may be one word.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False
    words_hold_spaces: bool = False

    def splitter(self) -> pre_tokenizers.PreTokenizer:
        """Return the pre-tokenizer: the patterns in order, then the byte-to-character map of GPT-2."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def normalizer(self) -> normalizers.Normalizer | None:
        """Return the normalizer of text, or None where the model has none."""
        return normalizers.NFC() if self.nfc else None


_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_META = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_CL100K = PreTokenizer((_LLAMA3,))
_QWEN = PreTokenizer((_QWEN2,), nfc=True)
_QWEN_AS_IS = PreTokenizer((_QWEN2,))
_O200K = PreTokenizer((_GPT4O,))
_DEEPSEEK = PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3))
_GLM = PreTokenizer((_LLAMA3,), ignore_merges=True)
DEFAULT = PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "gigachat", "a.x-4.0", "mellum"), _PLAIN),
    **dict.fromkeys(("exaone4", "granite-docling"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("olmo", "mpt"), PreTokenizer((_GPT2,), nfc=True)),
    "command-r": PreTokenizer((r"\p{N}", _GPT2), nfc=True),
    "mellum2": _DIGITS,
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _META),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    **dict.fromkeys(("glm4", "glm5", "chatglm-bpe"), _GLM),
    **dict.fromkeys(("qwen2", "hunyuan", "solar-open", "megrez"), _QWEN),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "stablelm2", "grok-2"), _QWEN_AS_IS),
    # Their `\s*[\r\n]` for `\s*[\r\n]+` cuts alike, because white space is taken up to the last line break.
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _QWEN_AS_IS),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2", "kanana2"), _O200K),
    **dict.fromkeys(("deepseek-v3", "joyai-llm", "hunyuan-dense", "hy_v4"), _DEEPSEEK),
    "deepseek-llm": PreTokenizer((r"[\r\n]", _CASED_SCRIPTS, _WIDE_PUNCTUATION, r"\s+$", _EAST_ASIAN, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "falcon": PreTokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "kimi-k2": PreTokenizer((_KIMI,)),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,), words_hold_spaces=True),
    "seed-coder": PreTokenizer((_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "default": DEFAULT,
}


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """Return the pre-tokenizer that `tokenizer.ggml.pre` names; None, where a file has no such key, is "default".

    Raises:
        KeyError: the name is not known.
    """
    return DEFAULT if name is None else PRE_TOKENIZERS[name]
