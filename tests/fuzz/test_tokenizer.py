"""Vocabularies drawn at random: what is accepted gives back what it has encoded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.test_regressions import load_check

check = load_check("tokenizer")


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=64, max_size=1200))
def test_decoding_undoes_encoding(data: bytes) -> None:
    check(data)
