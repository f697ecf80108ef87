"""Prefetcher: reads likely experts of the next layer while no layer waits for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.io.extents import ExpertKey
from mer.sched.governor import Governor, GovernorStatistics, Guess, GuessMode
from mer.sched.predict import Prediction, Predictor
from mer.sched.predictors.best import BestPredictor, PredictionScore
from mer.sched.predictors.gate import GatePredictor
from mer.sched.predictors.markov import MarkovPredictor

_GUESSES_AT_ONCE: Final = 4  # some are read, and some are ready to be read next
_PASSES_PER_LESSON: Final = 4  # while nothing is guessed: what is learnt then is for later, and takes time now
_SMOOTHING: Final = 1 / 32  # of the time between a layer's last read and the next layer's first


@attrs.frozen(kw_only=True)
class PrefetchStatistics:
    """A snapshot of a Prefetcher."""

    governor: GovernorStatistics
    predictors: dict[str, PredictionScore]  # how good the predictions were, whether or not they were acted on


@attrs.frozen(kw_only=True)
class DiskFacts:
    """Facts that the cost of a guess depends on."""

    expert_bytes: Callable[[ExpertKey], int]
    bytes_per_s: Callable[[], float]  # measured rate while something is read; 0 while it is unknown
    chunk_bytes: int  # the largest single read


class GuessReader(Protocol):
    """Reader of guesses."""

    @property
    def guessing(self) -> int:
        """Number of experts that are being read ahead or on a guess."""

    def price(self, key: ExpertKey) -> float | None:
        """Return the probability that the evicted expert would be used; None without need or room for the new one."""

    def prefetch(self, key: ExpertKey, probability: float) -> bool:
        """Start reading an expert; return whether it was done."""


class Prefetcher:
    """Turns predictions for the next layer into reads.

    A guess is read only while no layer waits for a read, a few at a time, and only into a slot that is free or
    whose expert is less likely to be used than the guess. When the next layer asks, what it needs becomes demand and
    the rest is given up. Synchronous; used by the scheduler's task and by the callbacks of `Speculation`.

    Args:
        mode: which predictions, and whether they must pay.
        disk: what a guess costs.
        n_layers: L.
        n_experts: E, of a layer.
        top_k: experts that a token uses.
        markov: goes on learning, where the mode has use for one; by default a new one.
    """

    def __init__(
        self,
        mode: GuessMode,
        disk: DiskFacts,
        *,
        n_layers: int,
        n_experts: int,
        top_k: int,
        markov: MarkovPredictor | None = None,
    ) -> None:
        self._disk, self._n_layers = disk, n_layers
        self.governor = Governor(mode)
        self.markov = None if mode == "gate" else markov or MarkovPredictor(n_layers, n_experts, top_k)
        self._gate = None if mode == "markov" else GatePredictor(n_layers, n_experts, top_k)
        chosen: list[Predictor] = [predictor for predictor in (self.markov, self._gate) if predictor is not None]
        self._predictor = BestPredictor(chosen, n_layers)
        self._guesses: deque[Prediction] = deque()
        self._bytes_per_s = 0.0
        self._lookups = 0  # of the running pass
        self._passes = 0
        self._learns = True  # from the running pass
        self._began_s = 0.0  # when the pass began
        self._idle_since_s: float | None = None
        self._idle_s = 0.0  # usual time from there to the next layer's claims

    @property
    def asks_gate(self) -> bool:
        """Whether `routed` can use what the next layer's router says in advance."""
        return self._gate is not None and self.governor.allowed

    def routed(
        self, layer: int, experts: Sequence[int], predicted_ids: npt.NDArray[np.int32] | None, *, guess: bool
    ) -> None:
        """Note what a layer uses, and guess what the next one will; to be called when the layer's experts are claimed.

        `idle` follows, if nothing is being read that the layer waits for.

        Args:
            layer: the one that runs.
            experts: its union over the batch.
            predicted_ids: [T, K], what the next layer's router says in advance.
            guess: false where there is no need to, because the next layer is read ahead.
        """
        if self._idle_since_s is not None:
            self._idle_s += _SMOOTHING * (trio.current_time() - self._idle_since_s - self._idle_s)
        self.passed(layer, experts)
        target = (layer + 1) % self._n_layers
        if self._gate is not None and predicted_ids is not None:
            self._gate.offer(target, predicted_ids)
        self._guesses.clear()
        if guess and self.governor.allowed:
            self._guesses.extend(self._predictor.predict(target))

    def passed(self, layer: int, experts: Sequence[int]) -> None:
        """Note the experts of a layer that a job has passed without a guess."""
        self._idle_since_s = None
        self._lookups += len(experts)
        self.governor.observe(layer, experts)
        if self._learns:
            self._predictor.observe(layer, experts)

    def begin_pass(self) -> None:
        """Note the beginning of a pass through the layers."""
        self._began_s, self._lookups = trio.current_time(), 0
        self._passes += 1
        self._learns = self.governor.allowed or self._passes % _PASSES_PER_LESSON == 0

    def end_pass(self, *, comparable: bool) -> None:
        """Note the end of a pass through the layers; one that computes prompts compares with no other."""
        if comparable:
            self.governor.end_pass(trio.current_time() - self._began_s, self._lookups)
        self._bytes_per_s = self._disk.bytes_per_s()

    def stop(self) -> None:
        """Guess nothing more: no layer is to come for now."""
        self._guesses.clear()
        self._idle_since_s = None

    def idle(self, reader: GuessReader) -> None:
        """Read the next guesses that are worth it, as no layer waits for a read."""
        if self._idle_since_s is None:
            self._idle_since_s = trio.current_time()
        needed_in_s = self._idle_s - (trio.current_time() - self._idle_since_s)
        while self._guesses and reader.guessing < _GUESSES_AT_ONCE:
            key, probability = self._guesses.popleft()
            victim = reader.price(key)
            if victim is None:
                continue
            guess = Guess(
                probability=probability,
                n_bytes=self._disk.expert_bytes(key),
                needed_in_s=needed_in_s,
                victim=victim,
                bytes_per_s=self._bytes_per_s,
                chunk_bytes=self._disk.chunk_bytes,
            )
            if self.governor.approves(guess) and reader.prefetch(key, probability):
                self.governor.started(key, probability)

    def statistics(self) -> PrefetchStatistics:
        """Return a snapshot."""
        return PrefetchStatistics(
            governor=self.governor.statistics(),
            predictors={scored.name: scored.score() for scored in self._predictor.predictors},
        )
