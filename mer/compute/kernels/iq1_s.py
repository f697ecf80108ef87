"""IQ1_S: super-blocks of 256 weights, 8 to an entry of a code book, in 8 groups with 3-bit sub-scales, one half-float
scale; weight = scale / 8 * (2 * sub-scale + 1) * (8 * q + shift), where q is -1, 0 or 1, and a group's shift -1 or 1.

Arithmetic as in `row_sums.py`, with 8 * q + 8 as weights; the activations' sums are taken back 7 or 9 times. The sum of
two planes is at most 256 * 15 * 16 * 127 * 129 < 2**30, so that one fma takes both. Tile block, 800 bytes: 16
half scales, then 4 bytes of each row to a vector, in the file's order: the lower 8 bits of the numbers of 32 entries,
then for each group 16 bits, their upper 3 bits, the sub-scale, and whether the shift is -1. Format: ggml's
`block_iq1_s` (d, qs[32], qh[8]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.code_books import CodeBook
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const
from mer.compute.kernels.lanes import WORDS, TilePiece
from mer.compute.kernels.row_sums import (
    CodeBookFormat,
    RowGroup,
    RowWeights,
    number_pairs,
    odd_twice,
    short_of,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 19  # ggml type id
_ENTRIES, _HIGH = 32, 544  # byte offsets in the tile block
_BOOK = CodeBook("IQ1_S", 8, 8, 8)


class IQ1_S(CodeBookFormat):
    """Decoder of the IQ1_S tile."""

    block_bytes = 50
    words = 4
    zeros = True
    unit = 1 / 8
    joined = True

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        high = short_of(b, weights, _HIGH, group)
        lower = weights.moved(times(b, group, 64)).load(_ENTRIES, WORDS)
        scale = odd_twice(b, high, 3, 12)
        zero = b.add(b.and_(b.lshr(high, const(WORDS, 14)), const(WORDS, 2)), const(WORDS, 7))
        return [scale, b.mul(scale, zero), *number_pairs(b, lower, high, 3, 3)]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        return RowWeights(_BOOK.look_up(b, row.prepared_numbers(2, 4)))


FORMATS[KIND] = IQ1_S()


@step(TileProductWords)
def matmul_iq1_s(row: int, thread: int, _n_threads: int) -> None:
    """IQ1_S matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq1_s_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ1_S matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq1_s(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ1_S from rows as in the file."""
    interleave_rows(row, thread, KIND)
