"""Which expert leaves when a slot is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeAlias

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""


class Policy(Protocol):
    """Keeps an order among the resident experts; pure bookkeeping."""

    name: str

    def insert(self, key: ExpertKey) -> None:
        """Note that an expert has become resident."""

    def touch(self, key: ExpertKey) -> None:
        """Note that a resident expert is used."""

    def remove(self, key: ExpertKey) -> None:
        """Note that an expert is no longer resident."""

    def victim(self, layer: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Return the expert that should make room for one of `layer`, or None if none is evictable."""


class LayerLRU:
    """Least recently used within each layer, every layer with an equal share of the slots.

    Layers are visited in a cycle, so that one LRU over all of them would hit never as soon as a token's working set
    exceeds the slots. A layer above its share gives way first, the one furthest above it before the others; then the
    layer that needs the room; then any.
    """

    name = "layer-lru"

    def __init__(self, n_layers: int, n_slots: int) -> None:
        self._layers: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(n_layers)]
        self._shares = [n_slots // n_layers + (layer < n_slots % n_layers) for layer in range(n_layers)]

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._layers[key[0]][key[1]] = None

    def touch(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._layers[key[0]].move_to_end(key[1])

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        del self._layers[key[0]][key[1]]

    def victim(self, layer: int, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `Policy`."""

        def rank(other: int) -> tuple[int, bool]:
            return max(0, len(self._layers[other]) - self._shares[other]), other == layer

        for candidate in sorted(range(len(self._layers)), key=rank, reverse=True):
            for expert in self._layers[candidate]:
                if evictable((candidate, expert)):
                    return candidate, expert
        return None
