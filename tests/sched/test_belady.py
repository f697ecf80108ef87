"""Belady's bound against an exhaustive search, and above every policy."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.belady import simulate_belady
from mer.sched.policies.registry import POLICIES, make_policy
from mer.sched.simulate import Event, simulate
from tests._lib.routing import routings
from tests.sched.policies.test_protocol import shape_of


def most_hits(events: list[Event], n_slots: int) -> int:
    """Try every choice of what to keep after every event."""

    @cache
    def best(at: int, kept: frozenset[tuple[int, int]]) -> int:
        if at == len(events):
            return 0
        layer, experts = events[at]
        used = {(layer, expert) for expert in experts}
        held = sorted(kept | used)
        choices = combinations(held, min(n_slots, len(held)))
        return len(kept & used) + max(best(at + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


@given(routing=routings(max_layers=2, max_experts=4, max_events=9), n_slots=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_is_the_optimum(routing: tuple[int, int, list[Event]], n_slots: int) -> None:
    n_layers, _, events = routing
    assert simulate_belady(events, n_slots, n_layers=n_layers).hits == most_hits(events, n_slots)


@pytest.mark.parametrize("name", POLICIES)
@given(routing=routings(), n_slots=st.integers(1, 12), bypass=st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_policy_has_more_hits(name: str, routing: tuple[int, int, list[Event]], n_slots: int, bypass: bool) -> None:
    n_layers, n_experts, events = routing
    bound = simulate_belady(events, n_slots, n_layers=n_layers)
    policy = make_policy(name, shape_of(n_layers, n_experts, n_slots))
    result = simulate(events, policy, n_slots, n_layers=n_layers, bypass=bypass)
    assert result.hits <= bound.hits
    assert result.layer_lookups == bound.layer_lookups


def test_stale_entries_of_a_long_replay_change_nothing() -> None:
    """Long enough that the heap is rebuilt; one slot more than the loop needs, so that all but the first round hits."""
    events: list[Event] = [(0, (at % 5,)) for at in range(10_000)]
    assert simulate_belady(events, 5, n_layers=1).hits == 9_995
