"""IQ2_XS: super-blocks of 256 weights, 8 to an entry of a code book, in 16 sub-blocks with 4-bit sub-scales, one
half-float scale; weight = scale / 8 * (2 * sub-scale + 1) * sign * magnitude, the magnitude 8, 25 or 43.

Arithmetic as in IQ2_XXS. Tile block, 1184 bytes: 16 half scales, then 4 bytes of each row to a vector, in the file's
order: for each entry its number, 9 bits, and its signs, 7 bits, then the sub-scales. Format: ggml's `block_iq2_xs` (d,
qs[32], scales[8]).
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
    byte_of,
    odd_pair,
    with_parity,
)
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 17  # ggml type id
_ENTRIES, _SCALES = 32, 1056  # byte offsets in the tile block
_BOOK = CodeBook("IQ2_XS", 8)


class IQ2_XS(CodeBookFormat):
    """Decoder of the IQ2_XS tile."""

    block_bytes = 74
    words = 4
    halves = True
    unit = 1 / 8

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> list[Any]:
        """See `CodeBookBlocks`."""
        here = weights.moved(times(b, group, 128))
        first, second = (here.load(_ENTRIES + 64 * i, WORDS) for i in range(2))
        signs = const(WORDS, 0)
        for i, (words, right) in enumerate(((first, 9), (first, 17), (second, -7), (second, 1))):
            moved = b.lshr(words, const(WORDS, right)) if right > 0 else b.shl(words, const(WORDS, -right))
            signs = b.or_(signs, b.and_(moved, const(WORDS, 0x7F << 8 * i)))
        numbers = [b.and_(words, const(WORDS, 0x01FF01FF)) for words in (first, second)]
        scales = odd_pair(b, byte_of(b, weights, _SCALES, group), 4, 0, 4)
        return [scales, with_parity(b, signs), *numbers]

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """See `CodeBookBlocks`."""
        return RowWeights(_BOOK.look_up(b, row.prepared_numbers(2, 4)), row.negative(1))


FORMATS[KIND] = IQ2_XS()


@step(TileProductWords)
def matmul_iq2_xs(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_XS matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq2_xs_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ2_XS matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq2_xs(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ2_XS from rows as in the file."""
    interleave_rows(row, thread, KIND)
