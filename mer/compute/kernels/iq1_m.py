"""IQ1_M: super-blocks of 256 weights, 8 to an entry of a code book, in 16 sub-blocks with 3-bit sub-scales, one
half-float scale; weight = scale / 8 * (2 * sub-scale + 1) * (8 * q + shift), where q is -1, 0 or 1, and the shift of an
entry -1 or 1.

Arithmetic as in `row_sums.py`, with 8 * q + 8 as weights, and 2 more where the shift is 1; the activations' sums are
taken back 9 times. The integer sum of two planes is at most 256 * 15 * 18 * 127 * 129 < 2**31, so that one fma takes
both.
Tile block, 896 bytes, 4 bytes of each row to a vector, in the file's order: the lower 8 bits of the numbers of 32
entries, then 4 bits for each, its upper 3 bits and whether the shift is -1, then 4 times 16 bits: 4 sub-scales and a
quarter of the scale. Format: ggml's `block_iq1_m` (qs[32], qh[16], scales[8]).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from mer.compute.kernels.code_books import V32I8, CodeBook
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const, i64, widen_half
from mer.compute.kernels.lanes import SHORTS, WORDS, TilePiece
from mer.compute.kernels.row_sums import (
    EIGHT_WORDS,
    CodeBookFormat,
    RowGroup,
    RowWeights,
    number_pairs,
    odd_pair,
    short_of,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import shifted, times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 29  # ggml type id
_ENTRIES, _HIGH, _SCALES = 0, 512, 768  # byte offsets in the tile block
_BOOK = CodeBook("IQ1_S", 8, 8, 8)

_IS_NEGATIVE = ir.Constant(EIGHT_WORDS, [8 << 4 * (i // 2) for i in range(8)])


class IQ1_M(CodeBookFormat):
    """Decoder of the IQ1_M tile."""

    block_bytes = 56
    words = 5
    halves = True
    zeros = True
    unit = 1 / 8
    joined = True

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        high = short_of(b, weights, _HIGH, group)
        lower = weights.moved(times(b, group, 64)).load(_ENTRIES, WORDS)
        three = short_of(b, weights, _SCALES, b.lshr(group, i64(1)))
        scales = odd_pair(b, shifted(b, three, times(b, b.and_(group, i64(1)), 6)), 3, 0, 3)
        zeros = b.mul(scales, const(WORDS, 9))
        return [scales, zeros, high, *number_pairs(b, lower, high, 3, 4)]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        shifts = b.and_(row.repeated(2), _IS_NEGATIVE)
        more = b.bitcast(b.sext(b.icmp_signed("==", shifts, const(EIGHT_WORDS, 0)), EIGHT_WORDS), V32I8)
        weights = _BOOK.look_up(b, row.prepared_numbers(3, 4))
        return RowWeights(b.add(weights, b.and_(more, const(V32I8, 2))))

    def scale(self, b: Any, weights: TilePiece) -> Any:
        """See `CodeBookFormat`."""
        bits = const(WORDS, 0)
        for quarter, right in enumerate((12, 24, 4, 16)):
            words = weights.load(_SCALES + 64 * (quarter // 2), WORDS)
            bits = b.or_(bits, b.and_(b.lshr(words, const(WORDS, right)), const(WORDS, 15 << 4 * quarter)))
        return widen_half(b, b.trunc(bits, SHORTS))


FORMATS[KIND] = IQ1_M()


@step(TileProductWords)
def matmul_iq1_m(row: int, thread: int, _n_threads: int) -> None:
    """IQ1_M matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq1_m_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ1_M matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq1_m(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ1_M from rows as in the file."""
    interleave_rows(row, thread, KIND)
