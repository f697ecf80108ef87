"""Markov chains of first and second order over the layers, weighed against what was used recently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from mer.sched.predict import MIN_VISITS, Prediction, bar, distance, passing
from mer.sched.predictors.regression import OnlineRegression
from mer.sched.predictors.successors import SuccessorTable, Visit

SPANS: Final = (1, 8, 64)
"""Visits of its layer over which a recent use of an expert is remembered."""
N_FEATURES: Final = len(SPANS) + 2
FIRST_BYTES: Final = 64 << 20
"""Bound of the first-order counts; 2 * L * E * (E + 1) bytes where that is less."""
SECOND_BYTES: Final = 16 << 20
"""Bound of the second-order counts; 2 * L * E**2 * (E + 1) bytes where that is less."""
_LONG: Final = 4096  # visits over which the base rate is averaged
_USUAL_PAIRS: Final = 16  # of a token; of more, those whose numbers add up to a multiple of K * K // 16
_MAX_PAIRS: Final = 64  # of an event; those of larger ones are not followed
_EAGER: Final = 64  # visits of a layer from which on the weights learn from every second one, or fourth if not asked
_SIZE_SPAN: Final = 64  # events over which the usual size is averaged
_MAX_SCALE: Final = 32.0
_MAX_USUAL: Final = 2.0  # scale of events that successors and weights are learnt from
_FULL: Final = 0.99  # share of a layer's experts from which on all of them are used all the time
_RATES: Final = tuple(1.0 / span for span in (*SPANS, _LONG))

Integers = npt.NDArray[np.int64]
Vector = npt.NDArray[np.float32]


@attrs.define(eq=False)
class _Known:
    """Estimates of a layer's next visit."""

    sample: Vector  # [F + 1, E]: by how much each feature raises the probabilities; the last row is for the truth
    n_missing: int  # features, the last ones, that are not known: second order, or both
    visit: Visit | None  # where to count the successors, if the contexts are certain
    probabilities: Vector | None = None  # [E], for batches of average size


