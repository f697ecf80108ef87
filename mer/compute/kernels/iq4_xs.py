"""IQ4_XS: super-blocks of 256 weights in 8 sub-blocks with 6-bit sub-scales, one half-float scale; weight = scale *
(sub-scale - 32) * VALUES[nibble], with IQ4_NL's values.

Arithmetic as in `super_block.py`: the integer sum of a plane is at most 256 * 32 * 127 * 127 < 2**27, and two do not
fit int32 together. The values are looked up with 128 added, as in IQ4_NL. Tile block, 2176 bytes, 4 bytes of each row
to a vector, in the file's order: scale and the upper two bits of each sub-scale, a vector of their low nibbles, 32 of
nibbles. Format: ggml's `block_iq4_xs` (d, scales_h, scales_l[4], qs[128]).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.iq4_nl import OFFSET, VALUES
from mer.compute.kernels.ir import const
from mer.compute.kernels.lanes import WORDS, TilePiece, half_pair, lookup16
from mer.compute.kernels.q4_0 import nibbles
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import Part, add_planes, integer_sums, shifted, times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 23  # ggml type id
_SCALES, _LOW = 64, 128  # byte offsets in the tile block


class IQ4_XS:
    """Decoder of the IQ4_XS tile. A turn is a pair of sub-blocks."""

    block_weights = 256
    block_bytes = 136
    sums_per_block = 16

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """See `SubBlocks`."""
        return times(b, turn, 64), times(b, turn, 4)

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterator[Part]:
        """See `SubBlocks`."""
        table = [value + OFFSET for value in VALUES]
        low = shifted(b, weights.load(_SCALES, WORDS), times(b, turn, 8))
        high = shifted(b, b.lshr(weights.load(0, WORDS), const(WORDS, 16)), times(b, turn, 4))
        here = weights.moved(times(b, turn, 512))
        for number in range(2):
            lower = b.and_(b.lshr(low, const(WORDS, 4 * number)), const(WORDS, 15))
            upper = b.and_(b.lshr(high, const(WORDS, 2 * number)), const(WORDS, 3))
            scale = b.sub(b.or_(lower, b.shl(upper, const(WORDS, 4))), const(WORDS, 32))
            vectors = [lookup16(b, table, vector) for vector in nibbles(b, here, _LOW + 256 * number)]
            yield Part(scale, Quants(vectors, max(table), OFFSET), 32 * number, (2 * number, 2 * number + 1))

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        sums = integer_sums(b, self, weights, column, columns)
        scale, _ = half_pair(b, weights, 0)
        for c in range(columns):
            b.store(add_planes(b, sums[c], b.fmul(scale, column.scale(c)), b.load(acc[c])), acc[c])


FORMATS[KIND] = IQ4_XS()


@step(TileProductWords)
def matmul_iq4_xs(row: int, thread: int, _n_threads: int) -> None:
    """IQ4_XS matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq4_xs_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ4_XS matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq4_xs(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ4_XS from rows as in the file."""
    interleave_rows(row, thread, KIND)
