"""IQ4_NL: blocks of 32 weights, a half-float scale and 16 bytes of nibbles; weight = scale * VALUES[nibble].

The values are looked up with 128 added, so that they are the unsigned operand of the dot product; that is taken back
through the sum of the activations. Tile block as in Q4_0. Format: ggml's `block_iq4_nl` (d, qs[16]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import widen_half
from mer.compute.kernels.lanes import SHORTS, TilePiece, lookup16
from mer.compute.kernels.q4_0 import nibbles
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, accumulate_block, matmul_rows

KIND = 20  # ggml type id
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
OFFSET = 128


class IQ4_NL:
    """Decoder of the IQ4_NL tile."""

    block_weights = 32
    block_bytes = 18
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, weights.load(0, SHORTS))
        table = [value + OFFSET for value in VALUES]
        vectors = [lookup16(b, table, vector) for vector in nibbles(b, weights, 32)]
        accumulate_block(b, scale, Quants(vectors, max(table), OFFSET), column, acc)


FORMATS[KIND] = IQ4_NL()


@step(TileProductWords)
def matmul_iq4_nl(row: int, thread: int, _n_threads: int) -> None:
    """IQ4_NL matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_iq4_nl_a15(row: int, thread: int, _n_threads: int) -> None:
    """IQ4_NL matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_iq4_nl(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of IQ4_NL from rows as in the file."""
    interleave_rows(row, thread, KIND)
