"""Quantizing activations to blocks of int8, packed in the column tiles that `tile.py` reads.

One plane, as ggml does: scale = max|x| / 127 per block, q = round(x * (1 / scale)) to nearest even. Two planes:
scale = max|x| / (127 * 128), q the same way, stored as q = 128 * first + second with the second in -64..63. A block
whose scale is below the normal float32 becomes zero. Blocks are 32 long for the legacy types (one sum per block) and
256 long for the K types (one sum per 16).
"""

from __future__ import annotations

import numpy as np

from mer.compute.kernels.activation import join_halves
from mer.compute.kernels.claim import chunk_of, claim_unit
from mer.compute.kernels.entry import COUNT, PAIR, ROW, TableWords, entry_of
from mer.compute.kernels.ir import load_i32, load_i64, store_f32, store_i32
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import step
from mer.compute.kernels.vector import amax, quantize16, quantize16_high, quantize16_low
from mer.compute.kernels.words import columns

_TINY = np.float32(2.0**-126)  # the reciprocal of a smaller scale may be infinite; such blocks become zero
_MIN_WEIGHTS = 512  # fewer take less time than claiming them


@njit
def column_tile(t, n):  # type: ignore[no-untyped-def]
    """Return (first column, number of columns) of the tile that holds column t of n: tiles of 8, then 4, 2, 1."""
    first = n // 8 * 8
    if t < first:
        return t // 8 * 8, 8
    for width in (4, 2, 1):
        if (n - first) & width:
            if t < first + width:
                return first, width
            first += width
    return first, 1


@njit
def _quantize_block(block, size, sums, planes, columns, place, plane, xq, xs, xsum):  # type: ignore[no-untyped-def]
    """Write one block's scale at `place`, and its values and sums at `plane` and, of two planes, `columns` behind."""
    per_sum = size // 16 // sums
    scale = amax(block, size) / np.float32(127 if planes == 1 else 127 * 128)
    inverse = np.float32(0) if scale < _TINY else np.float32(1) / scale
    store_f32(xs, place, scale)
    for s in range(sums):
        partial, rest = np.int32(0), np.int32(0)
        for p in range(s * per_sum, (s + 1) * per_sum):
            here, to = block + 64 * p, xq + plane * size + 16 * p
            if planes == 1:
                partial += quantize16(here, inverse, to)
            else:
                partial += quantize16_high(here, inverse, to)
                rest += quantize16_low(here, inverse, to + columns * size)
        store_i32(xsum, plane * sums + s, partial)
        if planes == 2:
            store_i32(xsum, (plane + columns) * sums + s, rest)


class PackWords(TableWords):
    """Words of a row of `pack`.

    table, n_entries (see `TableWords`), x, x_stride (bytes), index (of x, int32 for each (token, choice) pair, or 0 for
    the entry's own rows), up (bytes from a row of x to its partner, or 0), activation (of both: address of its numbers,
    or 0: SwiGLU), n_blocks, block_weights, sums_per_block, xq, xs, xsum, planes.
    """

    x: int
    x_stride: int
    index: int = 0
    up: int = 0
    activation: int = 0
    n_blocks: int
    block_weights: int
    sums_per_block: int
    xq: int
    xs: int
    xsum: int
    planes: int


PACK = columns(PackWords)


@step(PackWords)
def pack(row: int, _thread: int, n_threads: int) -> None:
    """Quantize rows of float32 into packed blocks; runs of an entry's (row, block) pairs are claimed.

    The rows of an entry are its own of x, and are packed together. With `up`, x first becomes the activation of both.
    """
    table, n_entries = load_i64(row, PACK.table), load_i64(row, PACK.n_entries)
    x, x_stride, index = load_i64(row, PACK.x), load_i64(row, PACK.x_stride), load_i64(row, PACK.index)
    up, n_blocks, size = load_i64(row, PACK.up), load_i64(row, PACK.n_blocks), load_i64(row, PACK.block_weights)
    activation = load_i64(row, PACK.activation)
    sums, planes = load_i64(row, PACK.sums_per_block), load_i64(row, PACK.planes)
    xq, xs, xsum = load_i64(row, PACK.xq), load_i64(row, PACK.xs), load_i64(row, PACK.xsum)
    unit, before = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        n, own, pair = load_i64(entry, COUNT), load_i64(entry, ROW), load_i64(entry, PAIR)
        total = n * n_blocks
        chunk = chunk_of(total, n_threads, _MIN_WEIGHTS // size)
        runs = (total + chunk - 1) // chunk
        while unit < before + runs:
            begin = (unit - before) * chunk
            for item in range(begin, min(begin + chunk, total)):
                t, k = item // n_blocks, item % n_blocks
                source = load_i32(index, pair + t) if index != 0 else own + t
                block = x + source * x_stride + 4 * size * k
                if up != 0:
                    join_halves(block, block + up, size, activation)
                first, columns = column_tile(t, n)
                tile = (own + first) * n_blocks + k * columns
                place, plane = tile + t - first, planes * tile + t - first
                _quantize_block(block, size, sums, planes, columns, place, plane, xq, xs, xsum)
            unit = claim_unit(row)
        before += runs
