"""Q2_K: super-blocks of 256 weights of 2 bits in 16 sub-blocks, each with a sub-scale and a sub-minimum of 4 bits, and
one half-float scale of either; weight = scale * sub-scale * q - minimum * sub-minimum.

Arithmetic as in `super_block.py`: the integer sum of two planes is below 256 * 3 * 15 * 127 * 129 < 2**28, so that one
fma takes both. Tile block, 1344 bytes, 4 bytes of each row to a vector: scale and minimum, 4 vectors of sub-scales (low
nibbles) and sub-minima (high ones), 16 of weights. Format: ggml's `block_q2_K` (scales[16], qs[64], d, dmin).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const
from mer.compute.kernels.lanes import PAIRS, QUADS, WORDS, TilePiece, half_pair
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import (
    Part,
    add_planes,
    begin_of_halves,
    byte_pairs,
    halves,
    integer_sums,
    shifted,
    subtract_minima,
    times,
)
from mer.compute.kernels.tile import FORMATS, TileProductWords, joined, matmul_rows

KIND = 10  # ggml type id
_SCALES, _LOW = 64, 320  # byte offsets in the tile block


def bit_pairs(b: Any, weights: TilePiece, offset: int, turn: Any) -> Iterator[list[Any]]:
    """Return 4 vectors of bytes, 0 to 3, for each of the 4 sub-blocks of a turn: one of each 32 weights of a half."""
    here = weights.moved(times(b, turn, 256))
    packed = [here.load(offset + 64 * j, PAIRS) for j in range(4)]
    for quarter in range(4):
        moved = [b.lshr(vector, const(PAIRS, 2 * quarter)) for vector in packed]
        yield [b.and_(b.bitcast(vector, QUADS), const(QUADS, 3)) for vector in moved]


class Q2_K:
    """Decoder of the Q2_K tile. A turn is every second sub-block of a half."""

    block_weights = 256
    block_bytes = 84
    sums_per_block = 16

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """See `SubBlocks`."""
        return begin_of_halves(b, turn)

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterator[Part]:
        """See `SubBlocks`."""
        half, odd = halves(b, turn)
        here = weights.moved(times(b, half, 128))
        fours = [shifted(b, here.load(_SCALES + 64 * j, WORDS), times(b, odd, 8)) for j in range(2)]
        for quarter, vectors in enumerate(bit_pairs(b, weights, _LOW, turn)):
            scale = b.lshr(fours[quarter // 2], const(WORDS, 16 * (quarter % 2)))
            yield Part(b.and_(scale, const(WORDS, 15)), Quants(vectors, 3), 32 * quarter)

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        sums = integer_sums(b, self, weights, column, columns)
        scale, minimum = half_pair(b, weights, 0)
        words = [b.lshr(weights.load(_SCALES + 64 * j, WORDS), const(WORDS, 4)) for j in range(4)]
        minima = byte_pairs(b, [b.and_(word, const(WORDS, 0x0F0F0F0F)) for word in words])
        for c in range(columns):
            value = add_planes(b, [joined(b, sums[c])], b.fmul(scale, column.scale(c)), b.load(acc[c]))
            b.store(subtract_minima(b, minima, minimum, column, c, value), acc[c])


FORMATS[KIND] = Q2_K()


@step(TileProductWords)
def matmul_q2_k(row: int, thread: int, _n_threads: int) -> None:
    """Q2_K matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q2_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q2_K matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q2_k(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q2_K from rows as in the file."""
    interleave_rows(row, thread, KIND)
