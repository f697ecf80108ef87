"""Least frequently used, with decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mer.errors import ConfigError
from mer.sched.keys import ExpertKey
from mer.sched.policies.ranking import Ranking


class LFU:
    """Least frequently used: uses are counted, and every count halves in `half_life` visits of its layer.

    Counts are compared over all layers, which are visited equally often. Every newcomer is kept.
    """

    name = "lfu"

    def __init__(self, n_layers: int, n_experts: int, *, half_life: float = 512.0) -> None:
        if not half_life > 0:
            raise ConfigError(f"the half-life of counts must be above 0 visits, not {half_life}")
        self._ranking = Ranking(n_layers, n_experts)
        self._counts = np.zeros((n_layers, n_experts))  # [L, E]
        self._decay = 0.5 ** (1 / half_life)

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        counts = self._counts[layer]
        counts *= self._decay
        counts[list(experts)] += 1.0

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
        return self._ranking.lowest(self._counts, layer, evictable)
