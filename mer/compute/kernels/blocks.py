"""Blocks of quantized weights, and the activations that meet them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Protocol

from llvmlite import ir

from mer.compute.kernels.ir import F32, I16, I32, V16I32, const, i64, load, splat
from mer.compute.kernels.lanes import FLOATS, PAIRS, QUADS, WORDS, TilePiece


class BlockFormat(Protocol):
    """How one quantized type's tile is decoded and accumulated."""

    block_weights: int  # weights per block along K
    block_bytes: int  # bytes of one row's block
    sums_per_block: int  # int32 activation sums per block

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """Emit acc[c] += block product for every column c; `weights` is a piece of the tile's block."""


class ActivationColumn:
    """Addresses of one block's activations in a tile of `columns` columns and `planes` planes of int8."""

    def __init__(
        self, b: Any, fmt: BlockFormat, planes: int, columns: int, k: Any, xq: Any, xs: Any, xsum: Any
    ) -> None:
        self._b, self._fmt, self._columns, self.planes = b, fmt, columns, planes
        self._xq = b.add(xq, b.mul(k, i64(planes * columns * fmt.block_weights)))
        self._xs = b.add(xs, b.mul(k, i64(4 * columns)))
        self._xsum = b.add(xsum, b.mul(k, i64(4 * planes * columns * fmt.sums_per_block)))

    def advanced(self, weights: Any, sums: Any) -> ActivationColumn:
        """Return the same block seen from `weights` weights and `sums` sums on, both IR values."""
        later = copy.copy(self)
        later._xq = self._b.add(self._xq, weights)
        later._xsum = self._b.add(self._xsum, self._b.mul(sums, i64(4)))
        return later

    def quad(self, plane: int, column: int, position: int) -> Any:
        """Broadcast the 4 int8 activations from `position` (in weights) to all lanes, as QUADS."""
        offset = (plane * self._columns + column) * self._fmt.block_weights + position
        return self._b.bitcast(splat(self._b, load(self._b, self._xq, offset, I32, 4), WORDS), QUADS)

    def vector(self, plane: int, column: int, vector: ir.VectorType) -> Any:
        """The first int8 activations, as many as a vector has."""
        return load(self._b, self._xq, (plane * self._columns + column) * self._fmt.block_weights, vector)

    def scale(self, column: int) -> Any:
        """The block's float32 scale, broadcast."""
        return splat(self._b, load(self._b, self._xs, 4 * column, F32, 4), FLOATS)

    def sum(self, plane: int, column: int, indices: Sequence[int], factor: int) -> Any:
        """The block's int32 activation sums of these indices together, times a constant, broadcast."""
        first = (plane * self._columns + column) * self._fmt.sums_per_block
        values = [load(self._b, self._xsum, 4 * (first + index), I32, 4) for index in indices]
        total = functools.reduce(self._b.add, values)
        return splat(self._b, self._b.mul(total, ir.Constant(I32, factor)), WORDS)

    def neighbours(self, plane: int, column: int, number: int) -> Any:
        """The block's sums 2 * number and 2 * number + 1 as a pair of int16, broadcast as PAIRS."""
        first = (plane * self._columns + column) * self._fmt.sums_per_block + 2 * number
        low, high = (load(self._b, self._xsum, 4 * (first + i), I32, 4) for i in range(2))
        pair = self._b.or_(self._b.and_(low, ir.Constant(I32, 0xFFFF)), self._b.shl(high, ir.Constant(I32, 16)))
        return self._b.bitcast(splat(self._b, pair, WORDS), PAIRS)

    def sum_pairs(self, plane: int, column: int, per_sum: int) -> list[Any]:
        """The sums of each 16 * `per_sum` (1 or 2) weights of a block of 256, as pairs of int16 broadcast as PAIRS.

        Of each four sums the first and the third are a pair, then the second and the fourth: as the bytes of a word
        fall into int16.
        """
        b, count = self._b, self._fmt.sums_per_block
        sums = load(b, self._xsum, 4 * count * (plane * self._columns + column), V16I32, 4)
        order = [per_sum * (four + i) for four in range(0, 16 // per_sum, 4) for i in (0, 2, 1, 3)]
        wide = ir.VectorType(I32, len(order))
        parts = [b.shuffle_vector(sums, sums, ir.Constant(wide, [i + j for i in order])) for j in range(per_sum)]
        total = parts[0] if per_sum == 1 else b.add(*parts)
        pairs = b.bitcast(b.trunc(total, ir.VectorType(I16, len(order))), ir.VectorType(I32, len(order) // 2))
        picks = (const(WORDS, i) for i in range(len(order) // 2))
        return [b.bitcast(b.shuffle_vector(pairs, pairs, pick), PAIRS) for pick in picks]
