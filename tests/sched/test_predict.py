"""The threshold, and what is ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.sched.predict import MIN_USES, MIN_VISITS, bar, distance, passing, threshold


def test_twice_the_uniform_share_passes_for_any_number_of_experts() -> None:
    """Smoothed as the predictors smooth, (count + 4 share) / (n + 4), and after no more visits than make it certain."""
    for n_experts in range(2, 100_001):
        share = 1 / n_experts
        visits = math.ceil(64 / share)
        frequency = min(1.0, 2 * share)
        estimate = (visits * frequency + 4 * share) / (visits + 4)
        assert share < bar(share, visits) <= estimate, n_experts


@given(n_experts=st.integers(2, 100_000), used=st.floats(0, 1), visits=st.integers(0, 10**9))
def test_the_bar_can_always_be_reached(n_experts: int, used: float, visits: int) -> None:
    share = max(1, round(used * n_experts)) / n_experts
    assert share <= threshold(share) <= min(1.0, 1.5 * share) <= min(1.0, 2 * share)
    if visits < MIN_VISITS:
        assert bar(share, visits) == math.inf
    elif share < 1:
        assert bar(share, visits) >= threshold(share) > share
        assert bar(share, visits) >= bar(share, 2 * visits) >= threshold(share)
    assert bar(share, 10**9) < 1 or share == 1


@pytest.mark.parametrize(
    ("last", "ahead"),
    [(None, {}), (0, {1: 1, 2: 2, 3: 3}), (1, {2: 1, 3: 2}), (2, {3: 1}), (3, {0: 1, 1: 2, 2: 3, 3: 4})],
)
def test_only_layers_to_come_are_ahead(last: int | None, ahead: dict[int, int]) -> None:
    assert {layer: far for layer in range(-1, 6) if (far := distance(layer, last, 4))} == ahead


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=80),
    st.floats(0, 1),
)
def test_what_passes_is_sorted_seen_and_likely(experts: list[tuple[float, int]], lowest: float) -> None:
    probabilities = np.array([probability for probability, _ in experts])
    found = passing(3, probabilities, lowest, [uses for _, uses in experts])
    expected = [
        (-probability, (3, expert))
        for expert, (probability, uses) in enumerate(experts)
        if probability >= lowest and uses >= MIN_USES
    ]
    assert [(-probability, key) for key, probability in found] == sorted(expected)
