"""What each policy ranks by, against models in plain Python."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.bench.streams.chains import mixtral_chains
from mer.errors import ConfigError
from mer.sched.heat import HeatProfile
from mer.sched.policies.cost_aware import CostAware
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.policies.lfru import LFRU, SPANS
from mer.sched.policies.lfu import LFU
from mer.sched.policies.static import StaticHotSet
from mer.sched.simulate import Event, simulate
from tests._lib.routing import CheckedCache, routings


def run(policy: LFU | LFRU | StaticHotSet, events: list[Event], n_slots: int, *, bypass: bool = False) -> CheckedCache:
    cache = CheckedCache(policy, n_slots, bypass)
    for layer, experts in events:
        cache.event(layer, tuple(experts))
    return cache


@given(routing=routings(), half_life=st.sampled_from([1.0, 8.0, 512.0]))
@settings(max_examples=80, deadline=None)
def test_lfu_counts_halve_with_the_visits_of_their_layer(
    routing: tuple[int, int, list[Event]], half_life: float
) -> None:
    n_layers, n_experts, events = routing
    policy = LFU(n_layers, n_experts, half_life=half_life)
    for layer, experts in events:
        policy.use(layer, experts)
    for layer in range(n_layers):
        visits = [experts for visited, experts in events if visited == layer]
        for expert in range(n_experts):
            ages = [len(visits) - 1 - at for at, experts in enumerate(visits) if expert in experts]
            count = sum(0.5 ** (age / half_life) for age in ages)
            assert policy._counts[layer, expert] == pytest.approx(count)
            decayed_visits = sum(0.5 ** (age / half_life) for age in range(len(visits)))
            assert policy.likelihood((layer, expert)) == pytest.approx(count / decayed_visits if visits else 0.0)


@pytest.mark.parametrize("half_life", [0.0, -1.0, float("nan")])
def test_lfu_needs_a_half_life(half_life: float) -> None:
    with pytest.raises(ConfigError, match="half-life"):
        LFU(1, 2, half_life=half_life)


@given(routing=routings())
@settings(max_examples=80, deadline=None)
def test_lfru_likelihoods_are_weighted_averages_of_past_uses(routing: tuple[int, int, list[Event]]) -> None:
    n_layers, n_experts, events = routing
    policy = LFRU(n_layers, n_experts)
    assert policy._weights.tolist() == [1 / len(SPANS)] * len(SPANS) + [0.0]
    policy._weights[:] = weights = np.array([0.3, 0.05, 0.1, 0.25, 0.1, 0.2])
    policy._learn = lambda averages, used: None  # type: ignore[method-assign]
    for layer, experts in events:
        policy.use(layer, experts)
    for layer in range(n_layers):
        visits = [experts for visited, experts in events if visited == layer]
        averages = np.zeros((n_experts, len(SPANS)))
        for expert in range(n_experts):
            for at, experts in enumerate(visits, 1):
                for i, span in enumerate(SPANS):
                    window = min(span, at)
                    averages[expert, i] += ((expert in experts) - averages[expert, i]) / window
        for expert in range(n_experts):
            expected = weights[:-1] @ averages[expert] + weights[-1] * averages[:, -1].mean()
            assert policy.likelihood((layer, expert)) == pytest.approx(float(expected), abs=1e-12)


def test_lfru_is_not_taken_in_by_favourites_of_chance() -> None:
    """All experts are equally likely, and in 60 visits some happen to be used twice as often as others."""
    rng = np.random.default_rng(1)
    policy = LFRU(32, 8)
    uses = np.zeros((32, 8))
    for _ in range(60):
        for layer in range(32):
            experts = rng.choice(8, 2, replace=False)
            uses[layer, experts] += 1
            policy.use(layer, experts.tolist())
    assert uses.max() > 2 * uses.min()
    likelihoods = [policy.likelihood((layer, expert)) for layer in range(32) for expert in range(8)]
    assert np.mean(likelihoods) == pytest.approx(0.25, abs=0.01)
    assert np.std(likelihoods) < 0.02


def test_lfru_learns_weights_of_least_squared_error() -> None:
    """Against a search for the non-negative weights by projected gradient descent over all lessons at once."""
    rng = np.random.default_rng(1)
    policy = LFRU(1, 6)
    first = np.array([0.2] * 5 + [0.0])  # the average over all experts has no weight at first
    products, moments = np.eye(6), first
    used = rng.choice(6, 2, replace=False)
    lessons = 0
    for at in range(4 * 8 * 60 + 1):  # a lesson every 4 visits, a fit every 8 lessons
        if rng.random() > 0.6:
            used = rng.choice(6, 2, replace=False, p=np.array([6, 5, 4, 3, 2, 1]) / 21)
        if at and at % 4 == 0:
            if lessons and lessons % 8 == 0:  # what a fit was made from counts less from then on
                products, moments = products * 0.994, moments * 0.994
            seen = policy._averages[0].T
            products = products + seen @ seen.T
            moments = moments + seen @ np.isin(np.arange(6), used)
            lessons += 1
        policy.use(0, used.tolist())
    assert lessons == 8 * 60
    best = first
    rate = 1 / np.linalg.eigvalsh(products)[-1]
    for _ in range(200_000):
        best = np.maximum(0, best - rate * (products @ best - moments))

    def error(weights: np.ndarray) -> float:
        return float(weights @ products @ weights - 2 * moments @ weights)

    assert (policy._weights >= 0).all()
    assert error(policy._weights) - error(best) < 1e-3 * abs(error(best))
    assert policy._weights[0] > 0.4  # the set repeats in 60 % of the visits


def test_lfru_learns_from_every_layer_alike() -> None:
    policy = LFRU(7, 4)
    lessons: Counter[int] = Counter()
    starts = {policy._averages[layer].ctypes.data: layer for layer in range(7)}
    policy._learn = lambda averages, used: lessons.update([starts[averages.ctypes.data]])  # type: ignore[method-assign]
    for _ in range(41):
        for layer in range(7):
            policy.use(layer, [0])
    assert set(lessons.values()) == {10}


@pytest.mark.slow
def test_lfru_likelihoods_are_kept_promises() -> None:
    """Of the experts that are said to be used with some likelihood, about that share is."""
    policy = LFRU(32, 8)
    said: dict[int, list[float]] = {}
    came: dict[int, list[bool]] = {}
    for at, (layer, experts) in enumerate(mixtral_chains(1500)):
        if at >= 300 * 32:
            for expert in range(8):
                likelihood = policy.likelihood((layer, expert))
                said.setdefault(int(likelihood * 10), []).append(likelihood)
                came.setdefault(int(likelihood * 10), []).append(expert in experts)
        policy.use(layer, experts)
    checked = [tenth for tenth in said if len(said[tenth]) > 2000]
    assert len(checked) >= 3
    for tenth in checked:
        assert np.mean(came[tenth]) == pytest.approx(np.mean(said[tenth]), abs=0.03)


def test_estimates_of_layer_lru_and_of_a_profile() -> None:
    lru = LayerLRU(2, 4)
    for experts in ([0, 1], [1], [1]):
        lru.use(1, experts)
    assert [lru.likelihood((1, expert)) for expert in range(3)] == [2 / 5, 2 / 3, 1 / 5]
    assert lru.likelihood((0, 0)) == 1 / 2
    static = StaticHotSet(HeatProfile(bytes(32), np.array([[1, 4], [0, 0]]), np.array([4, 0])))
    assert [static.likelihood((layer, expert)) for layer in range(2) for expert in range(2)] == [0.25, 1.0, 0.0, 0.0]


def test_layer_lru_shares_each_class_of_slots_among_its_layers() -> None:
    kinds = ((0, 0), (1, 1), (0, 1), (0, 0))
    policy = LayerLRU(4, (7, 3), kinds=kinds)
    assert policy._shares == [[3, 0, 2, 2], [0, 2, 1, 0]]


def test_lfru_prefers_what_has_its_chance_sooner() -> None:
    """Equally likely experts of two layers: the one of the layer that comes next stays."""
    policy = LFRU(4, 2)
    for _ in range(4):
        for layer in range(4):
            policy.use(layer, [0])
    policy.insert((2, 0))
    policy.insert((3, 0))
    assert policy.victim(0, lambda _: True) == (3, 0)  # the one visited last waits longest, whoever needs the room
    policy.use(0, [0])
    policy.use(1, [0])
    assert policy.victim(1, lambda _: True) == (3, 0)  # waits two visits, (2, 0) only one
    policy.use(2, [0])
    assert policy.victim(2, lambda _: True) == (2, 0)


def test_lfru_uses_a_cold_expert_and_drops_it() -> None:
    policy = LFRU(1, 6)
    events: list[Event] = [(0, (0, 1, 2))] * 200 + [(0, (5,))]
    cache = run(policy, events, 3, bypass=True)
    assert cache.kept == {(0, 0), (0, 1), (0, 2)}
    assert cache.refused in ([], [(0, 5)])
    policy = LFRU(1, 6)
    cache = run(policy, [*events[:-1], (0, (0, 1, 2, 5)), (0, (0, 1, 2))], 3, bypass=True)
    assert cache.kept == {(0, 0), (0, 1), (0, 2)}


@given(routing=routings(), n_slots=st.integers(1, 12), bypass=st.booleans(), cost=st.floats(1e-3, 1e9))
@settings(max_examples=60, deadline=None)
def test_equal_costs_are_lfru(routing: tuple[int, int, list[Event]], n_slots: int, bypass: bool, cost: float) -> None:
    """Up to the rounding of ties, which a power of two keeps exactly."""
    n_layers, n_experts, events = routing
    cost = 2.0 ** round(np.log2(cost))
    plain = run(LFRU(n_layers, n_experts), events, n_slots, bypass=bypass)
    priced = run(CostAware([cost] * n_layers, n_experts), events, n_slots, bypass=bypass)
    assert (priced.evicted, priced.refused) == (plain.evicted, plain.refused)


def test_unequal_costs_read_fewer_bytes() -> None:
    rng = np.random.default_rng(3)
    sizes = (4000, 1000)
    events: list[Event] = []
    for _ in range(3000):
        for layer in range(2):
            events.append((layer, tuple(rng.choice(8, 2, replace=False, p=np.arange(8, 0, -1) / 36).tolist())))
    plain = simulate(events, LFRU(2, 8), 6, n_layers=2)
    priced = simulate(events, CostAware(sizes, 8), 6, n_layers=2)
    assert priced.missed_bytes(sizes) < 0.97 * plain.missed_bytes(sizes)
    assert priced.hits < plain.hits


@pytest.mark.parametrize("costs", [[0.0, 1.0], [float("nan")], [float("inf")], [-1.0], [[1.0]]])
def test_costs_must_be_positive_numbers(costs: list) -> None:
    with pytest.raises(ConfigError, match="positive finite"):
        CostAware(costs, 4)


@given(routing=routings(), n_slots=st.integers(1, 12), data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_hot_set_stays(routing: tuple[int, int, list[Event]], n_slots: int, data: st.DataObject) -> None:
    """With bypass, the experts kept are always the hottest of those used so far."""
    n_layers, n_experts, events = routing
    heat = np.array(data.draw(st.permutations(range(n_layers * n_experts)))).reshape(n_layers, n_experts)
    cache = CheckedCache(StaticHotSet(HeatProfile(bytes(32), heat, np.full(n_layers, heat.size))), n_slots, bypass=True)
    used: set[tuple[int, int]] = set()
    for layer, experts in events:
        one = tuple(experts)[:1]  # events of one expert, which is never pinned by its neighbours
        cache.event(layer, one)
        used |= {(layer, expert) for expert in one}
        assert cache.kept == set(sorted(used, key=lambda key: -heat[key])[:n_slots])
