"""MXFP4: blocks of 32 weights, an exponent byte and 16 bytes of nibbles; weight = 2**(exponent - 128) * VALUES[nibble].

The values are those of 4-bit floats (E2M1), doubled, and looked up with 12 added, so that they are the unsigned operand
of the dot product; that is taken back through the sum of the activations. No exponent stands for NaN: as in ggml, 255
is 2**127 like any other, so that a weight may be infinite only as a product in float32.

Tile block, 272 bytes: 16 exponents, then 4 vectors of nibbles as in Q4_0. Format: ggml's `block_mxfp4` (e, qs[16]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Quants
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const
from mer.compute.kernels.lanes import BYTES, FLOATS, WORDS, TilePiece, lookup16
from mer.compute.kernels.q4_0 import nibbles
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, accumulate_block, matmul_rows

KIND = 39  # ggml type id
VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
OFFSET = 12


def power(b: Any, exponents: Any) -> Any:
    """Return 2**(exponent - 128) as float32 for 16 exponents, given as <16 x i8>; the first two are subnormal."""
    wide = b.zext(exponents, WORDS)
    normal = b.shl(b.sub(wide, const(WORDS, 1)), const(WORDS, 23))
    subnormal = b.shl(const(WORDS, 1 << 21), wide)
    # shifting by 32 bits or more has no defined result, which `select` passes over
    return b.bitcast(b.select(b.icmp_unsigned("<", wide, const(WORDS, 2)), subnormal, normal), FLOATS)


class MXFP4:
    """Decoder of the MXFP4 tile."""

    block_weights = 32
    block_bytes = 17
    sums_per_block = 1

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = power(b, weights.load(0, BYTES))
        table = [value + OFFSET for value in VALUES]
        vectors = [lookup16(b, table, vector) for vector in nibbles(b, weights, 16)]
        accumulate_block(b, scale, Quants(vectors, max(table), OFFSET), column, acc)


FORMATS[KIND] = MXFP4()


@step(TileProductWords)
def matmul_mxfp4(row: int, thread: int, _n_threads: int) -> None:
    """MXFP4 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_mxfp4_a15(row: int, thread: int, _n_threads: int) -> None:
    """MXFP4 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_mxfp4(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of MXFP4 from rows as in the file."""
    interleave_rows(row, thread, KIND)
