"""Limits on speculation: a guess must be worth the disk's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import attrs

from mer.io.extents import ExpertKey
from mer.sched.trial import Trial

GuessMode: TypeAlias = Literal["markov", "gate", "auto"]

_WINDOW: Final = 512.0  # prefetches after which the hit record is halved
_FADING: Final = 256.0  # passes without a prefetch in which a bad record fades
_FAITH: Final = 8.0  # useful prefetches that the record begins with, as expected


@attrs.frozen(kw_only=True)
class Guess:
    """An expert that could be prefetched now: nothing is being read that a layer waits for."""

    probability: float  # that the layer's next visit uses it
    n_bytes: int  # to read
    needed_in_s: float  # until the layer will ask for it
    victim: float  # probability that the expert which leaves for it is used at its next visit; 0 for a free slot
    bytes_per_s: float  # measured rate of the disk; 0 while it is unknown
    chunk_bytes: int  # the largest single read, which demand may have to wait for


@attrs.frozen(kw_only=True)
class GovernorStatistics:
    """A snapshot of a Governor."""

    mode: GuessMode
    allowed: bool  # in the running pass
    verdict: bool | None  # of the last trial; None before the first one has ended, and in other modes than auto
    trials: int
    selected: int
    hit_ratio: float  # useful prefetches by expected ones, decayed


class Governor:
    """Decides which predictions are worth reading now. Pure; times are what the owner gives.

    In `markov` and `gate` all are: they have passed the threshold of their predictor, and the owner asks only while
    there is room and demand has nothing to read.

    In `auto` a guess must also pay. A right one hides what is done, before the layer asks, of a read that takes
    `read_s`. A wrong one may keep a demand read waiting for one chunk, and the expert that leaves for it must be read
    again if it is used; for a right one the same would leave when the layer asks:

        p * min(read_s, needed_in_s)  >  (1 - p) * (chunk_s + victim * read_s)

    where p is the predicted probability times how often such predictions have come true lately, at most once as often
    as expected. And whether all that is worth it is tried out: see `Trial`, whose costs are the times that passes
    take, as the owner reports them. So `auto` costs no more than `off` beyond its trials.
    """

    def __init__(self, mode: GuessMode) -> None:
        self.mode: GuessMode = mode
        self._trial = Trial()
        self._open: dict[ExpertKey, float] = {}  # {prefetch whose layer has not come yet: expected probability}
        self._expected = self._useful = _FAITH
        self._selected = 0
        self._acted = False

    @property
    def allowed(self) -> bool:
        """Whether `approves` can be true in the running pass; if not, predictions need not be asked for."""
        return self.mode != "auto" or self._trial.allowed

    @property
    def hit_ratio(self) -> float:
        """Useful prefetches by expected ones, decayed."""
        return self._useful / self._expected

    def approves(self, guess: Guess) -> bool:
        """Return whether a guess is worth reading now; if it is then read, that is to be reported to `started`."""
        if self.mode != "auto" or not self.allowed:
            return self.allowed
        if guess.bytes_per_s <= 0.0:
            return False
        read_s = guess.n_bytes / guess.bytes_per_s
        chunk_s = min(guess.chunk_bytes, guess.n_bytes) / guess.bytes_per_s
        p = self._believed(guess.probability)
        gain_s = p * min(read_s, max(0.0, guess.needed_in_s))
        return gain_s > (1.0 - p) * (chunk_s + guess.victim * read_s)

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
