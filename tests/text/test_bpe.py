"""Byte-level BPE vocabularies against the tokenizers they were trained as."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from mer.errors import RequestError
from mer.text.bpe import byte_characters, cuts
from mer.text.pretokenizers import PRE_TOKENIZERS, pre_tokenizer
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PIECES = [
    "the",
    " a",
    "'s",
    "'S",
    "12345",
    " 7",
    "é",
    "e\u0301",
    "世界",
    "😀",
    "\n",
    "\r\n",
    "\t",
    "  ",
    "!?",
    "Ⅷ",
    "McDonald",
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*PIECES, *vocabularies.USER_DEFINED])).map("".join))


def tokenizer_of(tmp: Path, pre: str = "gpt-2") -> Tokenizer:
    return Tokenizer.from_gguf(vocabularies.parsed(tmp, metadata_of(pre)))


def metadata_of(pre: str = "gpt-2") -> dict[str, object]:
    return vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(GPT2), pre)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("bpe"))


@settings(max_examples=300)
@given(TEXTS)
def test_text_becomes_the_ids_of_the_tokenizer_it_was_made_from(tokenizer: Tokenizer, text: str) -> None:
    original = vocabularies.byte_level_bpe(GPT2)
    original.encode_special_tokens = True
    ids = tokenizer.encode(text)
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*PIECES, *vocabularies.CONTROL, "<|im_"])).map("".join))
def test_special_parsing_is_that_of_the_tokenizer_it_was_made_from(tokenizer: Tokenizer, text: str) -> None:
    original = vocabularies.byte_level_bpe(GPT2)
    original.encode_special_tokens = False
    assert tokenizer.encode(text, parse_special=True) == original.encode(text, add_special_tokens=False).ids
    assert not any(map(tokenizer.is_control, tokenizer.encode(text)))


def test_the_byte_characters_are_those_of_gpt2() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = byte_characters()
    assert sorted(characters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in (*map(chr, range(128)), *"éß世😀\u0080\u00ad"):
        assert "".join(characters[byte] for byte in text.encode()) == byte_level.pre_tokenize_str(text)[0][0]


# One sentence that no two of the patterns cut alike, and the words that each model's published pattern makes of it.
SENTENCE = "I'LL pay $1234,\tOK//\n  McDonald's 世界a"
WORDS = {
    "gpt-2": ["I", "'", "LL", " pay", " $", "1234", ",", "\t", "OK", "//", "\n ", " McDonald", "'s", " 世界a"],
    "smollm": [
        "I",
        "'",
        "LL",
        " pay",
        " $",
        "1",
        "2",
        "3",
        "4",
        ",",
        "\t",
        "OK",
        "//",
        "\n ",
        " McDonald",
        "'s",
        " 世界a",
    ],
    "llama-bpe": ["I", "'LL", " pay", " $", "123", "4", ",", "\tOK", "//\n", " ", " McDonald", "'s", " 世界a"],
    "qwen2": ["I", "'LL", " pay", " $", "1", "2", "3", "4", ",", "\tOK", "//\n", " ", " McDonald", "'s", " 世界a"],
    "deepseek-v3": [
        "I",
        "'LL",
        " pay",
        " $",
        "123",
        "4",
        ",",
        "\tOK",
        "//\n",
        " ",
        " McDonald",
        "'s",
        " ",
        "世界",
        "a",
    ],
    "gpt-4o": ["I'LL", " pay", " $", "123", "4", ",", "\tOK", "//\n", " ", " Mc", "Donald's", " 世界a"],
    "tekken": ["I", "'LL", " pay", " $", "1", "2", "3", "4", ",", "\tOK", "//\n", " ", " Mc", "Donald", "'s", " 世界a"],
}
WORDS["default"] = [
    *("I", "'", "LL", " pay", " ", "$", "123", "4", ",", "\t", "OK", "//", "\n ", " McDonald", "'", "s", " 世界a"),
]
WORDS["falcon"] = WORDS["default"]
WORDS["seed-coder"] = [
    *("I", "'LL", " pay", " $", "1", "2", "3", "4", ",", "\tOK", "//", "\n", " ", " McDonald", "'s", " 世界a"),
]
WORDS["deepseek-llm"] = [
    *("I", "'", "LL", " pay", " $", "1234", ",", "\tOK", "//", "\n", " ", " McDonald", "'", "s", " ", "世界", "a"),
]
WORDS["deepseek-coder"] = [
    *("I", "'", "LL", " pay", " $", "1", "2", "3", "4", ",", "\tOK", "//", "\n", " ", " McDonald", "'", "s", " "),
    *("世界", "a"),
]
WORDS["kimi-k2"] = [
    *("I'LL", " pay", " $", "123", "4", ",", "\tOK", "//\n", " ", " Mc", "Donald's", " ", "世界", "a"),
]
WORDS["laguna"] = [
    *("I", "'LL", " pay", " $", "1", "2", "3", "4", ",", "\tOK", "//", "\n", " ", " McDonald", "'s", " 世界a"),
]
LIKE = {
    "gpt-2": "phi-2 olmo mpt jais trillion gigachat a.x-4.0 mellum exaone4 granite-docling",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 glm5 chatglm-bpe",
    "qwen2": "qwen35 hunyuan solar-open megrez deepseek-r1-qwen kormo stablelm2 grok-2 "
    "bailingmoe bailingmoe2 llada-moe exaone-moe",
    "gpt-4o": "llama4 minimax-m2 kanana2",
    "deepseek-v3": "joyai-llm hunyuan-dense hy_v4",
}
SAME = {other: name for name, others in LIKE.items() for other in others.split()}


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_words_are_cut_as_the_models_do(name: str) -> None:
    splitter = pre_tokenizer(name).splitter()
    values = {character: byte for byte, character in enumerate(byte_characters())}
    words = [bytes(values[c] for c in word).decode() for word, _ in splitter.pre_tokenize_str(SENTENCE)]
    assert words == WORDS[SAME.get(name, name)]


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, "qwen2")
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_llama3_takes_known_words_whole_and_begins_with_bos(tmp_path: Path) -> None:
    metadata = metadata_of("llama-bpe")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    whole = metadata | {"tokenizer.ggml.tokens": [*tokens, "qzqz"], "tokenizer.ggml.token_type": [*types, 1]}
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, whole))
    assert tokenizer.encode("qzqz") == [tokenizer.bos_id, len(tokens)]
    plain = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, whole | {"tokenizer.ggml.pre": "gpt-2"}))
    assert len(plain.encode("qzqz")) > 1


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "smollm"])
def test_what_a_vocabulary_has_no_bytes_for_is_left_out_and_nothing_else(tmp_path: Path, pre: str) -> None:
    """As in SmolLM2's, which lacks control characters and the first bytes of unassigned ones."""
    metadata = metadata_of(pre)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    lost = {byte_characters()[byte] for byte in (0x04, 0x14, 0xF1)}
    tokens = [f"<gone {i}>" if t in lost else t for i, t in enumerate(tokens)]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.ggml.tokens": tokens}))
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    assert tokenizer.decode(tokenizer.encode("a\x04b \U00045678\x14the token\x14")) == "ab the token"
    assert tokenizer.decode(tokenizer.encode("##\0\x14\0x")) == "##\0\0x", "what can be spelled beside it is kept"
    assert tokenizer.encode("\x14", add_bos=False) == []


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_texts_are_cut_into_pieces_only_between_words(name: str) -> None:
    places = cuts(pre_tokenizer(name))
    splitter = pre_tokenizer(name).splitter()
    rng = random.Random(name)
    alphabet = [
        "a",
        "B",
        "é",
        "世",
        "、",
        " ",
        "\n",
        "\t",
        "\r",
        "1",
        "2",
        "!",
        ".",
        "'s",
        "/",
        "$",
        "+",
        "😀",
        "\u0301",
        "\u3000",
    ]
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=12))
        words = splitter.pre_tokenize_str(text)
        ends = {0, len(text), *(end for _, (_, end) in words)}
        for place in (match.start() for match in places.finditer(text)):
            assert place in ends, text
            again = splitter.pre_tokenize_str(text[:place]) + splitter.pre_tokenize_str(text[place:])
            assert [word for word, _ in again] == [word for word, _ in words], text


