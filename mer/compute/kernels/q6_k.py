"""Q6_K: super-blocks of 256 weights of 6 bits in 16 sub-blocks with int8 sub-scales, one half-float scale; weight =
scale * sub-scale * (q - 32).

Arithmetic as in `super_block.py`: the integer sum of a plane is at most 256 * 32 * 127 * 128 < 2**28, and two do not
fit int32 together. Tile block, 3360 bytes: 16 half scales, 16 vectors of 16 int8 sub-scales, the 128 bytes of low
nibbles of each row as 32 vectors and its 64 bytes of high bit pairs as 16 vectors, 4 bytes of each row to a vector, in
the file's order. Format: ggml's `block_q6_K` (ql[128], qh[64], scales[16], d).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const, widen_half
from mer.compute.kernels.lanes import BYTES, PAIRS, QUADS, SHORTS, WORDS, TilePiece
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import Part, add_planes, begin_of_halves, halves, integer_sums, times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 14  # ggml type id
_SCALES, _LOW, _HIGH = 32, 288, 2336  # byte offsets in the tile block


class Q6_K:
    """Decoder of the Q6_K tile. A turn is every second sub-block of a half: one of each quarter."""

    block_weights = 256
    block_bytes = 210
    sums_per_block = 16

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """See `SubBlocks`."""
        return begin_of_halves(b, turn)

    def _weights(self, b: Any, low: list[Any], high: list[Any], quarter: int) -> list[Any]:
        """Return 4 vectors with the 16 six-bit weights of each row from quarter `quarter` of a half, as bytes."""
        vectors = []
        for j in range(4):
            nibbles = low[4 * (quarter % 2) + j]
            if quarter >= 2:
                nibbles = b.lshr(nibbles, const(PAIRS, 4))
            pairs, shift = high[j], 4 - 2 * quarter
            if shift > 0:
                pairs = b.shl(pairs, const(PAIRS, shift))
            elif shift < 0:
                pairs = b.lshr(pairs, const(PAIRS, -shift))
            nibble = b.and_(b.bitcast(nibbles, QUADS), const(QUADS, 0x0F))
            vectors.append(b.or_(nibble, b.and_(b.bitcast(pairs, QUADS), const(QUADS, 0x30))))
        return vectors

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterator[Part]:
        """See `SubBlocks`."""
        half, odd = halves(b, turn)
        scales = weights.moved(times(b, b.add(times(b, half, 8), odd), 16))
        low = weights.moved(b.add(times(b, half, 64 * 16), times(b, odd, 64 * 4)))
        high = weights.moved(times(b, turn, 64 * 4))
        lows = [low.load(_LOW + 64 * (8 * run + j), PAIRS) for run in range(2) for j in range(4)]
        highs = [high.load(_HIGH + 64 * j, PAIRS) for j in range(4)]
        for quarter in range(4):
            scale = b.sext(scales.load(_SCALES + 16 * 2 * quarter, BYTES), WORDS)
            quants = Quants(self._weights(b, lows, highs, quarter), 63, 32)
            yield Part(scale, quants, 32 * quarter, (2 * quarter,))

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        sums = integer_sums(b, self, weights, column, columns)
        scale = widen_half(b, weights.load(0, SHORTS))
        for c in range(columns):
            b.store(add_planes(b, sums[c], b.fmul(scale, column.scale(c)), b.load(acc[c])), acc[c])


FORMATS[KIND] = Q6_K()


@step(TileProductWords)
def matmul_q6_k(row: int, thread: int, _n_threads: int) -> None:
    """Q6_K matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q6_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q6_K matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q6_k(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q6_K from rows as in the file."""
    interleave_rows(row, thread, KIND)
