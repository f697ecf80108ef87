"""SentencePiece vocabularies against SentencePiece itself."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mer.errors import RequestError
from mer.plan.memory import tokenizer_bytes
from mer.text.joining import join
from mer.text.tokenizer import Tokenizer
from tests._lib import vocabularies

PIECES = [
    "the ",
    " a",
    "a",
    "b",
    "ab",
    "  ",
    "=",
    "-",
    "er",
    "token",
    "é",
    "世",
    "😀",
    "\n",
    "\t",
    *vocabularies.USER_DEFINED,
]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))


def tokenizer_of(tmp: Path, *, byte_fallback: bool = True, space_prefix: bool = True) -> Tokenizer:
    model = vocabularies.sentencepiece_model(byte_fallback=byte_fallback, space_prefix=space_prefix)
    metadata = vocabularies.sentencepiece_metadata(model, space_prefix=space_prefix)
    return Tokenizer.from_gguf(vocabularies.parsed(tmp, metadata))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_of(tmp_path_factory.mktemp("spm"))


@settings(max_examples=400)
@given(TEXTS)
@example("")
@example(" ")
@example("\u2581")
@example("aaaaaaaaaaaaa    ====== ababababa")
@example("<s></s><unk><0x41>")
def test_text_becomes_the_ids_of_sentencepiece(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text, add_bos=False) == vocabularies.sentencepiece_model().encode(text)


@pytest.mark.parametrize(("byte_fallback", "space_prefix"), [(False, True), (True, False)])
def test_text_becomes_the_ids_of_sentencepiece_without_bytes_or_prefix(
    tmp_path: Path, byte_fallback: bool, space_prefix: bool
) -> None:
    tokenizer = tokenizer_of(tmp_path, byte_fallback=byte_fallback, space_prefix=space_prefix)
    model = vocabularies.sentencepiece_model(byte_fallback=byte_fallback, space_prefix=space_prefix)
    for text in ["the tokenizer", " lead", "日本日本 x 世 😀😀", *vocabularies.training_lines()]:
        assert tokenizer.encode(text, add_bos=False) == model.encode(text)


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """Join, as the definition says, the neighbours that make the best token, the leftmost of equals, until none do."""
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        i = min(pairs)[1]
        parts[i : i + 2] = ["".join(parts[i : i + 2])]


@settings(max_examples=400)
@given(st.data())
def test_any_scores_join_as_the_definition_says(data: st.DataObject) -> None:
    pieces = list("abc")
    for _ in range(data.draw(st.integers(1, 8))):
        piece = data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces))
        pieces += [piece] if piece not in pieces else []
    drawn = data.draw(st.lists(st.integers(-9, 0), min_size=len(pieces), max_size=len(pieces)))
    scores = dict(zip(pieces, map(float, drawn), strict=True))
    ranks = {piece: -rank for piece, rank in zip(pieces, drawn, strict=True)}
    text = data.draw(st.text("abc", max_size=20))
    assert join(text, lambda left, right: ranks.get(left + right)) == joined(text, scores)


def test_runs_of_one_score_are_joined_from_the_left() -> None:
    lengths = [1, 2, 3, 4, 5, 7, 9, 14, 16]
    scores = {"a" * n: -1.0 for n in lengths}
    for n in range(1, 70):
        assert join("a" * n, lambda left, right: 0 if left + right in scores else None) == joined("a" * n, scores)


def test_joining_asks_for_a_number_of_pairs_that_grows_with_the_text_alone() -> None:
    """Every run of one character up to 1,024 is a token, the longer ones better: each join offers two more pairs."""
    for n in (1000, 20_000):
        asked = 0

        def rank(left: str, right: str) -> int | None:
            nonlocal asked
            asked += 1
            return 1024 - len(left + right) if len(left + right) <= 1024 else None

        assert "".join(join("a" * n, rank)) == "a" * n
        assert asked <= 3 * n


def test_a_vocabulary_of_long_nested_tokens_needs_no_more_than_the_plan_assumes(tmp_path: Path) -> None:
    n = 4000
    tokens = ["<unk>", *dict.fromkeys("a" * (1 + i % 1000) + "bcdefgh"[i // 1000] * (i // 1000) for i in range(n))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    gguf = vocabularies.parsed(tmp_path, metadata)
    tracemalloc.start()
    try:
        tokenizer = Tokenizer.from_gguf(gguf)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < tokenizer_bytes(gguf, len(tokens))
    assert tokenizer.decode(tokenizer.encode("a" * 5000)) == "a" * 5000


@settings(max_examples=300)
@given(st.data())
def test_ids_become_the_text_of_sentencepiece(tokenizer: Tokenizer, data: st.DataObject) -> None:
    model = vocabularies.sentencepiece_model()
    # SentencePiece writes the unknown token as " ⁇ ", and one U+FFFD for each byte where Python writes one a sequence.
    ids = data.draw(
        st.lists(st.integers(1, tokenizer.vocab_size - 1).filter(lambda i: not model.is_byte(i)), max_size=12)
    )
    assert tokenizer.decode(ids) == model.decode(ids)


@settings(max_examples=200)
@given(TEXTS)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    # The vocabulary itself writes a space for U+2581.
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_the_file_says_whether_a_prompt_begins_with_bos(tmp_path: Path) -> None:
    metadata = vocabularies.sentencepiece_metadata(vocabularies.sentencepiece_model())
    for say, expected in ((None, True), (True, True), (False, False)):
        said = metadata if say is None else metadata | {"tokenizer.ggml.add_bos_token": say}
        tokenizer = Tokenizer.from_gguf(vocabularies.parsed(tmp_path, said))
        assert tokenizer.add_bos is expected
        assert (tokenizer.encode("a")[0] == 1) is expected
        assert tokenizer.encode("a", add_bos=True)[0] == 1
        assert tokenizer.encode("a", add_bos=False)[0] != 1


def test_control_tokens_come_only_from_text_parsed_for_them(tokenizer: Tokenizer) -> None:
    text = "a</s>b"
    assert not any(map(tokenizer.is_control, tokenizer.encode(text, add_bos=False)))
    model = vocabularies.sentencepiece_model()
    assert tokenizer.encode(text, add_bos=False, parse_special=True) == [*model.encode("a"), 2, *model.encode("b")]
    assert tokenizer.eos_ids == {2}
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True)) == "a b"


def test_a_lone_surrogate_is_an_error_of_the_request(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_an_id_outside_the_vocabulary_is_an_error_of_the_request(tokenizer: Tokenizer) -> None:
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(RequestError, match="not in the vocabulary"):
            tokenizer.decode([token_id])
