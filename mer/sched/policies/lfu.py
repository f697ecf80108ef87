"""Least frequently used, with decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mer.errors import ConfigError
from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks
from mer.sched.policies.ranking import Ranking


class LFU:
    """Least frequently used: uses are counted, and every count halves in `half_life` visits of its layer.

    Counts are compared over all layers, which are visited equally often. Every newcomer is kept.

    Args:
        n_layers: L.
        n_experts: of a layer, E.
        half_life: in visits of a layer.
        kinds: [L, E], the class of slots that each expert fits; by default all fit the same.

    Raises:
        ConfigError: the half-life is not above 0.
    """

    name = "lfu"

    def __init__(
        self, n_layers: int, n_experts: int, *, half_life: float = 512.0, kinds: npt.ArrayLike | None = None
    ) -> None:
        if not half_life > 0:
            raise ConfigError(f"the half-life of counts must be above 0 visits, not {half_life}")
        self._counts = np.zeros((n_layers, n_experts))  # [L, E]
        self._visits = np.zeros(n_layers)  # decayed as the counts are
        self._ranking = Ranking(self._counts, kinds=kinds)
        self._decay = 0.5 ** (1 / half_life)

    @property
    def ranks(self) -> Ranks:
        """See `Policy`."""
        return self._ranking.ranks

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        counts = self._counts[layer]
        counts *= self._decay
        counts[list(experts)] += 1.0
        self._visits[layer] = self._visits[layer] * self._decay + 1.0
        self._ranking.visited(layer)

    def likelihood(self, key: ExpertKey) -> float:
        """See `Policy`: the share of the layer's visits that used it, with the decay of the counts."""
        return float(self._counts[key] / max(1.0, self._visits[key[0]]))

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
        return self._ranking.lowest(evictable, kind)
