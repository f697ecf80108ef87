"""Frequency and recency weighed by how well they have predicted use so far, per layer, with admission."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks
from mer.sched.policies.ranking import FloatArray, Ranking

SPANS: Final = (1, 8, 64, 512, 4096)
"""Visits of its layer over which a use of an expert is remembered, from recency alone to frequency alone."""

LESSON_VISITS: Final = 4  # of a layer: the weights are learnt from the last of so many visits
_LESSONS_PER_FIT = 8
_FORGETTING = 0.994  # per fit, of what the weights were learnt from
_SWEEPS = 4  # of coordinate descent, from the weights of the fit before


class LFRU:
    """Least frequently and recently used, with admission: keeps what is most likely to be used, and soon.

    The likelihood of an expert is a weighted sum of averages of its past uses over `SPANS` visits of its layer (while
    a layer has been visited less often than a span, plain averages), and of the average over all experts of its layer.
    The weights are those, none negative, that would have predicted the uses seen so far with the least squared error;
    they are learnt from all layers together, so that routing that repeats itself is kept as LRU does and routing that
    has favourites as LFU does. The average over all experts says nothing of any single one, but takes the weight of
    what cannot be told from chance, and leaves the others' in proportion to what they foretell.

    An expert is worth its likelihood at its layer's next visit, divided by how many layers' visits it has to wait for
    that: an expert that waits long would mostly be evicted before by newcomers of the layers between. So
    a layer takes slots from those visited just before it rather than from those that come next, and one whose routing
    can be foretold better than that of its neighbours gets more of them.

    A newcomer that is worth no more than all that could be evicted for it is not kept. So the cycle of the layers never
    flushes the cache, whatever its size.

    Args:
        n_layers: L.
        n_experts: of a layer, E.
        kinds: [L, E], the class of slots that each expert fits; by default all fit the same.
        costs: of a miss, by layer, [L]; by default all alike. What an expert is worth is multiplied by them.
    """

    name = "lfru"

    def __init__(
        self, n_layers: int, n_experts: int, *, kinds: npt.ArrayLike | None = None, costs: FloatArray | None = None
    ) -> None:
        n_spans = len(SPANS)
        # [L, E, spans + 1], of uses, 0 or 1 per visit; last, over all experts of the layer and the longest span
        self._averages = np.zeros((n_layers, n_experts, n_spans + 1))
        self._likelihoods = np.zeros((n_layers, n_experts))  # [L, E], at the next visit of their layers
        self._ranking = Ranking(self._likelihoods, kinds=kinds, weights=costs, impatient=True)
        self._visits = [0] * n_layers
        self._set_rates(1)
        self._lessons = 0
        self._weights = np.append(np.full(n_spans, 1.0 / n_spans), 0.0)
        # Normal equations of the fit; one observation of the first weights keeps them solvable.
        self._products = np.eye(n_spans + 1)
        self._targets = self._weights.copy()

    @property
    def ranks(self) -> Ranks:
        """See `Policy`."""
        return self._ranking.ranks

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        averages, used, visits = self._averages[layer], np.array(experts), self._visits[layer]
        if visits and (visits + layer) % LESSON_VISITS == 0:
            self._learn(averages, used)
        self._visits[layer] = visits = visits + 1
        if self._rates_of != min(visits, SPANS[-1]):  # else they are those of the layer before
            self._set_rates(visits)
        averages *= self._kept
        averages[used, :-1] += self._gained
        averages[:, -1] += self._gained_by_all * len(used) / len(averages)
        np.matmul(averages, self._weights, out=self._likelihoods[layer])
        self._ranking.visited(layer)

    def _set_rates(self, visits: int) -> None:
        """Set what a visit leaves of the averages and adds to them, at the visit of a layer with this number."""
        self._rates_of = min(visits, SPANS[-1])
        rates = np.maximum(1.0 / np.array((*SPANS, SPANS[-1])), 1.0 / visits)
        self._kept, self._gained, self._gained_by_all = 1.0 - rates, rates[:-1], float(rates[-1])

    def _learn(self, averages: FloatArray, used: npt.NDArray[np.int64]) -> None:
        """Add what the averages of a layer, [E, spans + 1], said about this event, and fit the weights now and then."""
        self._products += averages.T @ averages
        self._targets += averages[used].sum(axis=0)
        self._lessons += 1
        if self._lessons % _LESSONS_PER_FIT == 0:
            self._fit()

    def _fit(self) -> None:
        """Move the weights towards least squared error."""
        targets, weights = self._targets.tolist(), self._weights.tolist()
        products = self._products.tolist()
        for _ in range(_SWEEPS):
            for i, row in enumerate(products):
                error = targets[i] - sum(product * weight for product, weight in zip(row, weights, strict=True))
                weights[i] = max(0.0, weights[i] + error / row[i])
        self._weights[:] = weights
        self._products *= _FORGETTING
        self._targets *= _FORGETTING

    def likelihood(self, key: ExpertKey) -> float:
        """See `Policy`."""
        return min(1.0, float(self._likelihoods[key]))

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.insert(key)

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.remove(key)

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        """See `Policy`."""
        lowest = self._ranking.lowest(evictable, kind)
        if lowest is None or newcomer is None:
            return lowest
        kept = self._ranking.worth((layer, newcomer)) > self._ranking.worth(lowest)
        return lowest if kept else (layer, newcomer)
