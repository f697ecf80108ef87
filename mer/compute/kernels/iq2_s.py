"""IQ2_S: super-blocks of 256 weights, 8 to an entry of a code book, in 16 sub-blocks with 4-bit sub-scales, one
half-float scale; weight = scale / 8 * (2 * sub-scale + 1) * sign * magnitude, the magnitude 8, 25 or 43.

Arithmetic as in IQ2_XXS. Tile block, 1312 bytes: 16 half scales, then 4 bytes of each row to a vector, in the file's
order: the lower 8 bits of the numbers of 32 entries, signs, the upper 2 bits of the numbers, sub-scales. Format: ggml's
`block_iq2_s` (d, qs[64], qh[8], scales[8]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.code_books import CodeBook
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.lanes import WORDS, TilePiece
from mer.compute.kernels.row_sums import (
    CodeBookFormat,
    RowGroup,
    RowWeights,
    byte_of,
    number_pairs,
    odd_pair,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 22  # ggml type id
_ENTRIES, _SIGNS, _HIGH, _SCALES = 32, 544, 1056, 1184  # byte offsets in the tile block
_BOOK = CodeBook("IQ2_S", 8)


class IQ2_S(CodeBookFormat):
    """Decoder of the IQ2_S tile."""

    block_bytes = 82
    words = 4
    halves = True
    unit = 1 / 8

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        here = weights.moved(times(b, group, 64))
        numbers = number_pairs(b, here.load(_ENTRIES, WORDS), byte_of(b, weights, _HIGH, group), 2, 2)
        return [odd_pair(b, byte_of(b, weights, _SCALES, group), 4, 0, 4), here.load(_SIGNS, WORDS), *numbers]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        return RowWeights(_BOOK.look_up(b, row.prepared_numbers(2, 4)), row.negative(1))


FORMATS[KIND] = IQ2_S()


@step(TileProductWords)
def matmul_iq2_s(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_S matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq2_s_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_S matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq2_s(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ2_S from rows as in the file."""
    interleave_rows(row, thread, KIND)
