"""One flat LRU with a Markov prefetcher: the cache of the streaming benchmark that `mer` compares itself with."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Final

import attrs

N_SLOTS: Final = 16
FANOUT: Final = 2


@attrs.frozen
class SeedStep:
    """What one iteration does."""

    hits: tuple[int, ...]
    misses: tuple[int, ...]  # read now, whole
    evicted: tuple[int, ...]  # before the reads, to make room for the misses
    prefetch: int | None  # read after the iteration, or None


@attrs.define
class SeedTotals:
    """Counts of a run; every miss and every prefetch is a read."""

    iterations: int = 0
    lookups: int = 0
    hits: int = 0
    prefetches: int = 0
    prefetches_used: int = 0  # that were hit before they were evicted

    @property
    def reads(self) -> int:
        """Experts read."""
        return self.lookups - self.hits + self.prefetches

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0


class SeedPredictor:
    """Markov chains of first and second order over the sets of a flat stream.

    A row counts every pair of a previous and a current id; a row of the second order, every triple over the last three
    iterations. The estimate of an id with `count` of a row's `total` is (count + 1) / (total + N).
    """

    def __init__(self, n_experts: int) -> None:
        self._n_experts = n_experts
        self._threshold = 2 / n_experts
        self._first: defaultdict[int, dict[int, int]] = defaultdict(dict)  # {id: {successor: count}}
        self._second: defaultdict[tuple[int, int], dict[int, int]] = defaultdict(dict)
        self._previous: list[tuple[int, ...]] = []  # the last two iterations, the latest last

    def observe(self, ids: tuple[int, ...]) -> None:
        """Count an iteration."""
        if self._previous:
            for before in self._previous[-1]:
                _count(self._first[before], ids)
        if len(self._previous) == 2:
            for earlier in self._previous[0]:
                for before in self._previous[1]:
                    _count(self._second[earlier, before], ids)
        self._previous = [*self._previous[-1:], ids]

    def predict(self) -> list[int]:
        """Return up to `FANOUT` candidates for the next iteration, the likeliest first.

        The first order proposes: ids at or above twice the uniform probability, of equal ones that first counted; too
        few are filled up with ids never seen after the context, in ascending order, whatever their estimate. Where
        the second order knows its context, a candidate's estimate becomes the mean of both, one that it has never
        counted being 0, and ids below the threshold fall out, the filled up ones too.
        """
        last = self._previous[-1][-1]
        estimates = self._propose(self._first.get(last, {}))
        second = self._second.get((self._previous[0][-1], last)) if len(self._previous) == 2 else None
        if second is not None:
            estimates = self._refine(estimates, second)
        return list(estimates)

    def _propose(self, row: dict[int, int]) -> dict[int, float]:
        """Return {candidate: estimate} of the first order."""
        total = sum(row.values()) + self._n_experts
        seen = {expert: (count + 1) / total for expert, count in row.items() if (count + 1) / total >= self._threshold}
        estimates = _best(seen)
        for expert in range(self._n_experts):
            if len(estimates) >= FANOUT:
                break
            if expert not in row:
                estimates[expert] = 1 / total
        return estimates

    def _refine(self, estimates: dict[int, float], row: dict[int, int]) -> dict[int, float]:
        """Return the candidates that both orders together leave."""
        total = sum(row.values()) + self._n_experts
        means = {
            expert: (estimate + ((row[expert] + 1) / total if expert in row else 0.0)) / 2
            for expert, estimate in estimates.items()
        }
        return _best({expert: mean for expert, mean in means.items() if mean >= self._threshold})


def _count(row: dict[int, int], ids: Iterable[int]) -> None:
    for expert in ids:
        row[expert] = row.get(expert, 0) + 1


def _best(estimates: dict[int, float]) -> dict[int, float]:
    """Return the `FANOUT` highest estimates, the highest first; of equal ones, the first."""
    ranked = sorted(estimates.items(), key=lambda item: -item[1])
    return dict(ranked[:FANOUT])


class SeedCache:
    """The cache and its one prefetch permit.

    A prefetch issued after an iteration lands within the next one: after its misses have evicted and before they are
    inserted. A demand read of the same expert does not join it.
    """

    def __init__(self, n_experts: int, n_slots: int = N_SLOTS) -> None:
        self._n_slots = n_slots
        self._lru: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._predictor = SeedPredictor(n_experts)
        self._landing: int | None = None
        self._unproven: set[int] = set()  # brought by a prefetch and not yet hit; perhaps evicted since
        self.totals = SeedTotals()

    def __contains__(self, expert: int) -> bool:
        return expert in self._lru

    def step(self, ids: tuple[int, ...], *, last: bool = False) -> SeedStep:
        """Run one iteration; nothing is prefetched after the last one."""
        lru = self._lru
        misses = tuple(expert for expert in ids if expert not in lru)
        hits = tuple(expert for expert in ids if expert in lru)
        for expert in hits:
            lru.move_to_end(expert)
        self.totals.prefetches_used += len(self._unproven.intersection(hits))
        self._unproven.difference_update(hits)
        evicted = []
        while lru and len(lru) + len(misses) > self._n_slots:
            evicted.append(lru.popitem(last=False)[0])
        if self._landing is not None:
            self._insert(self._landing)
            self._unproven.add(self._landing)
        for expert in misses:
            self._insert(expert)
        self._unproven.difference_update(misses)  # read twice: the prefetch has brought nothing
        self._predictor.observe(ids)
        self._landing = None if last else next((e for e in self._predictor.predict() if e not in lru), None)
        self.totals.iterations += 1
        self.totals.lookups += len(ids)
        self.totals.hits += len(hits)
        self.totals.prefetches += self._landing is not None
        return SeedStep(hits, misses, tuple(evicted), self._landing)

    def _insert(self, expert: int) -> None:
        if expert not in self._lru and len(self._lru) >= self._n_slots:
            self._lru.popitem(last=False)
        self._lru[expert] = None
        self._lru.move_to_end(expert)


def simulate_seed(iterations: Iterable[tuple[int, ...]], *, n_experts: int, n_slots: int = N_SLOTS) -> SeedTotals:
    """Run a whole stream through a fresh cache, without reading anything."""
    cache = SeedCache(n_experts, n_slots)
    sets = list(iterations)
    for at, ids in enumerate(sets):
        cache.step(ids, last=at == len(sets) - 1)
    return cache.totals
