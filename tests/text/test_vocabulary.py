"""Tokenizer metadata that contradicts itself must be refused with a typed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mer.errors import GGUFError, RequestError, TokenizerError, UnsupportedModel
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
        *((spm, key) for key in ("model", "tokens", "scores")),
        (bpe, "merges"),
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


@pytest.mark.parametrize("line", ["ab", " a", "a ", "", "a  b", "a b c", "a " + "b" * 2048])
def test_malformed_merges_are_refused(tmp_path: Path, line: str) -> None:
    metadata = bpe()
    merges = metadata[GGML + "merges"]
    with pytest.raises(TokenizerError, match=r"merges\[3\]"):
        build(tmp_path, metadata | {GGML + "merges": [*merges[:3], line, *merges[3:]]})


def test_unknown_kinds_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"'t5'.*'llama'.*'gpt2'"):
        build(tmp_path, spm() | {GGML + "model": "t5"})
    with pytest.raises(UnsupportedModel, match=r"'nope'.*llama-bpe.*qwen2.*smollm"):
        build(tmp_path, bpe() | {GGML + "pre": "nope"})


def test_flags_need_their_tokens(tmp_path: Path) -> None:
    for flag, token in (("add_bos_token", "bos_token_id"), ("add_eos_token", "eos_token_id")):
        metadata = bpe() | {GGML + flag: True}
        del metadata[GGML + token]
        with pytest.raises(TokenizerError, match=token):
            build(tmp_path, metadata)


def test_text_that_could_not_be_spelled_is_refused_at_once(tmp_path: Path) -> None:
    metadata = vocabularies.sentencepiece_metadata(vocabularies.sentencepiece_model(byte_fallback=False))
    del metadata[GGML + "unknown_token_id"]
    metadata[GGML + "tokens"] = ["<un>", *metadata[GGML + "tokens"][1:]]
    with pytest.raises(TokenizerError, match="0 of 256 byte tokens"):
        build(tmp_path, metadata)


def test_every_end_token_counts(tmp_path: Path) -> None:
    tokenizer = build(
        tmp_path, bpe() | {GGML + "eot_token_id": 1, GGML + "eom_token_id": 5, GGML + "fim_rep_token_id": 7}
    )
    assert tokenizer.eos_ids == {0, 1, 2, 5, 7}  # 0 is <|endoftext|>, which no key names
    assert tokenizer.eos_id == 2
    assert build(tmp_path, bpe() | {GGML + "eos_token_ids": [1, 9]}).eos_ids == {0, 1, 2, 9}


ENDS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> [e~[
<\uff5cend\u2581of\u2581sentence\uff5c>
"""


@pytest.mark.parametrize("text", ENDS.split())
def test_a_token_that_says_so_ends_a_text_and_no_text_becomes_it(tmp_path: Path, text: str) -> None:
    for kind in (1, 4, 5):
        metadata = grown(bpe(), [text], kind)
        tokens = metadata[GGML + "tokens"]
        tokenizer = build(tmp_path, metadata)
        assert tokenizer.eos_ids == {0, 2, len(tokens) - 1}
        assert not tokenizer.eos_ids.intersection(tokenizer.encode(text))
        assert tokenizer.encode(text, parse_special=True, add_bos=False) == [len(tokens) - 1]


@pytest.mark.parametrize(
    ("present", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["<|end|>", "<|call|>"], ["<|end|>", "<|call|>"]),
        (["</s>", "<|tool_response>", "<eos>"], ["<|tool_response>", "<eos>"]),
        (["<|user|>", "<|observation|>"], []),
    ],
)
def test_the_exceptions_of_two_families_hold(tmp_path: Path, present: list[str], ends: list[str]) -> None:
    metadata = bpe()
    n = len(metadata[GGML + "tokens"])
    tokenizer = build(tmp_path, grown(metadata, present, 3))
    assert {tokenizer.token_text(i) for i in tokenizer.eos_ids if i >= n} == set(ends)


def grown(metadata: dict[str, Any], texts: list[str], kind: int) -> dict[str, Any]:
    """Return the metadata with further tokens of one type."""
    more: dict[str, list[Any]] = {"tokens": texts, "token_type": [kind] * len(texts), "scores": [0.0] * len(texts)}
    return metadata | {GGML + key: metadata[GGML + key] + more[key] for key in more if GGML + key in metadata}


