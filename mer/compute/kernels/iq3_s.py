"""IQ3_S: super-blocks of 256 weights, 4 to an entry of a code book, in 8 groups with 4-bit sub-scales, one half-float
scale; weight = scale * (2 * sub-scale + 1) * sign * magnitude, the magnitude odd from 1 to 15.

Arithmetic as in `row_sums.py`: the integer sum of two planes is at most 256 * 31 * 15 * 127 * 129 < 2**31, so that one
fma takes both. Tile block, 1760 bytes: 16 half scales, then 4 bytes of each row to a vector, in the file's order: the
lower 8 bits of the numbers of 64 entries, the ninth ones, signs, sub-scales. Format: ggml's `block_iq3_s` (d, qs[64],
qh[8], signs[32], scales[4]).
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
    odd_twice,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import shifted, times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 21  # ggml type id
_ENTRIES, _HIGH, _SIGNS, _SCALES = 32, 1056, 1184, 1696  # byte offsets in the tile block
_BOOK = CodeBook("IQ3_S", 4)


class IQ3_S(CodeBookFormat):
    """Decoder of the IQ3_S tile."""

    block_bytes = 110
    words = 6
    joined = True

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        here, high = weights.moved(times(b, group, 128)), byte_of(b, weights, _HIGH, group)
        scale = shifted(b, weights.load(_SCALES, WORDS), times(b, group, 4))
        signs = weights.moved(times(b, group, 64)).load(_SIGNS, WORDS)
        lower = (here.load(_ENTRIES + 64 * i, WORDS) for i in range(2))
        numbers = [pair for i, word in enumerate(lower) for pair in number_pairs(b, word, high, 1, 1, 4 * i)]
        return [odd_twice(b, scale, 4, 0), signs, *numbers]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        return RowWeights(_BOOK.look_up(b, row.prepared_numbers(2, 8)), row.negative(1))


FORMATS[KIND] = IQ3_S()


@step(TileProductWords)
def matmul_iq3_s(row: int, thread: int, _n_threads: int) -> None:
    """IQ3_S matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq3_s_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ3_S matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq3_s(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ3_S from rows as in the file."""
    interleave_rows(row, thread, KIND)
