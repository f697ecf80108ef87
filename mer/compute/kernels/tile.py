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

import itertools
from typing import Any

from numba import types

from mer.compute.kernels.blocks import ActivationColumn, BlockFormat
from mer.compute.kernels.dots import Place, Quants, dots
from mer.compute.kernels.entry import ProductWords, claim, rows_of_piece
from mer.compute.kernels.interleave import ROWS, interleave_tile
from mer.compute.kernels.ir import (
    I64,
    const,
    fma,
    i64,
    load,
    load_i64,
    store,
)
from mer.compute.kernels.lanes import FLOATS, PIECES, ROW_LANES, WORDS, TilePiece
from mer.compute.kernels.numba_api import cgutils, intrinsic, literally, njit
from mer.compute.kernels.words import columns

PLANE_SHIFT = 7  # the first of two planes counts 2**7 times the second
_SMALL_BLOCK_BYTES = 1024  # a larger block asks for what lies ahead bit by bit: more requests at once would wait


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
