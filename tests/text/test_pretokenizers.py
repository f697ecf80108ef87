"""Pre-tokenizers against the tokenizers of the models, as transformers builds them or their files describe them."""

# ruff: noqa: RUF001 - the texts have characters that look like others

from __future__ import annotations

import functools
import json
import unicodedata
from pathlib import Path
from typing import Any

import attrs
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import CohereTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from mer.errors import UnsupportedModel
from mer.text.pretokenizers import PRE_TOKENIZERS
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

TRICKY = [
    "0 1 12 123 1234 12345 123456 1234567 3.14159 1,000,000 ٣٤٥ ⅧⅨ ½¼ x2y 2x 0xFF v1.2.3",
    "I'll we'LL they've THEY'VE it's IT'S don't I'm i'M he'd O'Neil rock'n'roll '' 's'S 'reel 'ſ",
    "\r\n\r\n  \n\t\n a\r\nb\r\r\n\n\n c \n d\n\n\n\n\ne",
    "  leading   inner    trailing   \t\t  \t x \u00a0\u00a0y \u3000\u3000z\u2003\u2028\u2029w \x85v\x0b\x0cu",
    "naïve CAFÉ e\u0301a\u0308 ÅngstrÖm Straße ǅungla ʰoʰ İstanbul \u0301alone a\u0301\u0327b हिन्दी भाषा",
    "ไทยภาษา العَرَبِيَّة käse",
    "camelCase HTTPServer McDonald iPhone XMLHttpRequest ÉCOLEnormale getURL2Path ǅAb aʰB ªº",
    "世界你好, 世界hello你好 한국어 조선말 ひらがなカタカナーﾊﾝ 々〆 中文English混合 漢字12漢 「引用」。、！？ ㄅㄆ",
    "😀😀👨‍👩‍👧‍👦 🏳️‍🌈 a😀b 1️⃣ ♥️ ™ © ° ✓",
    'a+b=c; f(x)->y // c:\\d/e/f/ <b>x</b> $1.00 #tag @me __init__ ... !!! ?!/\n/ ==>> ~~~ `q` ^^ |z| {}[] ""',
    "x" * 70 + " " * 70 + "=" * 70 + "\n" * 40 + "7" * 70 + "世" * 40 + "ab " * 30,
    "\x00\x01\x07\x1b[0m\x7f \u200b\u200d\ufeff \ufffd \U000e0001 \u0600",
    "to the word and the word, and of the words. In the end the word was the end",
]
PIECES = sorted(
    {piece for line in TRICKY for piece in line.split(" ")} | {" ", "  ", "\n", "\r\n", "\t", "a", "B", "'"}
)
ASSIGNED = st.characters(codec="utf-8").filter(lambda c: unicodedata.category(c) != "Cn")
TEXTS = st.one_of(
    st.text(ASSIGNED, max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text("aB1 '\n\rſé\u0301世ʰ/.😀$", max_size=20),
)
WHOLE = ("qzqzq", "Ġqzqzq", "QZ")  # tokens that no merges lead to

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = "|".join(
    [
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])*(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])+"
        + CONTRACTIONS
        + "?",
        r"[^\r\n\p{L}\p{N}]?(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])+(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])*"
        + CONTRACTIONS
        + "?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EXAONE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
DEEPSEEK3 = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]
DEEPSEEK_CODER = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"]


@attrs.frozen
class Family:
    """A tokenizer as its model's files describe it.

    Attributes:
        names: in `tokenizer.ggml.pre`.
        made_by: the class of transformers that makes it of vocabulary and merges, or, where it has no normalizer, its
            `pre_tokenizer`.
        ignore_merges: of its model.
        bos: whether its files without `add_bos_token` want BOS.
    """

    names: str
    made_by: Any
    ignore_merges: bool = False
    bos: bool = False


