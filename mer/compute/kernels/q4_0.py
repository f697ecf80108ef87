"""Q4_0: blocks of 32 weights, a half-float scale and 16 bytes of nibbles; weight = scale * (nibble - 8).

Tile block, 288 bytes: 16 half scales, then 4 vectors; vector j holds for each row weights 4j..4j+3 in the low nibbles
and 16+4j..16+4j+3 in the high ones. Format: ggml's `block_q4_0`.
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const, widen_half
from mer.compute.kernels.lanes import PAIRS, QUADS, SHORTS, TilePiece
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, accumulate_block, matmul_rows

KIND = 2  # ggml type id


def nibbles(b: Any, weights: TilePiece, offset: int) -> list[Any]:
    """Return the 4 vectors of low nibbles and the 4 of high ones of 16 bytes of each row."""
    low, high = [], []
    for j in range(4):
        packed = weights.load(offset + 64 * j, QUADS)
        shifted = b.bitcast(b.lshr(b.bitcast(packed, PAIRS), const(PAIRS, 4)), QUADS)
        low.append(b.and_(packed, const(QUADS, 15)))
        high.append(b.and_(shifted, const(QUADS, 15)))
    return low + high


class Q4_0:
    """Decoder of the Q4_0 tile."""

    block_weights = 32
    block_bytes = 18
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, weights.load(0, SHORTS))
        accumulate_block(b, scale, Quants(nibbles(b, weights, 32), 15, 8), column, acc)


FORMATS[KIND] = Q4_0()


@step(TileProductWords)
def matmul_q4_0(row: int, thread: int, _n_threads: int) -> None:
    """Q4_0 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q4_0_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q4_0 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q4_0(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q4_0 from rows as in the file."""
    interleave_rows(row, thread, KIND)
