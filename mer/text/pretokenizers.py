"""How the byte-level BPE vocabularies cut text into words, by the name in `tokenizer.ggml.pre`.

The patterns are facts of the published models (the `pre_tokenizer` and `normalizer` of their `tokenizer.json`). A wrong
pattern still encodes any text, only into other tokens than the model was trained on: so an unknown name is an error.
"""

from __future__ import annotations

import attrs
from tokenizers import Regex, normalizers, pre_tokenizers

from mer.errors import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_TEKKEN = _CASED.replace("{0}", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_GPT4O = _CASED.replace("{0}", _SUFFIXES + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    + _TAIL
)


@attrs.frozen
class PreTokenizer:
    """One way to cut text into words.

    Attributes:
        patterns: applied one after the other; each match becomes a word of its own, as does what lies between two.
        nfc: whether text is brought to Unicode normalization form C first.
        ignore_merges: whether a word that is a token is taken whole, even where no merges lead to it.
        add_bos: whether prompts begin with the beginning-of-sequence token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

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
PRE_TOKENIZERS = {
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "llama-bpe": _META,
    "llama3": _META,
    "llama-v3": _META,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True),
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer that `tokenizer.ggml.pre` names.

    Raises:
        TokenizerError: the name is not known; the text lists those that are.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise TokenizerError(f"tokenizer.ggml.pre is {name!r}, which is not known; known are: {known}")
    return found
