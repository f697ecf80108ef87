"""Quantized matrix products over 16-row tiles.

Layout "x16": a tile is 16 rows of a weight matrix, interleaved so that each 64-byte vector holds 4 bytes of every row;
it has exactly the size of the 16 rows it came from. A lane works for one row alone and walks the blocks along K in
order,

    total = integer dot product of the block;  acc = fma(float(total), weight scale * activation scale, acc)

so a result does not depend on the number of columns, on the row split or on the instruction-set form.

Activations come packed (`pack.py`): columns in tiles of 8, then 4, 2, 1; in a tile int8 [n_blocks, planes, columns,
block_weights], float32 scales [n_blocks, columns], and int32 sums of the int8 values of each plane. One plane is an
int8 activation; two are a 15-bit one, 128 times the first plus the second, for twice the integer work.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

from llvmlite import ir
from numba import types

from mer.compute.kernels.dots import Place, Quants, dots
from mer.compute.kernels.entry import ProductWords, claim, rows_of_piece
from mer.compute.kernels.interleave import ROWS, interleave_tile
from mer.compute.kernels.ir import (
    F32,
    I16,
    I32,
    I64,
    V16I32,
    const,
    fma,
    i64,
    load,
    load_i64,
    splat,
    store,
)
from mer.compute.kernels.lanes import FLOATS, PAIRS, PIECES, QUADS, ROW_LANES, WORDS, TilePiece
from mer.compute.kernels.numba_api import cgutils, intrinsic, literally, njit
from mer.compute.kernels.words import columns

PLANE_SHIFT = 7  # the first of two planes counts 2**7 times the second
_SMALL_BLOCK_BYTES = 1024  # a larger block asks for what lies ahead bit by bit: more requests at once would wait


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


FORMATS: dict[int, BlockFormat] = {}  # {ggml type id: format}


def joined(b: Any, planes: list[Any]) -> Any:
    """Return the int32 total of all planes: the first one counts 128 times the second."""
    if len(planes) == 1:
        return planes[0]
    return b.add(b.shl(planes[0], const(WORDS, PLANE_SHIFT)), planes[1])


def block_dot(b: Any, weights: Quants, column: ActivationColumn, c: int) -> Any:
    """Return each row's dot product of a whole block's weights with all planes of column c, as int32."""
    return joined(b, [dots(b, weights, Place(column, plane, c)) for plane in range(column.planes)])


def accumulate_block(b: Any, scale: Any, weights: Quants, column: ActivationColumn, acc: list[Any]) -> None:
    """Add to each column's `acc` the dot product of a whole block's weights times both scales."""
    for c, total in enumerate(acc):
        both = b.fmul(scale, column.scale(c))
        b.store(fma(b, b.sitofp(block_dot(b, weights, column, c), FLOATS), both, b.load(total)), total)


@intrinsic(prefer_literal=True)
def tile(
    _ctx: Any,
    kind: Any,
    planes: Any,
    columns: Any,
    w: Any,
    n_blocks: Any,
    xq: Any,
    xs: Any,
    xsum: Any,
    out: Any,
    out_stride: Any,
    add: Any,
) -> Any:
    """Multiply a tile with one tile of `columns` activation columns; store or add float32 results.

    `kind`, `planes` and `columns` are compile-time integers; the others are int64 addresses, counts, and bytes.
    """
    # Along K first, with all columns' sums in registers: column by column, each would decode the weights again.
    fmt, n_planes, n_columns = FORMATS[kind.literal_value], planes.literal_value, columns.literal_value
    signature = types.void(kind, planes, columns, *[types.int64] * 8)

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        w, n, xq, xs, xsum, out, out_stride, add = args[3:]
        zero = const(FLOATS, 0.0)
        acc = [[cgutils.alloca_once_value(b, zero) for _ in range(n_columns)] for _ in range(PIECES)]
        block = ROWS * fmt.block_bytes
        with cgutils.for_range(b, n, intp=I64) as loop:
            column = ActivationColumn(b, fmt, n_planes, n_columns, loop.index, xq, xs, xsum)
            base = b.add(w, b.mul(loop.index, i64(block)))
            for number, of_piece in enumerate(acc):
                piece = TilePiece(b, base, number)
                if block <= _SMALL_BLOCK_BYTES:
                    piece.ask_ahead(block, n_columns)
                fmt.accumulate(b, piece, column, n_columns, of_piece)
        adds = b.icmp_signed("!=", add, i64(0))
        for number, c in itertools.product(range(PIECES), range(n_columns)):
            offset = b.add(b.mul(out_stride, i64(c)), i64(4 * ROW_LANES * number))
            result = b.load(acc[number][c])
            old = cgutils.alloca_once_value(b, zero)
            with b.if_then(adds):
                b.store(load(b, out, offset, FLOATS, 4), old)
            store(b, b.fadd(b.load(old), result), out, offset, 4)
        return context.get_dummy_value()

    return signature, codegen


class TileProductWords(ProductWords):
    """Words of a row of `matmul_rows`.

    table, n_entries, flags, chunk (see `ProductWords`), n_rows, n_blocks, block_bytes, block_weights, sums_per_block,
    xq, xs, xsum, out, out_step (bytes from the results of one matrix to those of the next), out_stride (bytes), raw
    (room for 16 rows as in the file) and raw_stride (bytes from a thread's room to the next one's: other threads may be
    in other steps).
    """

    n_rows: int
    n_blocks: int
    block_bytes: int
    block_weights: int
    sums_per_block: int
    xq: int
    xs: int
    xsum: int
    out: int
    out_step: int
    out_stride: int
    raw: int
    raw_stride: int


TILES = columns(TileProductWords)


@njit
def matmul_rows(row, thread, kind, planes):  # type: ignore[no-untyped-def]
    """Body of every quantized matmul step: out[t, r] (+)= sum over k of W[r, k] * x[t, k], for claimed tiles.

    Tiles of a raw matrix are put in order just before they are used, in place.
    """
    literally(kind)
    literally(planes)
    n_rows, n_blocks = load_i64(row, TILES.n_rows), load_i64(row, TILES.n_blocks)
    block_bytes = load_i64(row, TILES.block_bytes)
    block_weights, sums = load_i64(row, TILES.block_weights), load_i64(row, TILES.sums_per_block)
    xq0, xs0, xsum0 = load_i64(row, TILES.xq), load_i64(row, TILES.xs), load_i64(row, TILES.xsum)
    out0, out_step = load_i64(row, TILES.out), load_i64(row, TILES.out_step)
    out_stride = load_i64(row, TILES.out_stride)
    add = load_i64(row, TILES.flags) >> 32
    n_tiles, tile_bytes = (n_rows + 15) // 16, 16 * n_blocks * block_bytes
    raw = load_i64(row, TILES.raw) + thread * load_i64(row, TILES.raw_stride)
    q_stride, sum_stride, s_stride = planes * n_blocks * block_weights, 4 * planes * n_blocks * sums, 4 * n_blocks
    while True:
        entry, matrix, r, last = claim(row, n_tiles)
        if entry == 0:
            return
        w, is_raw, n, x_row, out_row = rows_of_piece(row, entry, matrix)
        xq, xs, xsum = xq0 + x_row * q_stride, xs0 + x_row * s_stride, xsum0 + x_row * sum_stride
        out = out0 + matrix * out_step + out_row * out_stride
        while r < last:
            wr, to = w + r * tile_bytes, out + 64 * r
            if is_raw != 0:  # here, and not by a step before: that would take the matrix through memory once more
                ahead = w + min(r + 1, last - 1) * tile_bytes
                interleave_tile(kind, wr, wr, min(16, n_rows - 16 * r), n_blocks, block_bytes, raw, ahead)
            r += 1
            t = 0
            while t < n:
                q, s, u, o = xq + t * q_stride, xs + t * s_stride, xsum + t * sum_stride, to + t * out_stride
                left = n - t
                if left >= 8:
                    tile(kind, planes, 8, wr, n_blocks, q, s, u, o, out_stride, add)
                    t += 8
                elif left >= 4:
                    tile(kind, planes, 4, wr, n_blocks, q, s, u, o, out_stride, add)
                    t += 4
                elif left >= 2:
                    tile(kind, planes, 2, wr, n_blocks, q, s, u, o, out_stride, add)
                    t += 2
                else:
                    tile(kind, planes, 1, wr, n_blocks, q, s, u, o, out_stride, add)
                    t += 1
