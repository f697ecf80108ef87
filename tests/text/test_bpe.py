"""Byte-level BPE vocabularies against the tokenizers they were trained as."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from mer.errors import RequestError
from mer.text.bpe import byte_characters
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
SAME = {"phi-2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "starcoder": "smollm", "refact": "smollm"}


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


def test_a_byte_without_a_token_is_an_error_and_never_dropped(tmp_path: Path) -> None:
    metadata = metadata_of()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    lost = byte_characters()[4]
    tokens = ["<gone>" if t == lost else t for t in tokens]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.ggml.tokens": tokens}))
    assert tokenizer.decode(tokenizer.encode("fine")) == "fine"
    with pytest.raises(RequestError, match="0x04"):
        tokenizer.encode("a\x04b")


def test_merges_never_make_a_control_token(tmp_path: Path) -> None:
    metadata = metadata_of()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    the = tokens.index("the")
    types = [3 if i == the else t for i, t in enumerate(types)]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, metadata | {"tokenizer.ggml.token_type": types}))
    assert the not in tokenizer.encode("the the")
    assert the in tokenizer.encode("the the", parse_special=True)


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
