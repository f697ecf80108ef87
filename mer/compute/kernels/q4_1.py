"""Q4_1: blocks of 32 weights, half-float scale and minimum, 16 bytes of nibbles; weight = scale * nibble + minimum.

Two fmas per block: that of the nibbles, then that of the minimum. Tile block, 320 bytes: 16 half scales, 16 half
minima, then 4 vectors of nibbles as in Q4_0. Format: ggml's `block_q4_1`.
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import fma, widen_half
from mer.compute.kernels.lanes import FLOATS, SHORTS, TilePiece
from mer.compute.kernels.q4_0 import nibbles
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, block_dot, joined, matmul_rows

KIND = 3  # ggml type id


def add_with_minimum(b: Any, total: Any, scale: Any, minimum: Any, column: ActivationColumn, c: int, acc: Any) -> None:
    """Add to `acc` a block's integer sum times its scale, then the sum of its activations times its minimum."""
    activation = column.scale(c)
    value = fma(b, b.sitofp(total, FLOATS), b.fmul(scale, activation), b.load(acc))
    lift = b.sitofp(joined(b, [column.sum(plane, c, [0], 1) for plane in range(column.planes)]), FLOATS)
    b.store(fma(b, lift, b.fmul(minimum, activation), value), acc)


class Q4_1:
    """Decoder of the Q4_1 tile."""

    block_weights = 32
    block_bytes = 20
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, weights.load(0, SHORTS))
        minimum = widen_half(b, weights.load(32, SHORTS))
        quants = Quants(nibbles(b, weights, 64), 15)
        for c in range(columns):
            add_with_minimum(b, block_dot(b, quants, column, c), scale, minimum, column, c, acc[c])


FORMATS[KIND] = Q4_1()


@step(TileProductWords)
def matmul_q4_1(row: int, thread: int, _n_threads: int) -> None:
    """Q4_1 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q4_1_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q4_1 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q4_1(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q4_1 from rows as in the file."""
    interleave_rows(row, thread, KIND)
