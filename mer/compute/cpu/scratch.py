"""The memory that a batch works in: sizes first, so that the memory plan and the worker cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.cpu.matrix import FLOAT_BYTES, PackedArea
from mer.compute.cpu.program import Memory
from mer.compute.kernels.activation import NUMBERS
from mer.compute.kernels.attention import split_tokens
from mer.compute.kernels.blocks import BlockFormat
from mer.compute.kernels.matmul import block_format
from mer.config import KVType
from mer.io.extents import round_up
from mer.io.ggml import GGMLType
from mer.model.operators import SWIGLU, Activation

RESIDENT_ROWS = 16
Constant: TypeAlias = float | tuple[float, ...]


@attrs.frozen(kw_only=True)
class Limits:
    """The largest batch that a worker is made for."""

    batch_tokens: int  # T: rows of a batch
    outputs: int  # N: rows whose logits are wanted
    sequences: int  # S: sequences in a batch
    sequence_blocks: int  # KV blocks of the longest sequence
    kv_blocks: int  # KV blocks in all
    threads: int
    planes: int = 1  # int8 planes of an activation that meets quantized weights: 1 or 2
    kv_type: KVType = "f32"

    def resident_rows(self, top_k: int) -> int:
        """Rows of a batch up to which all layers may be one program; larger ones have more to do than setting it up."""
        return max(1, min(RESIDENT_ROWS, self.ffn_rows(top_k) // max(1, top_k)))

    def ffn_rows(self, top_k: int) -> int:
        """Rows of gate and up computed at once: a whole batch on one expert, or one token on all of its experts."""
        return max(self.batch_tokens, top_k)

    def split_tokens(self, n_kv_heads: int) -> int:
        """Rows of a batch up to which attention gives out spans of positions one by one."""
        return split_tokens(self.threads, n_kv_heads, self.batch_tokens)


@attrs.frozen
class Areas:
    """What some part of a model needs of the scratch memory; parts that name the same area share it."""

    sizes: Mapping[str, int] = attrs.field(factory=dict)  # bytes
    packed: Mapping[str, tuple[int, int]] = attrs.field(factory=dict)  # rows and columns of packed activations
    constants: tuple[Constant, ...] = ()  # that steps read by address

    @classmethod
    def union(cls, parts: Iterable[Areas]) -> Areas:
        """Return what all parts need together: of areas with one name, the largest."""
        sizes: dict[str, int] = {}
        packed: dict[str, tuple[int, int]] = {}
        constants: dict[Constant, None] = {}
        for part in parts:
            for name, n_bytes in part.sizes.items():
                sizes[name] = max(n_bytes, sizes.get(name, 0))
            for name, (rows, cols) in part.packed.items():
                before = packed.get(name, (0, 0))
                packed[name] = max(rows, before[0]), max(cols, before[1])
            constants.update(dict.fromkeys(part.constants))
        return cls(sizes, packed, tuple(constants))

    def n_bytes(self, kinds: Iterable[GGMLType], planes: int) -> int:
        """Return the bytes of all areas, for activations that meet matrices of these types."""
        total = sum(round_up(size, 64) for size in self.sizes.values())
        total += round_up(len(_numbers(self.constants)) * FLOAT_BYTES, 64)
        formats = _formats(kinds)
        for rows, cols in self.packed.values():
            for fmt in formats.values():
                sizes = PackedArea.sizes(fmt, rows, round_up(cols, fmt.block_weights), planes)
                total += sum(round_up(size, 64) for size in sizes)
        return total


def activation_constants(record: Activation) -> tuple[Constant, ...]:
    """Return the numbers of an activation as a constant, in the order that kernels read them; none for SwiGLU."""
    return () if record == SWIGLU else (tuple(getattr(record, name) for name in NUMBERS),)


def _numbers(constants: Iterable[Constant]) -> list[float]:
    return [number for it in constants for number in (it if isinstance(it, tuple) else (it,))]


def _formats(kinds: Iterable[GGMLType]) -> dict[int, BlockFormat]:
    formats = (block_format(int(kind)) for kind in sorted(set(kinds)))
    return {fmt.block_weights: fmt for fmt in formats if fmt is not None}


class Scratch:
    """Areas in anonymous memory of their own.

    Args:
        areas: what is needed.
        kinds: types of the matrices that packed activations meet.
        planes: int8 planes of these activations.
    """

    def __init__(self, areas: Areas, kinds: Iterable[GGMLType], planes: int) -> None:
        kinds = set(kinds)
        self.memory = Memory(areas.n_bytes(kinds, planes))
        self._sizes = areas.sizes
        self.address: Mapping[str, int] = {name: self.memory.cut(size) for name, size in areas.sizes.items()}
        self.packed: Mapping[str, dict[int, PackedArea]] = {
            name: {
                size: PackedArea.cut(self.memory, fmt, rows, round_up(cols, size), planes)
                for size, fmt in _formats(kinds).items()
            }
            for name, (rows, cols) in areas.packed.items()
        }
        numbers = _numbers(areas.constants)
        address = self.memory.cut(len(numbers) * FLOAT_BYTES)
        self.memory.floats(address, len(numbers))[:] = numbers
        self._constants: dict[Constant, int] = {}
        for constant in areas.constants:
            self._constants[constant] = address
            address += FLOAT_BYTES * len(_numbers([constant]))

    def constant(self, value: Constant) -> int:
        """Return the address of a float32 that the areas name, or of several that they name as one constant."""
        return self._constants[value]

    def activation(self, record: Activation) -> int:
        """Return the address of an activation's numbers, which the areas name, or 0 for SwiGLU."""
        constants = activation_constants(record)
        return self.constant(constants[0]) if constants else 0

    def ints(self, name: str) -> npt.NDArray[np.int32]:
        """Return an area as int32."""
        return self.memory.view(self.address[name], self._sizes[name]).view(np.int32)

    def words(self, name: str) -> npt.NDArray[np.int64]:
        """Return an area as int64."""
        return self.memory.view(self.address[name], self._sizes[name]).view(np.int64)

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """Return an area as float32."""
        return self.memory.view(self.address[name], self._sizes[name]).view(np.float32)
