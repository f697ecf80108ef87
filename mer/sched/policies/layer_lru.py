"""Least recently used, per layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from mer.io.extents import ExpertKey


class LayerLRU:
    """Least recently used within each layer, every layer with an equal share of the slots.

    Layers are visited in a cycle, so that one LRU over all of them would hit never as soon as a token's working set
    exceeds the slots. A layer above its share gives way first, the one furthest above it before the others; then the
    layer that needs the room; then any. Every newcomer is kept.

    Args:
        n_layers: L.
        n_slots: experts that can be kept; with several classes of slots, of each of them.
        kinds: [L][E], the class of slots that each expert fits; by default all fit the same. A class's slots are
            shared by the layers that have experts of it.
    """

    name = "layer-lru"
    ranks: None = None  # see `Policy`

    def __init__(
        self, n_layers: int, n_slots: int | Sequence[int], *, kinds: Sequence[Sequence[int]] | None = None
    ) -> None:
        slot_counts = [n_slots] if isinstance(n_slots, int) else n_slots
        self._kinds = kinds
        # [kind][layer]: {expert: None}, from least to most recently used
        self._kept: list[list[OrderedDict[int, None]]] = [[OrderedDict() for _ in range(n_layers)] for _ in slot_counts]
        self._shares = [
            _shares(n, [layer for layer in range(n_layers) if kinds is None or kind in kinds[layer]], n_layers)
            for kind, n in enumerate(slot_counts)
        ]
        self._visits = [0] * n_layers
        self._last_uses: list[dict[int, int]] = [{} for _ in range(n_layers)]  # {expert: visit of its last use}

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`."""
        self._visits[layer] = visit = self._visits[layer] + 1
        last_uses = self._last_uses[layer]
        for expert in experts:
            last_uses[expert] = visit
            kept = self._kept[self._kind((layer, expert))][layer]
            if expert in kept:
                kept.move_to_end(expert)

    def likelihood(self, key: ExpertKey) -> float:
        """See `Policy`: by the rule of succession from the visits since the last use, that one included."""
        visits = self._visits[key[0]]
        last_use = self._last_uses[key[0]].get(key[1])
        return 1 / (visits + 2) if last_use is None else 2 / (visits - last_use + 3)

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._kept[self._kind(key)][key[0]][key[1]] = None

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        del self._kept[self._kind(key)][key[0]][key[1]]

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        """See `Policy`."""
        layers, shares = self._kept[kind], self._shares[kind]

        def rank(other: int) -> tuple[int, bool]:
            return max(0, len(layers[other]) - shares[other]), other == layer

        for candidate in sorted(range(len(layers)), key=rank, reverse=True):
            for expert in layers[candidate]:
                if evictable((candidate, expert)):
                    return candidate, expert
        return None

    def _kind(self, key: ExpertKey) -> int:
        return 0 if self._kinds is None else self._kinds[key[0]][key[1]]


def _shares(n_slots: int, sharers: Sequence[int], n_layers: int) -> list[int]:
    """Return how many of the slots each layer may keep, [L]: equal shares, the remainder to the first layers."""
    shares = [0] * n_layers
    for place, layer in enumerate(sharers):
        shares[layer] = n_slots // len(sharers) + (place < n_slots % len(sharers))
    return shares
