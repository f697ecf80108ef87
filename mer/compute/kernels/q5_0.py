"""Q5_0: blocks of 32 weights of 5 bits and a half-float scale; weight = scale * (q - 16).

Tile block, 352 bytes: 16 half scales, a vector with each row's 32 high bits, bit i for weight i, then 4 vectors of
nibbles as in Q4_0. Format: ggml's `block_q5_0` (d, qh[4], qs[16]).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import I32, const, widen_half
from mer.compute.kernels.lanes import QUADS, SHORTS, TilePiece
from mer.compute.kernels.q4_0 import nibbles
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, accumulate_block, matmul_rows

KIND = 6  # ggml type id


def five_bits(b: Any, weights: TilePiece, offset: int) -> list[Any]:
    """Return the weights of each row as 8 vectors of bytes; the high bits are at `offset`, the nibbles behind them."""
    bits = weights.load(offset, QUADS)
    out = []
    for four, vector in enumerate(nibbles(b, weights, offset + 64)):  # of weights
        place = ir.Constant(ir.VectorType(I32, QUADS.count), [byte // 4 * 4 + four // 2 for byte in range(QUADS.count)])
        mask = ir.Constant(QUADS, [1 << 4 * (four % 2) + byte % 4 for byte in range(QUADS.count)])
        chosen = b.and_(b.shuffle_vector(bits, bits, place), mask)
        fifth = b.select(b.icmp_unsigned("!=", chosen, const(QUADS, 0)), const(QUADS, 16), const(QUADS, 0))
        out.append(b.or_(vector, fifth))
    return out


class Q5_0:
    """Decoder of the Q5_0 tile."""

    block_weights = 32
    block_bytes = 22
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, weights.load(0, SHORTS))
        accumulate_block(b, scale, Quants(five_bits(b, weights, 32), 31, 16), column, acc)


FORMATS[KIND] = Q5_0()


@step(TileProductWords)
def matmul_q5_0(row: int, thread: int, _n_threads: int) -> None:
    """Q5_0 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q5_0_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q5_0 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q5_0(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q5_0 from rows as in the file."""
    interleave_rows(row, thread, KIND)
