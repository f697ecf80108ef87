"""Finding the kept expert of least value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks

FloatArray: TypeAlias = npt.NDArray[np.float64]


class Ranking:
    """The experts that are kept, searched for the one of least value.

    The least value of each layer is remembered, so that a search looks at the layers, and at single experts only where
    something has changed since the search before.

    Args:
        values: [L, E], finite and not below 0; its owner changes rows in place and says so with `visited`.
        kinds: [L, E], the class of slots that each expert fits; by default all fit the same.
        weights: [L], what a value of each layer is worth; by default 1.
        impatient: divide values by how many layers' visits they have to wait for their layer's next one.
    """

    def __init__(
        self,
        values: FloatArray,
        *,
        kinds: npt.ArrayLike | None = None,
        weights: FloatArray | None = None,
        impatient: bool = False,
    ) -> None:
        n_layers = len(values)
        self._values = values
        self._kinds = np.zeros(values.shape, np.int64) if kinds is None else np.array(kinds, np.int64)
        n_kinds = 1 + int(self._kinds.max(initial=0))
        self._kept = np.full(values.shape, -1)  # [L, E], the kind of an expert, or -1 if it is not kept
        self._least = np.full((n_kinds, n_layers), np.inf)  # of the kept experts of each kind
        self._stale: list[set[int]] = [set() for _ in range(n_kinds)]  # layers where that is to be found anew
        self._now = 0  # the layer visited last
        self._weights = np.ones(n_layers) if weights is None else weights
        places = np.arange(n_layers)
        self._layers_at = (places[:, None] - places) % n_layers  # [L, L]: this layer, the one visited before it, ...
        self._patience = 1.0 / (n_layers - places) if impatient else np.ones(n_layers)  # by place in that order

    @property
    def ranks(self) -> Ranks:
        """The numbers that `lowest` goes by, the owner's values among them: they change in place."""
        return Ranks(self._values, self._weights, self._patience)

    def insert(self, key: ExpertKey) -> None:
        """Note that an expert is kept from now on."""
        kind = self._kinds[key]
        self._kept[key] = kind
        self._stale[kind].add(key[0])

    def remove(self, key: ExpertKey) -> None:
        """Note that an expert is no longer kept."""
        self._kept[key] = -1
        self._stale[self._kinds[key]].add(key[0])

    def visited(self, layer: int) -> None:
        """Note that a layer is visited now, and that its values may have changed."""
        self._now = layer
        for stale in self._stale:
            stale.add(layer)

    def worth(self, key: ExpertKey) -> float:
        """Return what an expert, kept or not, is worth now."""
        place = (self._now - key[0]) % len(self._weights)
        return float(self._values[key] * self._weights[key[0]] * self._patience[place])

    def lowest(self, evictable: Callable[[ExpertKey], bool], kind: int = 0) -> ExpertKey | None:
        """Return the evictable kept expert of a kind that is worth least, or None if none is evictable.

        Among equals, the one whose layer has been visited most recently leaves: in the cycle of the layers its next
        use is the furthest away.

        Args:
            evictable: which of the kept experts may leave.
            kind: the class of slots.
        """
        least = self._least[kind]
        for changed in self._stale[kind]:
            least[changed] = self._row(changed, kind).min()
        self._stale[kind].clear()
        layers = self._layers_at[self._now]
        worths = (least * self._weights)[layers] * self._patience
        rows: dict[int, FloatArray] = {}  # {place in the order of the layers: what is left of its values}
        while worths[place := int(worths.argmin())] < np.inf:
            at = int(layers[place])
            if place not in rows:
                rows[place] = self._row(at, kind)
            row = rows[place]
            expert = int(row.argmin())
            if evictable((at, expert)):
                return at, expert
            row[expert] = np.inf
            worths[place] = row.min() * self._weights[at] * self._patience[place]
        return None

    def _row(self, layer: int, kind: int) -> FloatArray:
        """Return the values of a layer's kept experts of a kind, [E]; infinity for others."""
        return np.where(self._kept[layer] == kind, self._values[layer], np.inf)
