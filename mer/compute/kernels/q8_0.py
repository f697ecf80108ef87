"""Q8_0: blocks of 32 int8 weights and a half-float scale; weight = scale * int8.

Tile block, 544 bytes: 16 half scales, then 8 vectors; vector j holds for each row weights 4j..4j+3, stored unsigned
(+128) so that they are the unsigned operand of the dot product. Format: ggml's `block_q8_0`.
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import widen_half
from mer.compute.kernels.lanes import QUADS, SHORTS, TilePiece
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, accumulate_block, matmul_rows

KIND = 8  # ggml type id


class Q8_0:
    """Decoder of the Q8_0 tile."""

    block_weights = 32
    block_bytes = 34
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, weights.load(0, SHORTS))
        vectors = [weights.load(32 + 64 * j, QUADS) for j in range(8)]
        accumulate_block(b, scale, Quants(vectors, 255, 128), column, acc)


FORMATS[KIND] = Q8_0()


@step(TileProductWords)
def matmul_q8_0(row: int, thread: int, _n_threads: int) -> None:
    """Q8_0 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q8_0_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q8_0 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q8_0(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q8_0 from rows as in the file."""
    interleave_rows(row, thread, KIND)