def splits(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    parts: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(tokenizers.Regex(p), behavior="isolated") for p in patterns
    ]
    parts += [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


CL100K = TikTokenConverter().pattern
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
STARCODER = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
FAMILIES = [
    Family("gpt-2 phi-2 jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling", GPT2Tokenizer),
    Family("olmo mpt", GPTNeoXTokenizer),
    Family("smollm starcoder refact codeshell exaone minerva-7b mellum2", STARCODER),
    Family("command-r", CohereTokenizer),
    Family(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        splits(CL100K),
        ignore_merges=True,
        bos=True,
    ),
    Family("dbrx smaug-bpe", splits(CL100K)),
    Family("glm4 glm5 chatglm-bpe", splits(CL100K), ignore_merges=True),
    Family("qwen2 hunyuan solar-open megrez", Qwen2Tokenizer),
    Family("qwen35", Qwen3_5Tokenizer),
    Family("deepseek-r1-qwen kormo stablelm2 grok-2", splits(QWEN)),
    Family("gpt-4o llama4 minimax-m2 kanana2", splits(O200K)),
    Family("kimi-k2", splits(KIMI)),
    Family("tekken", splits(TEKKEN), ignore_merges=True, bos=True),
    Family("deepseek-v3 joyai-llm hunyuan-dense hy_v4", splits(*DEEPSEEK3)),
    Family("deepseek-coder", splits(*DEEPSEEK_CODER, digits=True)),
    Family("bailingmoe bailingmoe2 llada-moe", splits(BAILING)),
    Family("laguna", splits(r"[^\n]+|[\n]+", QWEN)),
    Family("exaone-moe", splits(EXAONE)),
]
NAMES = {name: family for family in FAMILIES for name in family.names.split()}


@functools.cache
def trained() -> dict[str, Any]:
    """Return a vocabulary whose merges cross whatever a pre-tokenizer may split, as the JSON of `tokenizers`.

    So every wrong split shows in the ids.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=list(vocabularies.CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        max_token_length=6,
        show_progress=False,
    )
    made.train_from_iterator([*TRICKY, *(text.replace(" ", "") for text in TRICKY)], trainer)
    described: dict[str, Any] = json.loads(made.to_str())
    vocabulary = described["model"]["vocab"]
    for token in WHOLE:
        vocabulary[token] = len(vocabulary)
    return described


@functools.cache
def original(family: Family) -> tokenizers.Tokenizer:
    model = trained()["model"]
    if isinstance(family.made_by, type):
        merges = [tuple(pair) for pair in model["merges"]]
        backend: tokenizers.Tokenizer = family.made_by(vocab=dict(model["vocab"]), merges=merges).backend_tokenizer
        return backend
    made = tokenizers.Tokenizer.from_str(
        json.dumps(trained() | {"model": model | {"ignore_merges": family.ignore_merges}})
    )
    made.pre_tokenizer = family.made_by
    return made


def tokenizer_of(folder: Path, name: str, **more: Any) -> Tokenizer:
    vocabulary = trained()["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in vocabularies.CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in trained()["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return Tokenizer.from_gguf(vocabularies.parsed(folder, metadata))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("pre")
    return {family.names: tokenizer_of(folder, family.names.split()[0]) for family in FAMILIES}


@pytest.mark.parametrize("name", NAMES)
def test_tricky_texts_become_the_ids_of_the_model(tmp_path: Path, name: str) -> None:
    family = NAMES[name]
    tokenizer = tokenizer_of(tmp_path, name)
    assert tokenizer.add_bos is family.bos
    for text in [*TRICKY, "\n".join(TRICKY), "qzqzq qzqzq QZ qzq"]:
        expected = original(family).encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_bos=False) == expected, text
        assert tokenizer.encode(text) == [0] * family.bos + expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names.split()[0])
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_any_text_becomes_the_ids_of_the_model(made: dict[str, Tokenizer], family: Family, text: str) -> None:
    expected = original(family).encode(text, add_special_tokens=False).ids
    assert made[family.names].encode(text, add_bos=False) == expected


@pytest.mark.parametrize("name", ["llama-bpe", "glm4", "gpt-4o"])
@pytest.mark.parametrize("says", [True, False])
def test_what_the_file_says_of_bos_counts_more_than_the_family(tmp_path: Path, name: str, says: bool) -> None:
    tokenizer = tokenizer_of(tmp_path, name, add_bos_token=says)
    assert tokenizer.add_bos is says
    assert (tokenizer.encode("a")[0] == 0) is says


def test_families_differ_on_the_tricky_texts() -> None:
    """Otherwise a name in the wrong family would go unseen."""
    alike: dict[str, list[str]] = {}
    for family in FAMILIES:
        encoded = [original(family).encode(text, add_special_tokens=False).ids for text in [*TRICKY, "qzqzq QZ"]]
        alike.setdefault(json.dumps([encoded, family.bos]), []).append(family.names.split()[0])
    assert [names for names in alike.values() if len(names) > 1] == [["deepseek-r1-qwen", "bailingmoe"]]


def test_all_names_are_of_a_family() -> None:
    assert set(PRE_TOKENIZERS) - set(NAMES) == {"default", "falcon", "seed-coder", "deepseek-llm"}  # as cut in test_bpe


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre is 'qwen9'.*deepseek-v3.*kimi-k2.*qwen35"):
        tokenizer_of(tmp_path, "qwen9")
