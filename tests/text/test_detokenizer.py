"""Streaming detokenization against decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.text.detokenizer import StreamDetokenizer
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("detokenizer")
    if request.param == "llama":
        metadata = vocabularies.sentencepiece_metadata(vocabularies.sentencepiece_model())
    else:
        metadata = vocabularies.byte_level_metadata(vocabularies.byte_level_bpe(r"\s?\S+|\s+"), "gpt-2")
    return Tokenizer.from_gguf(vocabularies.parsed(folder, metadata))


def ids_of(tokenizer: Tokenizer, data: st.DataObject) -> list[int]:
    """Draw ids: any at all (broken UTF-8 included), the few that are bytes or control tokens, or those of a text."""
    some = st.integers(0, tokenizer.vocab_size - 1)
    kinds = st.one_of(
        st.lists(st.one_of(some, st.integers(0, min(260, tokenizer.vocab_size - 1))), max_size=12),
        st.text(max_size=12).map(tokenizer.encode),
    )
    return data.draw(kinds)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = StreamDetokenizer(tokenizer, prompt)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(max_examples=500)
@given(st.data())
def test_the_pieces_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = ids_of(tokenizer, data)
    assert "".join(stream(tokenizer, ids, [])) == tokenizer.decode(ids)


@settings(max_examples=300)
@given(st.data())
def test_the_pieces_are_what_follows_the_prompt(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt = tokenizer.encode(data.draw(st.text(max_size=6)))
    ids = ids_of(tokenizer, data)
    assert tokenizer.decode(prompt) + "".join(stream(tokenizer, ids, prompt)) == tokenizer.decode(prompt + ids)


@settings(max_examples=300)
@given(st.data())
def test_a_prompt_may_end_inside_a_character(tokenizer: Tokenizer, data: st.DataObject) -> None:
    prompt, ids = ids_of(tokenizer, data), ids_of(tokenizer, data)
    certain = "".join(stream(tokenizer, prompt, [])[:-1])
    assert certain + "".join(stream(tokenizer, ids, prompt)) == tokenizer.decode(prompt + ids)


@settings(max_examples=200)
@given(st.data())
def test_no_text_is_held_back_longer_than_its_character(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="ab é世😀\u00df", min_size=1, max_size=8))
    ids = tokenizer.encode(text, add_bos=False)
    pieces = stream(tokenizer, ids, [])
    # After each token, everything up to the last whole character is out.
    for n in range(1, len(ids) + 1):
        whole = b"".join(map(tokenizer.token_bytes, ids[:n])).decode("utf-8", "ignore")
        assert "".join(pieces[:n]) == (whole.removeprefix(" ") if tokenizer.space_prefix else whole)
    assert pieces[-1] == ""


def test_a_continuation_keeps_its_space(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode("the token the", add_bos=False)
    first = tokenizer.encode("the", add_bos=False)
    assert whole[: len(first)] == first
    assert "".join(stream(tokenizer, whole[len(first) :], first)) == " token the"
    assert "".join(stream(tokenizer, whole, [])) == "the token the"