def test_long_texts_become_the_same_ids_and_endless_words_are_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    original = vocabularies.byte_level_bpe(GPT2)
    original.encode_special_tokens = True
    text = "\n".join(vocabularies.training_lines()) * 3
    assert len(text) > 50_000
    assert tokenizer.encode(text) == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokenizer.encode("世" * 60_000)) == "世" * 60_000
    with pytest.raises(RequestError, match="a word of more than 65536 characters"):
        tokenizer.encode("世" * 90_000)


def test_encoding_tells_how_many_tokens_there_are_and_can_be_ended(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    told: list[int] = []

    def enough(n_ids: int) -> None:
        told.append(n_ids)
        if n_ids > 20_000:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        tokenizer.encode("a word and a word " * 100_000, progress=enough)
    assert 20_000 < told[-1] < 40_000


def test_merges_of_what_is_no_token_do_not_harm(tmp_path: Path) -> None:
    """Merges through a token that is not there lead on to one that is, and what they leave becomes bytes."""
    characters = [*byte_characters(), "abcd"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": characters,
        "tokenizer.ggml.token_type": [1] * 257,
        "tokenizer.ggml.merges": ["a b", "c d", "x 世", "ab cd"],
    }
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata))
    assert tokenizer.encode("abcd") == [256]
    assert tokenizer.encode("abce") == [ord(c) for c in "abce"]


def test_a_user_defined_token_is_never_spelled_in_bytes(tmp_path: Path) -> None:
    """Text becomes it where it stands as it is, and merges make it only where its bytes are that text."""
    tokens = [*byte_characters(), "\u0120a", "ab"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [4, 4],
        "tokenizer.ggml.merges": ["\u0120 a", "a b"],
    }
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata))
    for text in (" a", "\u0120a", "ab", "xab a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ab") == [257]
    assert tokenizer.encode("\u0120a") == [256]
    assert len(tokenizer.encode(" a")) == 2


def test_merges_never_make_a_control_token(tmp_path: Path) -> None:
    metadata = metadata_of()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    word = next(text for text in tokens if text.isascii() and text.isalpha() and len(text) > 2)
    the = tokens.index(word)
    types = [3 if i == the else t for i, t in enumerate(types)]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.ggml.token_type": types}))
    assert the not in tokenizer.encode(f"{word} {word}")
    assert the in tokenizer.encode(f"{word} {word}", parse_special=True)


def test_end_tokens_are_control_tokens_even_where_the_file_calls_them_text(tmp_path: Path) -> None:
    metadata = metadata_of()
    types = metadata["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    types = [4 if i == 2 else t for i, t in enumerate(types)]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.ggml.token_type": types}))
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [2]
    assert 2 not in tokenizer.encode("<|im_end|>")


def test_the_longest_control_token_is_recognized(tmp_path: Path) -> None:
    metadata = metadata_of()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    grown = {"tokenizer.ggml.tokens": [*tokens, "<s", "<s>"], "tokenizer.ggml.token_type": [*types, 3, 3]}
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | grown))
    assert tokenizer.encode("<s><s", parse_special=True) == [len(tokens) + 1, len(tokens)]
