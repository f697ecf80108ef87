"""IQ2_XXS: super-blocks of 256 weights, 8 to an entry of a code book, in 8 groups with 4-bit sub-scales, one half-float
scale; weight = scale / 8 * (2 * sub-scale + 1) * sign * magnitude, the magnitude 8, 25 or 43.

Arithmetic as in `row_sums.py`: the integer sum of a plane is at most 256 * 31 * 43 * 127 < 2**26, and two do not fit
int32 together. Tile block, 1056 bytes: 16 half scales, then 4 bytes of each row to a vector, in the file's order: for
each group the numbers of 4 entries, then their signs, 7 bits each, as the negative ones of 8 weights are even, and the
sub-scale in the upper 4 bits. Format: ggml's `block_iq2_xxs` (d, qs[32]).
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
    odd_twice,
    sevens,
    with_parity,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 16  # ggml type id
_ENTRIES, _SIGNS = 32, 96  # byte offsets in the tile block
_BOOK = CodeBook("IQ2_XXS", 8)


class IQ2_XXS(CodeBookFormat):
    """Decoder of the IQ2_XXS tile."""

    block_bytes = 66
    words = 2
    unit = 1 / 8

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        packed = weights.moved(times(b, group, 128)).load(_SIGNS, WORDS)
        return [odd_twice(b, packed, 4, 28), with_parity(b, sevens(b, packed))]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        return RowWeights(_BOOK.look_up(b, row.numbers(_ENTRIES, 128, 4)), row.negative(1))


FORMATS[KIND] = IQ2_XXS()


@step(TileProductWords)
def matmul_iq2_xxs(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_XXS matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq2_xxs_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_XXS matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq2_xxs(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ2_XXS from rows as in the file."""
    interleave_rows(row, thread, KIND)
