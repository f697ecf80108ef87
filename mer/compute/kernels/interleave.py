"""Re-interleaving quantized rows into 16-row tiles ("x16", see `tile.py`), in place or from one area to another.

A type's block is a list of fields; a field is `count` units of 1, 2 or 4 bytes from `offset` on. In the tile, each
unit of the 16 rows lies side by side, unit after unit, field after field. Bytes may be exclusive-or'ed on the way.
Units of 1 or 4 bytes move as vectors, 16 bytes of each row at once; what is left of a field, and units of 2 bytes,
move one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.ir import (
    I8,
    I16,
    I32,
    V16I32,
    V64I8,
    const,
    copy_bytes,
    i64,
    load,
    load_i64,
    prefetch,
    store,
    zero_bytes,
)
from mer.compute.kernels.numba_api import intrinsic, literally, njit
from mer.compute.kernels.words import Words, columns

ROWS = 16  # rows in a tile
_L2 = 2  # locality of a prefetch that goes past the first cache

# {ggml type id: ((offset, unit bytes, count, exclusive-or per 4 bytes), ...)}, in the tile's order
FIELDS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    2: ((0, 2, 1, 0), (2, 4, 4, 0)),  # Q4_0: scale, nibbles
    3: ((0, 2, 1, 0), (2, 2, 1, 0), (4, 4, 4, 0)),  # Q4_1: scale, minimum, nibbles
    6: ((0, 2, 1, 0), (2, 4, 5, 0)),  # Q5_0: scale, high bits with nibbles
    7: ((0, 4, 6, 0),),  # Q5_1: scale with minimum, high bits, nibbles
    8: ((0, 2, 1, 0), (2, 4, 8, 0x80808080)),  # Q8_0: scale, weights made unsigned
    10: ((80, 4, 1, 0), (0, 4, 20, 0)),  # Q2_K: scale with minimum, sub-scales with sub-minima, weights
    11: ((108, 2, 1, 0), (0, 4, 27, 0)),  # Q3_K: scale, high bits, low bits, sub-scales
    12: ((0, 4, 36, 0),),  # Q4_K: scale with minimum, sub-scales, nibbles
    13: ((0, 4, 44, 0),),  # Q5_K: scale with minimum, sub-scales, high bits, nibbles
    14: (
        (208, 2, 1, 0),
        (192, 1, 16, 0),
        (0, 4, 32, 0),
        (128, 4, 16, 0),
    ),  # Q6_K: scale, sub-scales, low, high bits
    16: ((0, 2, 1, 0), (2, 4, 16, 0)),  # IQ2_XXS: scale, entries and signs with sub-scale by turns
    17: ((0, 2, 1, 0), (2, 4, 18, 0)),  # IQ2_XS: scale, entries with signs, sub-scales
    18: ((0, 2, 1, 0), (2, 4, 24, 0)),  # IQ3_XXS: scale, entries, signs with sub-scales
    19: ((0, 2, 1, 0), (2, 4, 12, 0)),  # IQ1_S: scale, lower bits of entries, upper ones with sub-scales and shifts
    20: ((0, 2, 1, 0), (2, 4, 4, 0)),  # IQ4_NL: scale, nibbles
    21: ((0, 2, 1, 0), (2, 4, 27, 0)),  # IQ3_S: scale, lower and upper bits of entries, signs, sub-scales
    22: ((0, 2, 1, 0), (2, 4, 20, 0)),  # IQ2_S: scale, lower bits of entries, signs, upper bits, sub-scales
    23: ((0, 4, 34, 0),),  # IQ4_XS: scale with upper bits of sub-scales, their lower bits, nibbles
    29: ((0, 4, 14, 0),),  # IQ1_M: lower and upper bits of entries, sub-scales with quarters of the scale
    39: ((0, 1, 1, 0), (1, 4, 4, 0)),  # MXFP4: exponent, nibbles
    40: ((0, 4, 9, 0),),  # NVFP4: scales, nibbles
}


def rows_of_tiles(
    kind: int, tiles: npt.NDArray[np.uint8], block_bytes: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Return the original bytes [len(rows), n_blocks * block_bytes] of chosen rows of a matrix kept in tiles.

    `tiles` is uint8 [n_tiles, n_blocks * 16 * block_bytes].
    """
    places, flips = _places(kind, tiles.shape[1] // (ROWS * block_bytes), block_bytes)
    if len(rows) == 1:  # decoding: one gather less
        row = int(rows[0])
        one: npt.NDArray[np.uint8] = tiles[row // ROWS].take(places[row % ROWS]) ^ flips
        return one[None]
    found: npt.NDArray[np.uint8] = np.take_along_axis(tiles[rows // ROWS], places[rows % ROWS], 1)
    return found ^ flips


@lru_cache(maxsize=8)
def _places(kind: int, n_blocks: int, block_bytes: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint8]]:
    """Return where in a tile each byte of its 16 rows is, [16, row bytes], and what is to be flipped in it."""
    places = np.empty((ROWS, n_blocks, block_bytes), np.intp)
    flips = np.empty((n_blocks, block_bytes), np.uint8)
    begins = np.arange(n_blocks)[:, None] * (ROWS * block_bytes)
    position = 0
    for offset, unit, count, flip in FIELDS[kind]:
        size = unit * count
        lanes = np.arange(ROWS * size).reshape(count, ROWS, unit).swapaxes(0, 1).reshape(ROWS, 1, size)
        places[:, :, offset : offset + size] = begins + position + lanes
        flips[:, offset : offset + size] = flip & 0xFF
        position += ROWS * size
    return places.reshape(ROWS, -1), flips.reshape(-1)


def _lanes(numbers: Iterable[int]) -> Any:
    """Return which lanes of two vectors side by side a shuffle takes."""
    values = list(numbers)
    return ir.Constant(ir.VectorType(I32, len(values)), values)


def _transposed(b: Any, block: Any, row_bytes: Any, offset: int) -> list[Any]:
    """Load 16 bytes from `offset` of 16 rows' blocks; return 4 vectors of 16 x 4 bytes, lane i from row i.

    Quarter q of vector p holds the four words of row 4 q + p; then the 4 x 4 words of each quarter are transposed.
    """
    words = ir.VectorType(I32, 4)
    vectors = []
    for p in range(4):
        rows = [load(b, block, b.add(b.mul(row_bytes, i64(4 * q + p)), i64(offset)), words) for q in range(4)]
        halves = [b.shuffle_vector(rows[q], rows[q + 1], _lanes(range(8))) for q in (0, 2)]
        vectors.append(b.shuffle_vector(*halves, _lanes(range(16))))
    out = []
    for word in (0, 2):
        pairs = _lanes(4 * q + lane for q in range(4) for lane in (word, word + 16, word + 1, word + 17))
        left, right = b.shuffle_vector(*vectors[:2], pairs), b.shuffle_vector(*vectors[2:], pairs)
        for half in (0, 2):
            fours = _lanes(4 * q + lane for q in range(4) for lane in (half, half + 1, half + 16, half + 17))
            out.append(b.shuffle_vector(left, right, fours))
    return out


def _split(b: Any, vector: Any) -> Any:
    """Turn 16 x 4 bytes into 4 x 16: first the first byte of all rows, then the second, and so on."""
    units = _lanes(4 * lane + byte for byte in range(4) for lane in range(ROWS))
    return b.shuffle_vector(b.bitcast(vector, V64I8), ir.Constant(V64I8, ir.Undefined), units)


@intrinsic(prefer_literal=True)
def interleave_block(_ctx: Any, kind: Any, out: Any, block: Any, row_bytes: Any, ahead: Any) -> Any:
    """Turn one block of each of 16 rows, `row_bytes` apart, into a tile's block; the two do not overlap.

    As many bytes at `ahead` are asked for meanwhile, evenly, so that they are in the second cache when they are needed.
    """
    # Vectors of each row are transposed; moving unit by unit takes a load and a store for each 4 bytes.
    fields = FIELDS[kind.literal_value]

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        _, out, block, row_bytes, ahead = args
        lines = range(0, ROWS * sum(unit * count for _, unit, count, _ in fields), 64)
        groups = sum(unit * count // 16 for _, unit, count, _ in fields if unit != 2)  # of 16 bytes of each row
        group = position = 0
        for offset, unit, count, flip in fields:
            moved = 0 if unit == 2 else unit * count // 16 * 16
            for first in range(0, moved, 16):
                for line in lines[len(lines) * group // groups : len(lines) * (group + 1) // groups]:
                    prefetch(b, ahead, line, _L2)
                group += 1
                for j, vector in enumerate(_transposed(b, block, row_bytes, offset + first)):
                    flipped = b.xor(vector, const(V16I32, flip))
                    bytes_ = _split(b, flipped) if unit == 1 else flipped
                    store(b, bytes_, out, position + ROWS * first + 64 * j, 1)
            single = {1: I8, 2: I16, 4: I32}[unit]
            for first in range(moved, unit * count, unit):
                for row in range(ROWS):
                    value = load(b, block, b.add(b.mul(row_bytes, i64(row)), i64(offset + first)), single)
                    flipped = b.xor(value, ir.Constant(single, flip & ((1 << 8 * unit) - 1)))
                    store(b, flipped, out, position + ROWS * first + unit * row, 1)
            position += ROWS * unit * count
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), codegen


@njit
def interleave_tile(kind, source, target, present, n_blocks, block_bytes, raw, ahead):  # type: ignore[no-untyped-def]
    """Turn `present` rows of blocks into a tile; the missing ones become zero bytes.

    `raw` is room for 16 rows, so that source and target may be the same. What lies at `ahead` is fetched meanwhile.
    """
    literally(kind)
    row_bytes = n_blocks * block_bytes
    copy_bytes(raw, source, present * row_bytes)
    if present < 16:
        zero_bytes(raw + present * row_bytes, (16 - present) * row_bytes)
    for k in range(n_blocks):
        done = 16 * k * block_bytes
        interleave_block(kind, target + done, raw + k * block_bytes, row_bytes, ahead + done)


class InterleaveWords(Words):
    """Words of a row of `interleave_rows`.

    source, target (elsewhere; holds n_rows rounded up to 16), n_rows, n_blocks, block_bytes, raw (room for 16 rows, for
    each thread).
    """

    source: int
    target: int
    n_rows: int
    n_blocks: int
    block_bytes: int
    raw: int


INTERLEAVE = columns(InterleaveWords)


@njit
def interleave_rows(row, thread, kind):  # type: ignore[no-untyped-def]
    """Body of every interleaving step: turn rows of blocks into tiles, which are claimed."""
    literally(kind)
    source, target = load_i64(row, INTERLEAVE.source), load_i64(row, INTERLEAVE.target)
    n_rows = load_i64(row, INTERLEAVE.n_rows)
    n_blocks, block_bytes = load_i64(row, INTERLEAVE.n_blocks), load_i64(row, INTERLEAVE.block_bytes)
    tile_bytes, n_tiles = 16 * n_blocks * block_bytes, (n_rows + 15) // 16
    raw = load_i64(row, INTERLEAVE.raw) + thread * tile_bytes
    while True:
        tile = claim_unit(row)
        if tile >= n_tiles:
            return
        here, ahead = source + tile * tile_bytes, source + min(tile + 1, n_tiles - 1) * tile_bytes
        present = min(16, n_rows - 16 * tile)
        interleave_tile(kind, here, target + tile * tile_bytes, present, n_blocks, block_bytes, raw, ahead)