class MarkovPredictor:
    """Predicts a layer from the experts that the one or two layers before it have just used.

    The probability of an expert is its base rate plus a weighted sum of by how much each of these raises it: its
    frequency over the layer's last 1, 8 and 64 visits; the experts of the layer before (first order); the pairs of one
    expert each of the two layers before (second order). What a context raises is its smoothed frequency of successors
    less the base rate, see `SuccessorTable.lift`: a pair that was never seen adds nothing, and what is left is first
    order; an expert that was never seen adds nothing, and what is left is the recent past. The weights are learnt for
    each layer. They take back what several contexts say alike, and noise altogether.

    Two layers ahead and further, the experts of the layer before are not known, only their probabilities, and
    the first order is summed over the likeliest of these.

    A layer that serves a larger batch uses more experts. Probabilities are for batches like that of the event before:
    p becomes 1 - (1 - p)**r, with the r that makes the average rate of that event's layer its size. What a context
    adds then counts 1 / r, as it speaks for one of r such parts of the batch. Successors and weights are learnt from
    batches with an r up to 2, the averages from all.

    Args:
        n_layers: L.
        n_experts: E, of a layer.
        top_k: experts that a token uses.
        first_bytes: bound of the first-order counts.
        second_bytes: bound of the second-order counts.
    """

    name = "markov"

    def __init__(
        self,
        n_layers: int,
        n_experts: int,
        top_k: int,
        *,
        first_bytes: int = FIRST_BYTES,
        second_bytes: int = SECOND_BYTES,
    ) -> None:
        self.n_layers, self.n_experts, self.top_k = n_layers, n_experts, top_k
        n_first = n_layers * n_experts
        self.table = SuccessorTable(n_experts, (n_first, n_first * n_experts), (first_bytes, second_bytes))
        self.visits = [0] * n_layers
        self.uses = [[0] * n_experts for _ in range(n_layers)]  # [L][E]
        share = top_k / n_experts
        # of uses, [L, spans, E]; the last is the base rate
        self.averages = np.full((n_layers, len(SPANS) + 1, n_experts), share, dtype=np.float32)
        self.shares = [share] * n_layers  # means of the base rates
        self.sizes = [float(top_k)] * n_layers  # usual number of experts of an event
        self.regressions = [OnlineRegression(N_FEATURES) for _ in range(n_layers)]
        self._stride = max(1, top_k * top_k // _USUAL_PAIRS)
        self._rates = np.empty((len(_RATES), 1), dtype=np.float32)
        self._largest = max(top_k, n_experts // 2)  # events that use more say little of what belongs together
        self._last: int | None = None  # layer of the last event
        self._before: list[Sequence[int] | None] = [None, None]  # experts of the last two events, the last one first
        self._known: dict[int, _Known] = {}  # {layer: what can be said of its next visit}
        self._scale = 1.0

    @property
    def n_bytes(self) -> int:
        """Memory of the counts and averages."""
        return self.table.n_bytes + self.averages.nbytes

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """See `Predictor`."""
        used = np.array(experts, dtype=np.int64)
        if self._last is None or layer != (self._last + 1) % self.n_layers:
            self._last, self._before = None, [None, None]
            self._known.clear()
        successors = np.zeros(self.n_experts + 1, dtype=np.uint16)
        successors[used] = successors[-1] = 1
        was_used = successors[:-1]
        known = self._known.get(layer)
        visits = self.visits[layer]
        if known is None and (visits < _EAGER or visits % 4 == 0):
            known = self._know(layer)
        scale = self._scale_of(layer, len(used))
        usual = scale <= _MAX_USUAL
        if known is not None and usual and not known.n_missing and (visits % 2 == 0 or visits < _EAGER):
            np.subtract(was_used, self.averages[layer, -1], out=known.sample[-1])
            self.regressions[layer].learn(known.sample)
        if usual and len(used) <= self._largest:
            visit = self._look_up(layer)[0] if known is None else known.visit
            if visit is not None:
                self.table.add(visit, successors)
        self._average(layer, len(used), was_used)
        uses = self.uses[layer]
        for expert in experts:
            uses[expert] += 1
        self._scale = scale
        self._before = [tuple(experts) if len(experts) <= self._largest else None, self._before[0]]
        self._last = layer
        self._known.clear()

    def predict(self, layer: int) -> list[Prediction]:
        """See `Predictor`."""
        if not distance(layer, self._last, self.n_layers) or self.visits[layer] < MIN_VISITS:
            return []
        probabilities = self._probabilities(layer)
        share = self.shares[layer]
        if self._scale != 1.0:
            probabilities = 1.0 - (1.0 - probabilities) ** self._scale
            share = 1.0 - (1.0 - share) ** self._scale
        return passing(layer, probabilities, bar(share, self.visits[layer]), self.uses[layer])

    def _know(self, layer: int) -> _Known:
        """Return by how much what is known raises the probabilities of a layer."""
        known = self._known.get(layer)
        if known is not None:
            return known
        averages = self.averages[layer]
        base = averages[-1]
        sample = np.empty((N_FEATURES + 1, self.n_experts), dtype=np.float32)
        np.subtract(averages[:-1], base, out=sample[: len(SPANS)])
        visit, n_missing, weights = self._look_up(layer)
        if visit is not None:
            lift = self.table.lift(visit, base, weights)
            if weights is None:
                lift /= max(1.0, self._scale)
            sample[len(SPANS) : -1 - n_missing] = lift
        known = self._known[layer] = _Known(sample, n_missing, visit if weights is None else None)
        return known

    def _look_up(self, layer: int) -> tuple[Visit | None, int, Vector | None]:
        """Return the contexts of a layer's next visit, how many features are missing, and how likely the former are."""
        first, weights = self._contexts(layer)
        if first is None:
            return None, 2, None
        pairs = None if weights is not None else self._pairs(layer)
        contexts = np.array(first if pairs is None else first + pairs, dtype=np.int64)
        return self.table.look_up(contexts, len(first)), 1 if pairs is None else 0, weights

    def _contexts(self, layer: int) -> tuple[list[int] | None, Vector | None]:
        """Return the first-order contexts of a layer, and their probabilities where they are not certain."""
        start = layer * self.n_experts
        if self._last is None or layer == (self._last + 1) % self.n_layers:
            before = self._before[0]
            return (None if before is None else [start + expert for expert in before]), None
        likely = self._probabilities(layer - 1 if layer else self.n_layers - 1)
        n = min(2 * self.top_k, self.n_experts)
        chosen = likely.argpartition(self.n_experts - n)[self.n_experts - n :]
        return (chosen + start).tolist(), likely[chosen]

    def _pairs(self, layer: int) -> list[int] | None:
        """Return the second-order contexts of the layer that comes next, or None where there are none or too many."""
        before, earlier = self._before
        if before is None or earlier is None or len(before) * len(earlier) > _MAX_PAIRS * self._stride:
            return None
        n, stride = self.n_experts, self._stride
        start = self.table.n_contexts[0] + layer * n * n
        if stride == 1:
            return [start + a * n + b for a in earlier for b in before]
        return [start + a * n + b for a in earlier for b in before if (a + b) % stride == 0] or None

    def _probabilities(self, layer: int) -> Vector:
        """Return the probabilities of a layer's experts at its next visit, [E], for batches of average size."""
        known = self._know(layer)
        if known.probabilities is None:
            weights = self.regressions[layer].weights(known.n_missing)
            sums = weights.dot(known.sample[: len(weights)])
            sums += self.averages[layer, -1]
            known.probabilities = np.minimum(np.maximum(sums, 0.0, out=sums), 1.0, out=sums)
        return known.probabilities

    def _average(self, layer: int, size: int, was_used: npt.NDArray[np.uint16]) -> None:
        """Let an event into the averages; one that is larger than usual, such as a prompt's, weighs less."""
        self.visits[layer] += 1
        usual = self.sizes[layer]
        weight = min(1.0, usual / size) if size else 1.0
        self.sizes[layer] += weight * (size - usual) / _SIZE_SPAN
        least = 1.0 / (self.visits[layer] + 1)
        for i, rate in enumerate(_RATES):
            self._rates[i, 0] = last_rate = weight * max(rate, least)
        averages = self.averages[layer]
        change = was_used - averages
        change *= self._rates
        averages += change
        self.shares[layer] += last_rate * (size / self.n_experts - self.shares[layer])

    def _scale_of(self, layer: int, size: int) -> float:
        """Return the exponent that turns average probabilities of not being used into those at this size of events."""
        share = self.shares[layer]
        if size >= self.n_experts or share >= 1.0:
            return 1.0 if share > _FULL else _MAX_SCALE
        scale = math.log1p(-size / self.n_experts) / math.log1p(-share)
        return 1.0 if abs(scale - 1.0) < 0.1 else min(_MAX_SCALE, scale)