def test_of_tokens_with_one_text_the_last_is_what_text_becomes(tmp_path: Path) -> None:
    for make in (spm, bpe):
        metadata = make()
        text = next(t for t in metadata[GGML + "tokens"] if t.isalpha() and t.isascii() and len(t) == 3)
        n = len(metadata[GGML + "tokens"])
        tokenizer = build(tmp_path, grown(metadata, [text, *["[PAD]"] * 3], 1))
        first = metadata[GGML + "tokens"].index(text)
        assert tokenizer.token_bytes(first) == tokenizer.token_bytes(n) == text.encode()
        assert first not in tokenizer.encode(f"{text} x{text}")
        assert tokenizer.decode(tokenizer.encode(f"{text} x{text}")) == f"{text} x{text}"


def test_without_types_control_tokens_and_bytes_are_known_by_their_texts(tmp_path: Path) -> None:
    for make in (spm, bpe):
        metadata = make()
        whole = build(tmp_path, metadata)
        del metadata[GGML + "token_type"]
        bare = build(tmp_path, metadata)
        assert bare.eos_ids == whole.eos_ids
        for text in ("the token\n世界 \x07", "<|im_end|> <s> </s>"):
            assert bare.decode(bare.encode(text)) == text
            assert not any(map(bare.is_control, bare.encode(text, add_bos=False)))
        assert bare.encode("<|im_start|>", parse_special=True) == whole.encode("<|im_start|>", parse_special=True)


def test_byte_tokens_of_the_normal_type_are_bytes_in_both_directions(tmp_path: Path) -> None:
    metadata = spm()
    typed = build(tmp_path, metadata)
    metadata[GGML + "token_type"] = [1 if t == 6 else t for t in metadata[GGML + "token_type"]]
    tokenizer = build(tmp_path, metadata)
    for text in ("one\ntwo\t\x00", "<0x0A>"):
        assert tokenizer.encode(text) == typed.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_bytes(metadata[GGML + "tokens"].index("<0x0A>")) == b"\n"


def test_what_a_file_forbids_to_draw_is_known(tmp_path: Path) -> None:
    assert build(tmp_path, bpe() | {GGML + "suppress_tokens": [5, 7]}).suppressed == {5, 7}
    with pytest.raises(TokenizerError, match=r"suppress_tokens\[1\] is -1"):
        build(tmp_path, bpe() | {GGML + "suppress_tokens": [5, -1]})


@pytest.mark.parametrize(
    "broken",
    [
        {"model": "x\ny" * 99},
        {"pre": "x\ny" * 99},
        {"merges": ["x\ny" * 99]},
        {"tokens": ["\udcff\n" * 99] * 5},
        {"suppress_tokens": [99999]},
        {"bos_token_id": 99999},
        {"token_type": [9]},
    ],
    ids=lambda broken: next(iter(broken)),
)
def test_messages_name_the_file_and_echo_little_of_it(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises((TokenizerError, UnsupportedModel)) as caught:
        build(tmp_path, bpe() | {GGML + key: value for key, value in broken.items()})
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "tokenizer.gguf"))
    assert message.isprintable()
    assert "x\\ny" * 21 not in message


def test_a_sentencepiece_file_without_ids_has_the_usual_ones(tmp_path: Path) -> None:
    metadata = spm()
    for name in ("bos", "eos", "unknown"):
        del metadata[f"{GGML}{name}_token_id"]
    tokenizer = build(tmp_path, metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.eos_ids == {2}
    assert tokenizer.encode("the") == build(tmp_path, spm()).encode("the")


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
    metadata[GGML + "tokens"] = ["<unk>", "<begin>", *metadata[GGML + "tokens"][2:]]
    tokenizer = build(tmp_path, metadata)
    assert tokenizer.bos_id is None
    assert tokenizer.add_bos is False
    assert tokenizer.encode("the") == build(tmp_path, spm()).encode("the", add_bos=False)
    with pytest.raises(RequestError, match="no beginning-of-sequence token"):
        tokenizer.encode("the", add_bos=True)
