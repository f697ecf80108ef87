"""Tokenizer metadata that contradicts itself must be refused with a typed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mer.errors import GGUFError, RequestError, TokenizerError
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

GGML = "tokenizer.ggml."


def spm() -> dict[str, Any]:
    return vocabularies.sentencepiece_metadata(vocabularies.sentencepiece_model())


def bpe() -> dict[str, Any]:
    return vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(r"\s?\S+|\s+"), "gpt-2")


def build(folder: Path, metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(vocabularies.parsed(folder, metadata))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        *((spm, key) for key in ("model", "tokens", "scores", "token_type")),
        *((bpe, key) for key in ("merges", "pre")),
    ],
)
def test_missing_metadata_is_named(tmp_path: Path, make: Any, key: str) -> None:
    metadata = make()
    del metadata[GGML + key]
    with pytest.raises(TokenizerError, match=f"{GGML}{key} is missing"):
        build(tmp_path, metadata)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 1),
        ("tokens", "abc"),
        ("tokens", [1, 2]),
        ("scores", [1, 2]),
        ("scores", ["a"]),
        ("token_type", [1.0]),
        ("token_type", 3),
        ("bos_token_id", "1"),
        ("eos_token_id", 1.0),
        ("add_bos_token", 1),
        ("add_space_prefix", "yes"),
    ],
)
def test_values_of_the_wrong_type_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(GGUFError, match=key):
        build(tmp_path, spm() | {GGML + key: value})


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown"])
@pytest.mark.parametrize("where", [-1, 0])
def test_special_ids_must_be_in_the_vocabulary(tmp_path: Path, name: str, where: int) -> None:
    metadata = spm()
    value = where if where < 0 else len(metadata[GGML + "tokens"])
    with pytest.raises(TokenizerError, match=f"{name}_token_id is {value}"):
        build(tmp_path, metadata | {f"{GGML}{name}_token_id": value})


@pytest.mark.parametrize("key", ["scores", "token_type"])
@pytest.mark.parametrize("change", [-1, 1])
def test_lengths_must_agree(tmp_path: Path, key: str, change: int) -> None:
    metadata = spm()
    values = metadata[GGML + key]
    metadata[GGML + key] = values[:-1] if change < 0 else [*values, values[-1]]
    with pytest.raises(TokenizerError, match=f"{key} has {len(values) + change} entries"):
        build(tmp_path, metadata)


@pytest.mark.parametrize(
    ("index", "key", "value", "message"),
    [
        (300, "tokens", "<s>", "tokens 1 and 300 have the same text"),
        (300, "tokens", "\udcff", "token 300 is not valid UTF-8"),
        (300, "tokens", "a" * 1025, "1025 characters"),
        (300, "token_type", 7, r"token_type\[300\] is 7"),
        (300, "token_type", 0, r"token_type\[300\] is 0"),
        (300, "token_type", 6, "is a byte token but reads"),
        (5, "tokens", "<0xGG>", "is a byte token but reads"),
        (300, "scores", float("nan"), "finite"),
        (300, "scores", float("inf"), "finite"),
    ],
)
def test_one_bad_entry_is_found(tmp_path: Path, index: int, key: str, value: Any, message: str) -> None:
    metadata = spm()
    values = list(metadata[GGML + key])
    values[index] = value
    with pytest.raises((TokenizerError, GGUFError), match=message):
        build(tmp_path, metadata | {GGML + key: values})


@pytest.mark.parametrize("line", ["ab", " a", "a ", "", "a  b", "a b c", "qz\u4e16 x"])
def test_malformed_merges_are_refused(tmp_path: Path, line: str) -> None:
    metadata = bpe()
    merges = metadata[GGML + "merges"]
    with pytest.raises(TokenizerError, match=r"merges\[3\]"):
        build(tmp_path, metadata | {GGML + "merges": [*merges[:3], line, *merges[3:]]})


def test_unknown_kinds_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"'t5'.*'llama'.*'gpt2'"):
        build(tmp_path, spm() | {GGML + "model": "t5"})
    with pytest.raises(TokenizerError, match=r"'nope'.*llama-bpe.*qwen2.*smollm"):
        build(tmp_path, bpe() | {GGML + "pre": "nope"})


def test_flags_need_their_tokens(tmp_path: Path) -> None:
    for flag, token in (("add_bos_token", "bos_token_id"), ("add_eos_token", "eos_token_id")):
        metadata = spm() | {GGML + flag: True}
        del metadata[GGML + token]
        with pytest.raises(TokenizerError, match=token):
            build(tmp_path, metadata)


def test_text_that_could_not_be_spelled_is_refused_at_once(tmp_path: Path) -> None:
    metadata = vocabularies.sentencepiece_metadata(vocabularies.sentencepiece_model(byte_fallback=False))
    del metadata[GGML + "unknown_token_id"]
    with pytest.raises(TokenizerError, match="0 of 256 byte tokens"):
        build(tmp_path, metadata)


def test_every_end_token_counts(tmp_path: Path) -> None:
    tokenizer = build(tmp_path, bpe() | {GGML + "eot_token_id": 1, GGML + "eom_token_id": 0})
    assert tokenizer.eos_ids == {0, 1, 2}
    assert tokenizer.eos_id == 2


def test_empty_tokens_are_no_tokens(tmp_path: Path) -> None:
    metadata = spm()
    tokens = [*metadata[GGML + "tokens"], "", ""]
    grown = {GGML + "tokens": tokens}
    grown |= {GGML + key: [*metadata[GGML + key], value, value] for key, value in (("scores", 0.0), ("token_type", 1))}
    tokenizer = build(tmp_path, metadata | grown)
    assert tokenizer.decode([len(tokens) - 1]) == ""
    assert tokenizer.encode("the token") == build(tmp_path, metadata).encode("the token")


def test_without_a_bos_token_none_is_added_or_can_be(tmp_path: Path) -> None:
    metadata = spm()
    del metadata[GGML + "bos_token_id"]
    tokenizer = build(tmp_path, metadata)
    assert tokenizer.bos_id is None
    assert tokenizer.add_bos is False
    assert tokenizer.encode("the") == build(tmp_path, spm()).encode("the", add_bos=False)
    with pytest.raises(RequestError, match="no beginning-of-sequence token"):
        tokenizer.encode("the", add_bos=True)
