"""The state of a sequence between batches: how layers divide a KV block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import accumulate
from typing import Final

import attrs

from mer.model.spec import ModelSpec

DIGEST_BYTES: Final = 12


@attrs.frozen
class Paged:
    """Keys and values of one layer: for each kv head, those of the positions of a block."""

    heads: int
    key_bytes: int  # of a head, for the positions of a block
    value_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the layer in a block."""
        return self.heads * (self.key_bytes + self.value_bytes)


@attrs.frozen
class StateLayout:
    """A block of positions: the state of one layer after the other."""

    layers: tuple[Paged, ...]
    block_tokens: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Bytes from the start of a block to each layer's state."""
        return (0, *accumulate(layer.n_bytes for layer in self.layers))[:-1]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(layer.n_bytes for layer in self.layers)

    @property
    def digest(self) -> bytes:
        """A hash that tells blocks of this layout from those of any other."""
        sizes = [(layer.heads, layer.key_bytes, layer.value_bytes) for layer in self.layers]
        return hashlib.sha256(repr((self.block_tokens, sizes)).encode()).digest()[:DIGEST_BYTES]


def state_layout(spec: ModelSpec, head_bytes: Callable[[int], int], block_tokens: int) -> StateLayout:
    """Return what a model keeps.

    Args:
        spec: the model.
        head_bytes: the bytes of so many elements of a head, for the positions of a block; a fact of the worker.
        block_tokens: positions in a block.
    """
    mixers = [layer.mixer for layer in spec.layers]
    layers = [Paged(it.n_kv_heads, head_bytes(it.head_dim), head_bytes(it.head_dim)) for it in mixers]
    return StateLayout(tuple(layers), block_tokens)
