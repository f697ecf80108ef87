"""Whole engines of simulated parts in drawn situations: all get what they would get alone, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.testing.deterministic import run_seeded
from mer.testing.seeds import run_world
from mer.testing.strategies import worlds
from mer.testing.world import FAULTS, Feature, SimWorld

pytestmark = pytest.mark.slow

orders = st.integers(0, 999)


@settings(max_examples=100, deadline=None)
@given(world=worlds(set(Feature) - FAULTS), order=orders)
def test_every_sequence_gets_what_it_would_get_alone(world: SimWorld, order: int) -> None:
    run_seeded(run_world, world, seed=order)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), order=orders)
def test_faults_end_the_sequences_they_concern_and_no_other(world: SimWorld, order: int) -> None:
    run_seeded(run_world, world, seed=order)
