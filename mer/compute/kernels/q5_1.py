"""Q5_1: blocks of 32 weights of 5 bits, half-float scale and minimum; weight = scale * q + minimum.

Tile block, 384 bytes: a vector with scale and minimum of each row, then high bits and nibbles as in Q5_0. Two fmas per
block: that of the weights, then that of the minimum. Format: ggml's `block_q5_1` (d, m, qh[4], qs[16]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.lanes import TilePiece, half_pair
from mer.compute.kernels.q4_1 import add_with_minimum
from mer.compute.kernels.q5_0 import five_bits
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, block_dot, matmul_rows

KIND = 7  # ggml type id


class Q5_1:
    """Decoder of the Q5_1 tile."""

    block_weights = 32
    block_bytes = 24
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale, minimum = half_pair(b, weights, 0)
        quants = Quants(five_bits(b, weights, 64), 31)
        for c in range(columns):
            add_with_minimum(b, block_dot(b, quants, column, c), scale, minimum, column, c, acc[c])


FORMATS[KIND] = Q5_1()


@step(TileProductWords)
def matmul_q5_1(row: int, thread: int, _n_threads: int) -> None:
    """Q5_1 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q5_1_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q5_1 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q5_1(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q5_1 from rows as in the file."""
    interleave_rows(row, thread, KIND)
