"""Limits on speculation: a guess must be worth the disk's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import attrs

from mer.sched.keys import ExpertKey
from mer.sched.trial import Trial

PrefetchMode: TypeAlias = Literal["off", "markov", "gate", "auto"]

_WINDOW: Final = 512.0  # prefetches after which the hit record is halved
_FADING: Final = 256.0  # passes without a prefetch in which a bad record fades
_FAITH: Final = 8.0  # useful prefetches that the record begins with, as expected


@attrs.frozen(kw_only=True)
class Candidate:
    """An expert that could be prefetched: neither in memory nor on its way."""

    key: ExpertKey
    probability: float  # that the layer's next visit uses it
    n_bytes: int  # to read
    needed_in_s: float  # until the layer will ask for it


@attrs.frozen(kw_only=True)
class Conditions:
    """What prefetches have to reckon with now."""

    demand_reads: int  # reads under way or queued that something waits for, certain read-ahead included
    queued_bytes: int  # of prefetches under way or queued
    bytes_per_s: float  # measured rate of the disk; 0 while it is unknown
    chunk_bytes: int  # the largest single read, which demand may have to wait for
    victims: Sequence[float]
    """One entry for each slot that prefetches may take now, in the order in which they would be taken: the
    probability that the expert which leaves for it is used at its layer's next visit, 0 for a free slot.
    No longer than slots - resident floor - reserve - prefetches that hold slots."""


@attrs.frozen(kw_only=True)
class GovernorStatistics:
    """A snapshot of a Governor."""

    mode: PrefetchMode
    allowed: bool  # in the running pass
    verdict: bool | None  # of the last trial; None before the first one has ended, and in other modes than auto
    trials: int
    selected: int
    hit_ratio: float  # useful prefetches by expected ones, decayed


class Governor:
    """Chooses among predictions those that are worth reading now. Pure; times are what the owner gives.

    In every mode nothing is chosen while demand has reads to do, or beyond the slots that are to be had.
    `markov` and `gate` leave it at that; their predictions have passed the threshold.

    In `auto` a candidate must also pay. What a right guess hides of a read that takes `read_s` is what gets done
    of it before the layer asks, once the prefetches in front of it are through. A wrong one may keep a demand read
    waiting for one chunk, and what leaves for it must be read again if it is used; for a right one the same would leave
    when the layer asks:

        p * min(read_s, needed_in_s - queue_s)  >  (1 - p) * (chunk_s + victim * read_s)

    where p is the predicted probability times how often such predictions have come true lately, at most once as often
    as expected. And whether all that is worth it is tried out: see `Trial`, whose costs are the times that passes
    take, as the owner reports them. So `auto` costs no more than `off` beyond its trials.
    """

    def __init__(self, mode: PrefetchMode) -> None:
        self.mode: PrefetchMode = mode
        self._trial = Trial()
        self._open: dict[ExpertKey, float] = {}  # {prefetch whose layer has not come yet: expected probability}
        self._expected = self._useful = _FAITH
        self._selected = 0
        self._acted = False

    @property
    def allowed(self) -> bool:
        """Whether `select` can choose anything in the running pass; if not, predictions need not be asked for."""
        return self.mode != "off" and (self.mode != "auto" or self._trial.allowed)

    @property
    def hit_ratio(self) -> float:
        """Useful prefetches by expected ones, decayed."""
        return self._useful / self._expected

    def select(self, candidates: Sequence[Candidate], conditions: Conditions) -> list[ExpertKey]:
        """Return the experts to prefetch now, in that order; every one of them is to be reported to `started` or not.

        Args:
            candidates: likeliest first within each layer, nearer layers first.
            conditions: the state of disk and slots now.
        """
        if not self.allowed or conditions.demand_reads:
            return []
        victims = list(conditions.victims)
        if self.mode != "auto":
            return [candidate.key for candidate in candidates[: len(victims)]]
        if conditions.bytes_per_s <= 0.0:
            return []
        chosen: list[ExpertKey] = []
        queue_s = conditions.queued_bytes / conditions.bytes_per_s
        for candidate in candidates:
            if len(chosen) == len(victims):
                break
            read_s = candidate.n_bytes / conditions.bytes_per_s
            chunk_s = min(conditions.chunk_bytes, candidate.n_bytes) / conditions.bytes_per_s
            p = self._believed(candidate.probability)
            gain_s = p * min(read_s, max(0.0, candidate.needed_in_s - queue_s))
            if gain_s > (1.0 - p) * (chunk_s + victims[len(chosen)] * read_s):
                chosen.append(candidate.key)
                queue_s += read_s
        return chosen

    def _believed(self, probability: float) -> float:
        return probability * min(1.0, self.hit_ratio)

    def started(self, key: ExpertKey, probability: float) -> None:
        """Note that a prefetch has begun, and the probability that was predicted for it."""
        self._open[key] = probability
        self._selected += 1
        self._acted = True

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Note what a layer uses: prefetches for it were useful or not."""
        for key in [key for key in self._open if key[0] == layer]:
            self._expected += self._open.pop(key)
            self._useful += key[1] in experts
        if self._expected > _WINDOW:
            self._expected /= 2.0
            self._useful /= 2.0

    def end_pass(self, took_s: float, lookups: int) -> None:
        """Note the end of a pass through all layers, and decide on the next one.

        Passes that read prompts should not be reported: they do not compare with others.

        Args:
            took_s: time that the pass took, all in all: guessing has its price outside the reads too.
            lookups: experts that its layers asked for, in memory or not; passes are compared by time per lookup.
        """
        if self.mode == "auto" and lookups:
            self._trial.end_pass(took_s / lookups, acted=self._acted)
        if not self._acted:  # a bad record fades while there is nothing to better it
            self._useful += max(0.0, self._expected - self._useful) / _FADING
        self._acted = False

    def statistics(self) -> GovernorStatistics:
        """Return a snapshot."""
        return GovernorStatistics(
            mode=self.mode,
            allowed=self.allowed,
            verdict=self._trial.verdict,
            trials=self._trial.trials,
            selected=self._selected,
            hit_ratio=self.hit_ratio,
        )
