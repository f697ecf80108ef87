"""Gemma 4's vocabularies against the tokenizer of transformers."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, trainers
from transformers import GemmaTokenizer

from mer.errors import TokenizerError
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

GGML = "tokenizer.ggml."
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
TURNS = ["<|turn>", "<turn|>"]
VISIBLE = ["<|channel>", "<channel|>", "<|tool_response>"]  # which their files make user-defined
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS = ["\n", "\n\n", "\n\n\n"]
PIECES = ["the ", " a", "a", "=", "  ", "    ", "token", "é", "世", "😀", "\n", "\n\n", "\t", "\r\n", "▁", "1234", "'s"]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from([*PIECES, *VISIBLE[:2]]), max_size=30).map("".join))


@functools.cache
def described() -> tuple[dict[str, int], list[Any]]:
    """Return a vocabulary laid out as Gemma's, and its merges."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, max_token_length=12)
    made.train_from_iterator(vocabularies.training_lines(), trainer)
    model = json.loads(made.to_str())["model"]
    learnt = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = [*SPECIAL, *TURNS, *VISIBLE, *RUNS, *BYTES, *(token for token in learnt if token not in {"é", "世"})]
    known = set(tokens)
    merges = [tuple(pair) for pair in model["merges"] if {*pair, "".join(pair)} <= known]
    return {token: i for i, token in enumerate(tokens)}, [*merges, ("\n", "\n")]  # none leads to three line breaks


@functools.cache
def original() -> tokenizers.Tokenizer:
    vocabulary, merges = described()
    backend: tokenizers.Tokenizer = GemmaTokenizer(vocab=dict(vocabulary), merges=list(merges)).backend_tokenizer
    backend.add_tokens([AddedToken(text, normalized=False) for text in [*RUNS, *VISIBLE[:2]]])
    backend.add_special_tokens([*TURNS, VISIBLE[2]])
    backend.encode_special_tokens = True
    return backend


def metadata() -> dict[str, Any]:
    """Return the metadata of a file that carries this vocabulary."""
    vocabulary, merges = described()
    kinds = dict.fromkeys([*SPECIAL, *TURNS], 3) | dict.fromkeys(VISIBLE, 4) | dict.fromkeys(BYTES, 6)
    return {
        GGML + "model": "gemma4",
        GGML + "tokens": list(vocabulary),
        GGML + "scores": [0.0] * len(vocabulary),
        GGML + "token_type": [kinds.get(token, 1) for token in vocabulary],
        GGML + "merges": [" ".join(pair) for pair in merges],
        GGML + "padding_token_id": 0,
        GGML + "eos_token_id": 1,
        GGML + "bos_token_id": 2,
        GGML + "unknown_token_id": 3,
        GGML + "add_space_prefix": False,
        GGML + "add_bos_token": True,
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(vocabularies.parsed(tmp_path_factory.mktemp("gemma"), metadata()))


def ids_of(text: str) -> list[int]:
    return original().encode(text, add_special_tokens=False).ids


@settings(max_examples=400, deadline=None)
@given(TEXTS)
@example(" lead and  two   three    four")
@example("a\nb\n\nc\n\n\nd\n \n e\n▁f")
@example("<|turn>user\nhi<turn|>\n<bos><unk><0x41>")
def test_text_becomes_the_ids_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    text = re.sub("\n{4,}", "\n\n\n", text)
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == ids_of(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ") == original().decode(ids)


def test_prose_becomes_the_ids_of_transformers(tokenizer: Tokenizer) -> None:
    text = "\n".join(vocabularies.training_lines()) * 2
    assert len(text) > 50_000
    assert tokenizer.encode(text, add_bos=False) == ids_of(text)


def test_a_run_of_line_breaks_is_looked_up_whole_or_merged(tokenizer: Tokenizer) -> None:
    one, two, three = (described()[0][run] for run in RUNS)
    for n, ids in ((1, [one]), (2, [two]), (3, [three]), (4, [two, two]), (5, [two, two, one])):
        assert tokenizer.encode("\n" * n, add_bos=False) == ids


def test_control_tokens_come_only_from_text_parsed_for_them(tokenizer: Tokenizer) -> None:
    text = "<|turn>user\nthe token<turn|>\n<|channel>"
    assert not any(map(tokenizer.is_control, tokenizer.encode(text, add_bos=False)))
    original().encode_special_tokens = False
    try:
        expected = ids_of(text)
    finally:
        original().encode_special_tokens = True
    assert tokenizer.encode(text, add_bos=False, parse_special=True) == expected
    assert tokenizer.decode(expected) == "user\nthe token\n<|channel>"


@pytest.mark.parametrize("says", [None, True, False])
def test_prompts_begin_with_bos_whatever_the_file_says(tmp_path: Path, says: bool | None) -> None:
    said = metadata() | {GGML + "add_bos_token": says}
    if says is None:
        del said[GGML + "add_bos_token"]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, said))
    assert tokenizer.add_bos
    assert tokenizer.encode("the") == [2, *ids_of("the")]


@pytest.mark.parametrize("key", ["merges", "bos_token_id"])
def test_missing_metadata_is_named(tmp_path: Path, key: str) -> None:
    broken = metadata()
    del broken[GGML + key]
    with pytest.raises(TokenizerError, match=f"{GGML}{key} is missing: a 'gemma4' vocabulary needs it"):
        Tokenizer.from_gguf(vocabularies.parsed(tmp_path, broken))


def test_what_has_no_bytes_becomes_the_unknown_token_once(tmp_path: Path) -> None:
    poor = metadata()
    poor[GGML + "tokens"] = [f"<gone {t}>" if t in ("<0xE4>", "<0xF0>") else t for t in poor[GGML + "tokens"]]
    poor[GGML + "token_type"] = [
        1 if t.startswith("<gone") else k for t, k in zip(poor[GGML + "tokens"], poor[GGML + "token_type"], strict=True)
    ]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, poor))
    assert tokenizer.encode("世", add_bos=False) == [3]
    assert tokenizer.encode("a世😀世b", add_bos=False) == [*ids_of("a"), 3, *ids_of("b")]
    assert tokenizer.decode(tokenizer.encode("é 世", add_bos=False)) == "é "


def test_merges_of_what_is_no_token_do_not_harm(tmp_path: Path) -> None:
    odd = metadata()
    odd[GGML + "merges"] = ["q z", "qz q", *odd[GGML + "merges"]]
    tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, odd))
    for text in ("qzq", "qzqz the"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
