"""The simulator: exact figures of an LRU, atomic events, and its arithmetic."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.bench.streams.article import article_stream
from mer.bench.streams.skewed import skewed_stream
from mer.errors import ConfigError
from mer.sched.belady import simulate_belady
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy
from mer.sched.simulate import Event, EventList, Simulation, simulate
from tests._lib.routing import routings

N = 10_000
ARTICLE: list[Event] = [(0, ids) for ids in article_stream(N)]
SKEWED: list[Event] = [(0, ids) for ids in skewed_stream(N)]


def one_by_one(events: list[Event]) -> list[Event]:
    return [(layer, (expert,)) for layer, experts in events for expert in experts]


def lru_hits(events: Sequence[Event], n_slots: int) -> int:
    """A list in order of use, an event at a time."""
    recent: list[int] = []
    hits = 0
    for _, experts in events:
        hits += sum(expert in recent for expert in experts)
        for expert in [*filter(recent.__contains__, experts), *(e for e in experts if e not in recent)]:
            recent = [other for other in recent if other != expert] + [expert]
        recent = recent[-n_slots:]
    return hits


@pytest.mark.parametrize(
    ("n_slots", "lru", "belady"),
    [(4, 842, 3717), (8, 1711, 5257), (16, 2945, 7204), (32, 4579, 9639), (64, 6894, 12658), (128, 11260, 16292)],
)
def test_golden_figures_of_the_article_stream_an_id_at_once(n_slots: int, lru: int, belady: int) -> None:
    """LRU hits 4.21, 8.55, 14.7, 22.9, 34.5 and 56.3 %; Belady 18.6, 26.3, 36.0, 48.2, 63.3 and 81.5 %."""
    events = one_by_one(ARTICLE)
    assert simulate(events, LayerLRU(1, n_slots), n_slots, n_layers=1).hits == lru
    assert simulate_belady(events, n_slots, n_layers=1).hits == belady


@pytest.mark.parametrize(
    ("n_slots", "lru", "belady"), [(16, 86.3, 91.5), (32, 90.3, 94.4), (64, 93.7, 96.6), (124, 96.6, 98.1)]
)
def test_golden_figures_of_the_skewed_stream_an_id_at_once(n_slots: int, lru: float, belady: float) -> None:
    events = one_by_one(SKEWED)
    result = simulate(events, LayerLRU(1, n_slots), n_slots, n_layers=1)
    assert 100 * result.hit_rate == pytest.approx(lru, abs=0.05)
    assert 100 * simulate_belady(events, n_slots, n_layers=1).hit_rate == pytest.approx(belady, abs=0.05)


@given(routing=routings(max_layers=1), n_slots=st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_one_layer_is_a_plain_lru(routing: tuple[int, int, list[Event]], n_slots: int) -> None:
    """As long as no event is larger than the cache: of such a one, who stays is the simulator's choice."""
    events = [(layer, tuple(experts)[: max(1, n_slots // 2)]) for layer, experts in routing[2]]
    assert simulate(events, LayerLRU(1, n_slots), n_slots, n_layers=1).hits == lru_hits(events, n_slots)


def test_an_event_is_looked_up_before_anything_is_inserted() -> None:
    """One at a time, expert 1 would push out expert 0 before it is looked up."""
    events: list[Event] = [(0, (0,)), (0, (1, 0))]
    assert simulate(events, LayerLRU(1, 1), 1, n_layers=1).hits == 1
    assert simulate(one_by_one(events), LayerLRU(1, 1), 1, n_layers=1).hits == 0


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("static", "cost")])
def test_an_event_larger_than_the_cache_runs_in_waves(name: str) -> None:
    events: list[Event] = [(at % 2, (0, 1, 2, 3, 4)) for at in range(20)]
    shape = CacheShape(n_layers=2, n_experts=5, n_slots=2)
    result = simulate(events, make_policy(name, shape), 2, n_layers=2)
    assert result.lookups == 100
    assert result.hits <= simulate_belady(events, 2, n_layers=2).hits


def test_counts_by_layer() -> None:
    result = Simulation("x", 3, 2)
    result.count(0, 1, 3)
    result.count(1, 2, 2)
    result.count(0, 0, 1)
    assert (result.layer_hits, result.layer_lookups) == ([1, 2], [4, 2])
    assert (result.hits, result.lookups, result.hit_rate) == (3, 6, 0.5)
    assert result.missed_bytes([10, 1000]) == 30
    assert Simulation("x", 3, 2).hit_rate == 0.0


@pytest.mark.parametrize("n_slots", [0, -1])
def test_needs_a_slot(n_slots: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 slot"):
        simulate([], LayerLRU(1, 1), n_slots, n_layers=1)


def test_a_list_of_events_gives_them_back_in_little_memory() -> None:
    events = [(at % 1024, tuple(range(at % 5, 4096, 97))) for at in range(5000)]
    tracemalloc.start()
    try:
        kept = EventList(iter(events))
        assert tracemalloc.get_traced_memory()[0] < 3 * sum(10 + 2 * len(experts) for _, experts in events)
    finally:
        tracemalloc.stop()
    assert (len(kept), list(kept), kept[-1], kept[7:9]) == (5000, events, events[-1], events[7:9])
    for bound in (simulate_belady(kept, 99, n_layers=1024), simulate_belady(events, 99, n_layers=1024)):
        assert bound.layer_hits == simulate_belady(list(events), 99, n_layers=1024).layer_hits
