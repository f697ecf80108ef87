"""Every policy keeps to the protocol, and policies that are broken on purpose are caught."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.sched.heat import HeatProfile
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.policies.lfru import LFRU
from mer.sched.policies.ranking import Ranking
from mer.sched.policies.registry import DEFAULT_POLICY, POLICIES, CacheShape, make_policy
from mer.sched.policy import ExpertKey, Policy
from mer.sched.simulate import Event, simulate
from tests._lib.routing import CheckedCache, routings


def shape_of(n_layers: int, n_experts: int, n_slots: int) -> CacheShape:
    counts = np.arange(n_layers * n_experts).reshape(n_layers, n_experts) * 7 % 5
    return CacheShape(
        n_layers=n_layers,
        n_experts=n_experts,
        n_slots=n_slots,
        expert_bytes=tuple(100 + 50 * (layer % 2) for layer in range(n_layers)),
        profile=HeatProfile(bytes(32), counts),
    )


def check(policy: Policy, events: Sequence[Event], n_slots: int, *, bypass: bool) -> CheckedCache:
    cache = CheckedCache(policy, n_slots, bypass)
    for layer, experts in events:
        cache.event(layer, tuple(experts))
    return cache


@pytest.mark.parametrize("name", POLICIES)
@given(routing=routings(), n_slots=st.integers(1, 20), bypass=st.booleans())
@settings(max_examples=60, deadline=None)
def test_answers_are_allowed_and_the_simulator_agrees(
    name: str, routing: tuple[int, int, list[Event]], n_slots: int, bypass: bool
) -> None:
    n_layers, n_experts, events = routing
    shape = shape_of(n_layers, n_experts, n_slots)
    cache = check(make_policy(name, shape), events, n_slots, bypass=bypass)
    result = simulate(events, make_policy(name, shape), n_slots, n_layers=n_layers, bypass=bypass)
    assert (result.hits, result.lookups) == (cache.hits, cache.lookups)


class GivesUpPinned(LayerLRU):
    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        return super().victim(layer, lambda _: True, newcomer)


class ForgetsToRemove(LFRU):
    def remove(self, key: ExpertKey) -> None:
        pass


class RefusesUnasked(LFRU):
    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        return super().victim(layer, evictable, 0)


class GivesUpTooEarly(LFRU):
    """Takes the lowest only, and None if that one must stay."""

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        lowest = super().victim(layer, lambda _: True, newcomer)
        return lowest if lowest is None or lowest == (layer, newcomer) or evictable(lowest) else None


@pytest.mark.parametrize("broken", [GivesUpPinned, ForgetsToRemove, RefusesUnasked, GivesUpTooEarly])
def test_a_broken_policy_is_caught(broken: type[LayerLRU] | type[LFRU]) -> None:
    def fails(case: tuple[tuple[int, int, list[Event]], int, bool]) -> bool:
        (n_layers, n_experts, events), n_slots, bypass = case
        policy = broken(n_layers, n_slots if issubclass(broken, LayerLRU) else n_experts)
        try:
            check(policy, events, n_slots, bypass=bypass)
        except AssertionError:
            return True
        return False

    cases = st.tuples(routings(), st.integers(1, 6), st.booleans())
    find(cases, fails, settings=settings(max_examples=2000, deadline=None, database=None))


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("n_slots", [1, 2, 5, 12, 30, 63])
def test_the_default_hits_in_a_cycle_larger_than_the_cache(n_slots: int, bypass: bool) -> None:
    """32 layers that use the same two experts for every token: one LRU over all of them hits never."""
    events: list[Event] = [(layer, (0, 1)) for _ in range(60) for layer in range(32)]
    shape = shape_of(32, 8, n_slots)
    result = simulate(events, make_policy(DEFAULT_POLICY, shape), n_slots, n_layers=32, bypass=bypass)
    kept = n_slots if bypass else max(0, n_slots - 2)  # without bypass, newcomers of one event pass through two slots
    assert result.hits >= 55 * kept
    assert result.hits > 0 or kept == 0
    recent: dict[ExpertKey, None] = {}
    hits = 0
    for layer, experts in events:
        for expert in experts:
            hits += recent.pop((layer, expert), 0) is None
            recent[layer, expert] = None
            if len(recent) > n_slots:
                del recent[next(iter(recent))]
    assert hits == 0


@given(st.lists(st.lists(st.floats(0, 3), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_the_lowest_of_equals_has_been_visited_last(rows: list[list[float]], data: st.DataObject) -> None:
    values = np.round(np.array(rows))
    keys = [(layer, expert) for layer in range(len(rows)) for expert in range(3)]
    kept = data.draw(st.sets(st.sampled_from(keys)))
    allowed = data.draw(st.sets(st.sampled_from(keys)))
    layer = data.draw(st.integers(0, len(rows) - 1))
    ranking = Ranking(len(rows), 3)
    for key in keys:
        ranking.insert(key)
    for key in set(keys) - kept:
        ranking.remove(key)
    got = ranking.lowest(values, layer, lambda key: key in allowed)
    order = list(itertools.islice(itertools.cycle(range(len(rows) - 1, -1, -1)), 2 * len(rows)))
    recent = order[order.index(layer) :][: len(rows)]  # this layer, the one before it, ...
    best = min(
        (k for k in kept & allowed), key=lambda k: (values[k], recent.index(k[0]), k[1]), default=None
    )
    assert got == best


def test_unknown_and_unfit_policies_are_refused() -> None:
    bare = CacheShape(n_layers=2, n_experts=4, n_slots=3)
    with pytest.raises(ConfigError, match="no policy is named 'fifo'; there are lfru, layer-lru, lfu, static, cost"):
        make_policy("fifo", bare)
    with pytest.raises(ConfigError, match="needs a heat profile"):
        make_policy("static", bare)
    for sizes in ((), (100, 0)):
        with pytest.raises(ConfigError, match="needs the sizes"):
            make_policy("cost", CacheShape(n_layers=2, n_experts=4, n_slots=3, expert_bytes=sizes))
