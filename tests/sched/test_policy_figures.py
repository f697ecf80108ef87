"""What docs/cache-policies.md promises of the default policy, on the streams, on recorded traces and on chains."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest

from mer.bench.streams.article import article_stream
from mer.bench.streams.chains import N_EXPERTS, N_LAYERS, mixtral_chains
from mer.bench.streams.skewed import skewed_stream
from mer.sched.belady import simulate_belady
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import DEFAULT_POLICY, CacheShape, make_policy
from mer.sched.simulate import Event, simulate
from mer.sched.trace import TraceReader

DATA = Path(__file__).parent.parent / "data"
OTHERS = ("layer-lru", "lfu", "static")


@attrs.frozen(slots=False)
class Routing:
    """Events of a model of L layers with E experts."""

    n_layers: int
    n_experts: int
    events: Sequence[Event]

    @functools.cached_property
    def profile(self) -> HeatProfile:
        """What is used how often, known in hindsight."""
        return HeatProfile.count(bytes(32), self.n_layers, self.n_experts, self.events)

    def hits(self, policy: str, n_slots: int, *, bypass: bool = False) -> float:
        """Return the hits of a policy in percent; without bypass every newcomer is kept, as in the engine."""
        shape = CacheShape(n_layers=self.n_layers, n_experts=self.n_experts, n_slots=n_slots, profile=self.profile)
        fresh = make_policy(policy, shape)
        return 100 * simulate(self.events, fresh, n_slots, n_layers=self.n_layers, bypass=bypass).hit_rate


@functools.cache
def routing(name: str) -> Routing:
    if name == "article":
        return Routing(1, 256, [(0, experts) for experts in article_stream(10_000)])
    if name == "skewed":
        return Routing(1, 256, [(0, experts) for experts in skewed_stream(10_000)])
    if name == "chains":
        return Routing(N_LAYERS, N_EXPERTS, list(mixtral_chains(300)))
    with TraceReader(DATA / name) as reader:
        events: list[Event] = [(event.layer, event.experts) for event in reader]
    return Routing(reader.header.n_layers, reader.header.n_experts, events)


@pytest.mark.slow
@pytest.mark.parametrize("bypass", [False, True])
def test_the_default_has_no_fewer_hits_than_lru_on_the_article_stream(bypass: bool) -> None:
    hits = routing("article").hits(DEFAULT_POLICY, 16, bypass=bypass)
    assert hits >= routing("article").hits("layer-lru", 16)
    assert hits >= 14.72


@pytest.mark.slow
@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize(("n_slots", "least"), [(16, 89.3), (32, 92.2), (64, 94.6)])
def test_the_default_on_the_skewed_stream(n_slots: int, least: float, bypass: bool) -> None:
    assert routing("skewed").hits(DEFAULT_POLICY, n_slots, bypass=bypass) >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n_slots"),
    [
        *(("embedded.trace", n_slots) for n_slots in (8, 12, 24, 36)),
        *(("smollm2.trace", n_slots) for n_slots in (8, 60, 120, 180)),
        *(("chains", n_slots) for n_slots in (8, 64, 125, 192)),
    ],
)
def test_the_default_is_close_to_the_best_of_all(name: str, n_slots: int) -> None:
    """Whoever is best, and although `static` knows in hindsight what is popular; 8 slots are one layer's worth."""
    hits = routing(name).hits(DEFAULT_POLICY, n_slots)
    others = {other: routing(name).hits(other, n_slots) for other in OTHERS}
    bound = simulate_belady(routing(name).events, n_slots, n_layers=routing(name).n_layers)
    assert hits > 3
    assert hits >= max(others.values()) - 1
    assert 100 * bound.hit_rate > max(hits, *others.values())
    if name.endswith(".trace") and 2 * n_slots == routing(name).n_layers * routing(name).n_experts:
        assert hits > others["layer-lru"] + 4


def test_chance_is_no_reason_to_forget_what_was_used_last() -> None:
    """Chains repeat themselves, and their favourites are weak: with two slots a layer, LRU is the best there is."""
    assert routing("chains").hits(DEFAULT_POLICY, 64) > routing("chains").hits("layer-lru", 64) - 0.2
