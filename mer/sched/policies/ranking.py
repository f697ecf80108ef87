"""Finding the kept expert of least value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mer.sched.keys import ExpertKey


class Ranking:
    """The experts that are kept, searched for the one of least value."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._kept = np.zeros((n_layers, n_experts), dtype=np.bool_)  # [L, E]

    def insert(self, key: ExpertKey) -> None:
        """Note that an expert is kept from now on."""
        self._kept[key] = True

    def remove(self, key: ExpertKey) -> None:
        """Note that an expert is no longer kept."""
        self._kept[key] = False

    def lowest(
        self, values: npt.NDArray[np.float64], layer: int, evictable: Callable[[ExpertKey], bool]
    ) -> ExpertKey | None:
        """Return the evictable kept expert of least value, or None if none is evictable.

        Among equals, the one whose layer has been visited most recently leaves: in the cycle of the layers its next
        use is the furthest away.

        Args:
            values: [L, E], finite.
            layer: the one that is visited now.
            evictable: which of the kept experts may leave.
        """
        masked = np.where(self._kept, values, np.inf)
        while (least := masked.min()) < np.inf:
            layers, experts = np.nonzero(masked == least)
            since = (layer - layers) % len(masked)  # visits of other layers since that of this one
            for i in np.argsort(since, kind="stable"):
                key = int(layers[i]), int(experts[i])
                if evictable(key):
                    return key
                masked[key] = np.inf
        return None
