"""The seed's cache and prefetcher: golden figures, a second port of the rules, and the life of a prefetch."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.bench.seed_cache import SeedCache, SeedTotals, simulate_seed
from mer.bench.streams.article import article_stream
from mer.bench.streams.skewed import skewed_stream

Ids = tuple[int, ...]


class PlainPredictor:
    """The rules of prediction once more, over a list of the whole past."""

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.past: list[Ids] = []
        self.order: dict[object, list[int]] = {}  # {context: successors in the order of their first sight}
        self.counts: Counter[tuple[object, int]] = Counter()

    def observe(self, ids: Ids) -> None:
        contexts: list[object] = []
        if self.past:
            contexts += self.past[-1]
        if len(self.past) >= 2:
            contexts += [(a, b) for a in self.past[-2] for b in self.past[-1]]
        for context in contexts:
            for expert in ids:
                seen = self.order.setdefault(context, [])
                if expert not in seen:
                    seen.append(expert)
                self.counts[context, expert] += 1
        self.past.append(ids)

    def estimate(self, context: object, expert: int) -> float:
        total = sum(self.counts[context, other] for other in self.order[context])
        return (self.counts[context, expert] + 1) / (total + self.n_experts)

    def predict(self) -> list[int]:
        last = self.past[-1][-1]
        least = 2 / self.n_experts
        known = self.order.setdefault(last, [])
        candidates = [e for e in known if self.estimate(last, e) >= least]
        candidates.sort(key=lambda e: self.estimate(last, e), reverse=True)  # stable: first seen first
        candidates = candidates[:2]
        unseen = (e for e in range(self.n_experts) if e not in known)
        while len(candidates) < 2 and (expert := next(unseen, None)) is not None:
            candidates.append(expert)
        pair = (self.past[-2][-1], last) if len(self.past) >= 2 else None
        if pair is None or pair not in self.order:
            return candidates

        def mean(expert: int) -> float:
            second = self.estimate(pair, expert) if expert in self.order[pair] else 0.0
            return (self.estimate(last, expert) + second) / 2

        return sorted((e for e in candidates if mean(e) >= least), key=mean, reverse=True)


def plain_run(stream: list[Ids], n_experts: int, n_slots: int) -> SeedTotals:
    """The rules of the cache once more, over a list in order of use."""
    predictor = PlainPredictor(n_experts)
    totals = SeedTotals()
    lru: list[int] = []
    landing: int | None = None
    idle: set[int] = set()  # of the prefetched ones, those that nobody has hit
    for at, ids in enumerate(stream):
        before = list(lru)
        for expert in ids:
            if expert in before:
                lru.remove(expert)
                lru.append(expert)
                totals.hits += 1
                totals.prefetches_used += expert in idle
                idle.discard(expert)
        misses = [e for e in ids if e not in before]
        lru = lru[max(0, len(lru) + len(misses) - n_slots) :]
        for expert in ([] if landing is None else [landing]) + misses:
            if expert in lru:
                lru.remove(expert)
            lru = [*lru, expert][-n_slots:]
            (idle.add if expert == landing and expert not in misses else idle.discard)(expert)
        idle &= set(lru)
        predictor.observe(ids)
        landing = None
        if at < len(stream) - 1:
            landing = next((e for e in predictor.predict() if e not in lru), None)
        totals.prefetches += landing is not None
        totals.lookups += len(ids)
        totals.iterations += 1
    return totals


@pytest.mark.parametrize(
    ("n_iterations", "hits", "prefetches", "reads"), [(500, 158, 155, 997), (10_000, 3098, 6891, 23_793)]
)
def test_golden_figures_of_the_article(n_iterations: int, hits: int, prefetches: int, reads: int) -> None:
    """15.80 and 15.49 % of two lookups per iteration."""
    totals = simulate_seed(article_stream(n_iterations), n_experts=256)
    assert (totals.iterations, totals.lookups, totals.hits) == (n_iterations, 2 * n_iterations, hits)
    assert (totals.prefetches, totals.reads) == (prefetches, reads)
    assert totals.hit_rate == pytest.approx({500: 0.1580, 10_000: 0.1549}[n_iterations], abs=5e-5)


@pytest.mark.parametrize("n_slots", [4, 16])
def test_like_the_plain_rules_on_the_streams(n_slots: int) -> None:
    for stream in (list(article_stream(1500)), list(skewed_stream(1500))):
        assert simulate_seed(stream, n_experts=256, n_slots=n_slots) == plain_run(stream, 256, n_slots)


@given(
    n_experts=st.integers(2, 9),
    n_slots=st.integers(1, 6),
    draws=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=40),
)
@settings(max_examples=300, deadline=None)
def test_like_the_plain_rules_on_any_stream(n_experts: int, n_slots: int, draws: list[tuple[int, int]]) -> None:
    stream: list[Ids] = []
    for a, b in draws:
        first = a % n_experts
        stream.append((first, (first + 1 + b % (n_experts - 1)) % n_experts))
    assert simulate_seed(stream, n_experts=n_experts, n_slots=n_slots) == plain_run(stream, n_experts, n_slots)


def test_a_prefetch_takes_a_place_between_eviction_and_the_misses() -> None:
    cache = SeedCache(8, n_slots=2)
    assert cache.step((0, 1)).evicted == ()
    step = cache.step((2, 3))
    assert (step.hits, step.misses, step.evicted) == ((), (2, 3), (0, 1))
    assert [expert for expert in range(8) if expert in cache] == [2, 3]  # what was prefetched has been pushed out again
    assert cache.totals.prefetches_used == 0


def test_a_demand_read_of_an_expert_on_its_way_is_a_second_read() -> None:
    cache = SeedCache(8, n_slots=8)
    prefetched = cache.step((6, 7)).prefetch
    assert prefetched == 0  # never seen after 7, and the first of those
    step = cache.step((0, 7))
    assert (step.hits, step.misses) == ((7,), (0,))
    assert cache.totals.reads == 2 + 1 + 1 + (step.prefetch is not None)
    assert cache.step((0, 7)).hits == (0, 7)
    assert cache.totals.prefetches_used == 0


def test_a_prefetch_that_is_hit_is_used_once() -> None:
    cache = SeedCache(8, n_slots=8)
    assert cache.step((6, 7)).prefetch == 0
    cache.step((5, 6))
    assert 0 in cache
    assert cache.totals.prefetches_used == 0
    cache.step((0, 6))
    cache.step((0, 6))
    assert cache.totals.prefetches_used == 1


def test_nothing_is_prefetched_after_the_last_iteration() -> None:
    cache = SeedCache(8)
    assert cache.step((0, 1), last=True).prefetch is None
    assert SeedTotals().hit_rate == 0.0
