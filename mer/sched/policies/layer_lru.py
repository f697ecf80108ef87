"""Least recently used, per layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from mer.sched.keys import ExpertKey


class LayerLRU:
    """Least recently used within each layer, every layer with an equal share of the slots.

    Layers are visited in a cycle, so that one LRU over all of them would hit never as soon as a token's working set
    exceeds the slots. A layer above its share gives way first, the one furthest above it before the others; then the
    layer that needs the room; then any. Every newcomer is kept.
    """

    name = "layer-lru"

    def __init__(self, n_layers: int, n_slots: int) -> None:
        self._layers: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(n_layers)]
        self._shares = [n_slots // n_layers + (layer < n_slots % n_layers) for layer in range(n_layers)]

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        kept = self._layers[layer]
        for expert in experts:
            if expert in kept:
                kept.move_to_end(expert)

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._layers[key[0]][key[1]] = None

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        del self._layers[key[0]][key[1]]

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        """See `Policy`."""

        def rank(other: int) -> tuple[int, bool]:
            return max(0, len(self._layers[other]) - self._shares[other]), other == layer

        for candidate in sorted(range(len(self._layers)), key=rank, reverse=True):
            for expert in self._layers[candidate]:
                if evictable((candidate, expert)):
                    return candidate, expert
        return None
