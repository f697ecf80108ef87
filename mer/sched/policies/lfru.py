"""Frequency and recency weighed by how well they have predicted use so far, per layer, with admission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mer.sched.keys import ExpertKey
from mer.sched.policies.ranking import Ranking

SPANS: Final = (1, 8, 64, 512, 4096)
"""Visits of its layer over which a use of an expert is remembered, from recency alone to frequency alone."""

_FORGETTING = 0.9998  # per event, of what the weights were learnt from
_EVENTS_PER_FIT = 16
_SWEEPS = 4  # of coordinate descent, from the weights of the fit before


class LFRU:
    """Least frequently and recently used, with admission: keeps what is most likely to be used, and soon.

    The likelihood of an expert is a weighted sum of averages of its past uses over `SPANS` visits of its layer (while
    a layer has been visited less often than a span, plain averages). The weights are those, none negative, that would
    have predicted the uses seen so far with the least squared error; they are learnt from all layers together, so that
    routing that repeats itself is kept as LRU does and routing that has favourites as LFU does.

    An expert is worth its likelihood at its layer's next visit, divided by how many layers' visits it has to wait for
    that: what has to wait long for its chance would mostly be pushed out before by newcomers of the layers between. So
    a layer takes slots from those visited just before it rather than from those that come next, and one whose routing
    can be foretold better than that of its neighbours gets more of them.

    A newcomer that is worth no more than all that could leave for it is not kept. So the cycle of the layers never
    flushes the cache, whatever its size.
    """

    name = "lfru"

    def __init__(self, n_layers: int, n_experts: int) -> None:
        n_spans = len(SPANS)
        self._ranking = Ranking(n_layers, n_experts)
        self._averages = np.zeros((n_layers, n_spans, n_experts))  # [L, spans, E], of uses: 0 or 1 per visit
        self._values = np.zeros((n_layers, n_experts))  # [L, E], at the next visit of their layers
        self._waits = np.arange(1.0, n_layers + 1)[:, None]  # visits until that of each next layer
        self._rates = 1.0 / np.array(SPANS)[:, None]
        self._visits = [0] * n_layers
        self._events = 0
        self._weights = np.full(n_spans, 1.0 / n_spans)
        # Normal equations of the fit; one observation of the first weights keeps them solvable.
        self._products = np.eye(n_spans)
        self._targets = self._weights.copy()

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        averages, used = self._averages[layer], list(experts)
        if self._visits[layer]:
            self._learn(layer, used)
        self._visits[layer] += 1
        rates = np.maximum(self._rates, 1.0 / self._visits[layer])
        averages *= 1.0 - rates
        averages[:, used] += rates
        self._values[layer] = self._value(layer, self._weights @ averages)

    def _learn(self, layer: int, used: list[int]) -> None:
        """Add what the averages of a layer said about this event, and fit the weights from time to time."""
        averages = self._averages[layer]
        self._products *= _FORGETTING
        self._products += averages @ averages.T
        self._targets *= _FORGETTING
        self._targets += averages[:, used].sum(axis=1)
        self._events += 1
        if self._events % _EVENTS_PER_FIT == 0:
            for _ in range(_SWEEPS):
                for i, row in enumerate(self._products):
                    step = (self._targets[i] - row @ self._weights) / row[i]
                    self._weights[i] = max(0.0, self._weights[i] + step)

    def _value(self, layer: int, likelihoods: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return what the experts of a layer are worth, [E], from the likelihoods of their next use."""
        return likelihoods

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.insert(key)

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.remove(key)

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        """See `Policy`."""
        values = self._values / np.roll(self._waits, layer + 1, axis=0)
        lowest = self._ranking.lowest(values, layer, evictable)
        if lowest is None or newcomer is None or values[layer, newcomer] > values[lowest]:
            return lowest
        return layer, newcomer
