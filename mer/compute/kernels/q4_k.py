"""Q4_K: super-blocks of 256 weights of 4 bits in 8 sub-blocks, each with a sub-scale and a sub-minimum of 6 bits, and
one half-float scale of either; weight = scale * sub-scale * nibble - minimum * sub-minimum.

Arithmetic as in `super_block.py`: the integer sum of a plane is below 256 * 15 * 63 * 127 < 2**25, and two do not fit
int32 together. Tile block, 2304 bytes, 4 bytes of each row to a vector, in the file's order: scale and minimum, 3
vectors of sub-scales and sub-minima, 32 of nibbles. Format: ggml's `block_q4_K` (d, dmin, scales[12], qs[128]).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const, i64
from mer.compute.kernels.lanes import PAIRS, QUADS, WORDS, TilePiece, half_pair
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import (
    Part,
    add_planes,
    byte_pairs,
    integer_sums,
    shifted,
    subtract_minima,
    times,
)
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 12  # ggml type id
_SCALES = 64  # byte offset in the tile block


def six_bits(b: Any, weights: TilePiece) -> tuple[list[Any], list[Any]]:
    """Return the 8 sub-scales and 8 sub-minima of each row, as bytes of 2 and 2 vectors of words.

    Of the 12 bytes, the first 4 hold sub-scales 0 to 3 and the next 4 their sub-minima; the upper two bits of these
    belong to sub-scales and sub-minima 4 to 7, whose low and high nibbles are the last 4 bytes.
    """
    *first, last = (weights.load(_SCALES + 64 * j, WORDS) for j in range(3))
    early, late = [], []
    for word, nibbles in zip(first, (last, b.lshr(last, const(WORDS, 4))), strict=True):
        early.append(b.and_(word, const(WORDS, 0x3F3F3F3F)))
        upper = b.and_(b.lshr(word, const(WORDS, 2)), const(WORDS, 0x30303030))
        late.append(b.or_(b.and_(nibbles, const(WORDS, 0x0F0F0F0F)), upper))
    return [early[0], late[0]], [early[1], late[1]]


class Q4_K:
    """Decoder of the Q4_K tile, and with more bits per weight of the Q5_K tile. A turn is a pair of sub-blocks."""

    block_weights = 256
    block_bytes = 144
    sums_per_block = 16
    _largest = 15
    _low = 256  # byte offset of the nibbles in the tile block

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """See `SubBlocks`."""
        return times(b, turn, 64), times(b, turn, 4)

    def _weights(self, b: Any, weights: TilePiece, turn: Any) -> list[list[Any]]:
        """Return 8 vectors of bytes for either sub-block."""
        here = weights.moved(times(b, turn, 512))
        packed = [here.load(self._low + 64 * j, PAIRS) for j in range(8)]
        upper = [b.lshr(vector, const(PAIRS, 4)) for vector in packed]
        return [[b.and_(b.bitcast(v, QUADS), const(QUADS, 15)) for v in part] for part in (packed, upper)]

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterator[Part]:
        """See `SubBlocks`."""
        scales, _ = six_bits(b, weights)
        four = b.select(b.icmp_unsigned(">=", turn, i64(2)), scales[1], scales[0])
        two = shifted(b, four, times(b, b.and_(turn, i64(1)), 16))
        for number, vectors in enumerate(self._weights(b, weights, turn)):
            scale = b.and_(b.lshr(two, const(WORDS, 8 * number)), const(WORDS, 0xFF))
            yield Part(scale, Quants(vectors, self._largest), 32 * number)

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        sums = integer_sums(b, self, weights, column, columns)
        scale, minimum = half_pair(b, weights, 0)
        minima = byte_pairs(b, six_bits(b, weights)[1])
        for c in range(columns):
            value = add_planes(b, sums[c], b.fmul(scale, column.scale(c)), b.load(acc[c]))
            b.store(subtract_minima(b, minima, minimum, column, c, value), acc[c])


FORMATS[KIND] = Q4_K()


@step(TileProductWords)
def matmul_q4_k(row: int, thread: int, _n_threads: int) -> None:
    """Q4_K matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q4_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q4_K matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q4_k(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q4_K from rows as in the file."""
    interleave_rows(row, thread, KIND)
