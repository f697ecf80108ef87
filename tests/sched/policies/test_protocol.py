"""Every policy keeps to the protocol, and policies that are broken on purpose are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.io.extents import ExpertKey
from mer.sched.heat import HeatProfile
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.policies.lfru import LFRU
from mer.sched.policies.ranking import Ranking
from mer.sched.policies.registry import DEFAULT_POLICY, POLICIES, CacheShape, make_policy
from mer.sched.policy import Policy
from mer.sched.simulate import Event, simulate
from tests._lib.routing import CheckedCache, routings


def shape_of(n_layers: int, n_experts: int, n_slots: int) -> CacheShape:
    counts = np.arange(n_layers * n_experts).reshape(n_layers, n_experts) * 7 % 5
    return CacheShape(
        n_layers=n_layers,
        n_experts=n_experts,
        n_slots=n_slots,
        expert_bytes=tuple(100 + 50 * (layer % 2) for layer in range(n_layers)),
        profile=HeatProfile(bytes(32), counts, np.full(n_layers, 5)),
    )


def two_kinds(shape: CacheShape, n_slots: int) -> CacheShape:
    """Return the shape with experts that fit two classes of slots: those of odd layers, and every third of the rest."""
    kinds = tuple(
        tuple(int(layer % 2 == 1 or expert % 3 == 2) for expert in range(shape.n_experts))
        for layer in range(shape.n_layers)
    )
    return attrs.evolve(shape, kinds=kinds, slot_counts=(n_slots, n_slots), n_slots=2 * n_slots)


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


@pytest.mark.parametrize("name", POLICIES)
@given(routing=routings(max_experts=8), n_slots=st.integers(1, 8), bypass=st.booleans())
@settings(max_examples=60, deadline=None)
def test_answers_are_allowed_with_several_classes_of_slots(
    name: str, routing: tuple[int, int, list[Event]], n_slots: int, bypass: bool
) -> None:
    n_layers, n_experts, events = routing
    shape = two_kinds(shape_of(n_layers, n_experts, n_slots), n_slots)
    cache = CheckedCache(make_policy(name, shape), n_slots, bypass, shape.kinds)
    for layer, experts in events:
        cache.event(layer, tuple(experts))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "layer-lru"])
@given(routing=routings(max_experts=8), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_class_of_slots_is_ranked_as_if_the_others_could_not_leave(
    name: str, routing: tuple[int, int, list[Event]], data: st.DataObject
) -> None:
    """Layer-LRU is another matter: the layers' shares are of each class."""
    n_layers, n_experts, events = routing
    plain = shape_of(n_layers, n_experts, 5)
    shape = two_kinds(plain, 5)
    assert shape.kinds is not None
    apart, mixed = make_policy(name, shape), make_policy(name, plain)
    keys = [(layer, expert) for layer in range(n_layers) for expert in range(n_experts)]
    for policy in (apart, mixed):
        for layer, experts in events:
            policy.use(layer, experts)
    for key in data.draw(st.lists(st.sampled_from(keys), unique=True)):
        apart.insert(key)
        mixed.insert(key)
    for kind in {k for row in shape.kinds for k in row}:
        of_kind = {key for key in keys if shape.kinds[key[0]][key[1]] == kind}
        layer = data.draw(st.integers(0, n_layers - 1))
        newcomer = data.draw(st.none() | st.integers(0, n_experts - 1))
        assert apart.victim(layer, lambda _: True, newcomer, kind=kind) == mixed.victim(
            layer, of_kind.__contains__, newcomer
        )


class GivesUpPinned(LayerLRU):
    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        return super().victim(layer, lambda _: True, newcomer, kind=kind)


class ForgetsToRemove(LFRU):
    def remove(self, key: ExpertKey) -> None:
        pass


class RefusesUnasked(LFRU):
    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        return super().victim(layer, evictable, 0, kind=kind)


class GivesUpTooEarly(LFRU):
    """Takes the lowest only, and None if that one must stay."""

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        lowest = super().victim(layer, lambda _: True, newcomer, kind=kind)
        return lowest if lowest is None or lowest == (layer, newcomer) or evictable(lowest) else None


@pytest.mark.slow
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


@pytest.mark.slow
@given(
    n_layers=st.integers(1, 4),
    impatient=st.booleans(),
    weights=st.none() | st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=4, max_size=4),
    kinds=st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=4, max_size=4),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_lowest_is_that_of_a_search_through_all(
    n_layers: int, impatient: bool, weights: list[float] | None, kinds: list[list[int]], data: st.DataObject
) -> None:
    """At any time, whatever has changed since the search before; of equals, the one of the layer visited last."""
    values = np.zeros((n_layers, 3))
    prices = None if weights is None else np.array(weights[:n_layers])
    ranking = Ranking(values, kinds=kinds[:n_layers], weights=prices, impatient=impatient)
    keys = [(layer, expert) for layer in range(n_layers) for expert in range(3)]
    kept: set[ExpertKey] = set()
    now = 0
    for _ in range(data.draw(st.integers(1, 12))):
        layer, _ = key = data.draw(st.sampled_from(keys))
        match data.draw(st.sampled_from(["change", "keep or drop", "keep or drop", "search"])):
            case "change":
                values[layer] = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=3, max_size=3))
                ranking.visited(layer)
                now = layer
            case "keep or drop":
                (ranking.remove if key in kept else ranking.insert)(key)
                kept ^= {key}
            case "search":
                allowed = data.draw(st.sets(st.sampled_from(keys)))
                kind = data.draw(st.sampled_from(sorted({k for row in kinds[:n_layers] for k in row})))
                got = ranking.lowest(allowed.__contains__, kind)

                def rank(key: ExpertKey, now: int = now) -> tuple[float, int, int]:
                    ago = (now - key[0]) % n_layers  # layers visited since that of the expert
                    worth = values[key] * (1.0 if prices is None else prices[key[0]])
                    if impatient:
                        worth /= n_layers - ago
                    assert ranking.worth(key) == pytest.approx(worth)
                    return round(worth, 9), ago, key[1]

                rivals = [key for key in kept & allowed if kinds[key[0]][key[1]] == kind]
                assert got == min(rivals, key=rank, default=None)


def test_unknown_and_unfit_policies_are_refused() -> None:
    bare = CacheShape(n_layers=2, n_experts=4, n_slots=3)
    with pytest.raises(ConfigError, match="no policy is named 'fifo'; there are lfru, layer-lru, lfu, static, cost"):
        make_policy("fifo", bare)
    with pytest.raises(ConfigError, match="needs a heat profile"):
        make_policy("static", bare)
    for sizes in ((), (100, 0)):
        with pytest.raises(ConfigError, match="needs the sizes"):
            make_policy("cost", CacheShape(n_layers=2, n_experts=4, n_slots=3, expert_bytes=sizes))
    with pytest.raises(ValueError, match="belong together"):
        CacheShape(n_layers=1, n_experts=2, n_slots=3, kinds=((0, 1),))
