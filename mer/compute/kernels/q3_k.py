"""Q3_K: super-blocks of 256 weights of 3 bits in 16 sub-blocks with 6-bit sub-scales, one half-float scale; weight =
scale * (sub-scale - 32) * (q - 4).

Arithmetic as in `super_block.py`: the integer sum of two planes is at most 256 * 32 * 4 * 127 * 129 < 2**30, so that
one fma takes both. Tile block, 1760 bytes: 16 half scales, then 4 bytes of each row to a vector, in the file's order: 8
vectors of high bits, where bit s of byte i belongs to weight 32 s + i, 16 of low bit pairs, 3 of sub-scales. Format:
ggml's `block_q3_K` (hmask[32], qs[64], scales[12], d).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import I16, const, splat, widen_half
from mer.compute.kernels.lanes import PAIRS, QUADS, SHORTS, WORDS, TilePiece
from mer.compute.kernels.q2_k import bit_pairs
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import (
    Part,
    add_planes,
    begin_of_halves,
    halves,
    integer_sums,
    shifted,
    times,
)
from mer.compute.kernels.tile import FORMATS, TileProductWords, joined, matmul_rows

KIND = 11  # ggml type id
_HIGH, _LOW, _SCALES = 32, 544, 1568  # byte offsets in the tile block


class Q3_K:
    """Decoder of the Q3_K tile. A turn is every second sub-block of a half."""

    block_weights = 256
    block_bytes = 110
    sums_per_block = 16

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """See `SubBlocks`."""
        return begin_of_halves(b, turn)

    def _scales(self, b: Any, weights: TilePiece, half: Any) -> list[Any]:
        """Return the 8 sub-scales of a half as bytes of 2 vectors of words, from 0 to 63.

        The low nibbles of the first 8 of 12 bytes are the first half's lower bits, the high nibbles the second half's;
        the last 4 bytes have the upper two bits of sub-scales 0 to 3, then those of 4 to 7 next to them, and so on.
        """
        *low, high = (shifted(b, weights.load(_SCALES + 64 * j, WORDS), times(b, half, 4)) for j in range(3))
        return [
            b.or_(b.and_(word, const(WORDS, 0x0F0F0F0F)), b.and_(upper, const(WORDS, 0x30303030)))
            for word, upper in zip(low, (b.shl(high, const(WORDS, 4)), b.shl(high, const(WORDS, 2))), strict=True)
        ]

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterator[Part]:
        """See `SubBlocks`."""
        half, odd = halves(b, turn)
        fours = [shifted(b, word, times(b, odd, 8)) for word in self._scales(b, weights, half)]
        here, shift = weights.moved(times(b, odd, 256)), splat(b, b.trunc(times(b, half, 4), I16), PAIRS)
        bits = [b.lshr(here.load(_HIGH + 64 * j, PAIRS), shift) for j in range(4)]
        for quarter, pairs in enumerate(bit_pairs(b, weights, _LOW, turn)):
            if quarter < 2:
                moved = [b.shl(bit, const(PAIRS, 2 - quarter)) for bit in bits]
            else:
                moved = [b.lshr(bit, const(PAIRS, quarter - 2)) for bit in bits]
            third = (b.and_(b.bitcast(bit, QUADS), const(QUADS, 4)) for bit in moved)
            vectors = [b.or_(pair, bit) for pair, bit in zip(pairs, third, strict=True)]
            scale = b.and_(b.lshr(fours[quarter // 2], const(WORDS, 16 * (quarter % 2))), const(WORDS, 63))
            yield Part(b.sub(scale, const(WORDS, 32)), Quants(vectors, 7, 4), 32 * quarter, (2 * quarter,))

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        sums = integer_sums(b, self, weights, column, columns)
        scale = widen_half(b, weights.load(0, SHORTS))
        for c in range(columns):
            both = b.fmul(scale, column.scale(c))
            b.store(add_planes(b, [joined(b, sums[c])], both, b.load(acc[c])), acc[c])


FORMATS[KIND] = Q3_K()


@step(TileProductWords)
def matmul_q3_k(row: int, thread: int, _n_threads: int) -> None:
    """Q3_K matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q3_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q3_K matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q3_k(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q3_K from rows as in the file."""
    interleave_rows(row, thread, KIND)
