"""NVFP4: blocks of 64 weights in 4 sub-blocks of 16, each with a scale of 8 bits and 8 bytes of nibbles; weight =
scale / 2 * VALUES[nibble], with MXFP4's values, looked up as there.

A scale is a float of 4 bits exponent and 3 bits fraction (UE4M3). As in ggml, its upper bit says nothing, and 0x7F, NaN
elsewhere, is 0. A sub-block ends in one fma; the integer sum of two planes is at most 16 * 24 * 127 * 129 < 2**23.

Tile block, 576 bytes, 4 bytes of each row to a vector, in the file's order: the scales, then two vectors of nibbles for
each sub-block, whose lower halves come first. Format: ggml's `block_nvfp4` (d[4], qs[32]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Place, Quants, dots
from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import const, fma
from mer.compute.kernels.lanes import FLOATS, PAIRS, QUADS, WORDS, TilePiece, lookup16
from mer.compute.kernels.mxfp4 import OFFSET, VALUES
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, TileProductWords, joined, matmul_rows

KIND = 40  # ggml type id
_NIBBLES = 64  # byte offset in the tile block


def half_scale(b: Any, words: Any) -> Any:
    """Return half of the float in the lowest byte of words, as float32.

    Exponent and fraction are put in float32's place; the product makes up for the other bias, also where the number is
    subnormal in both.
    """
    bits = b.shl(b.and_(words, const(WORDS, 0x7F)), const(WORDS, 20))
    scaled = b.fmul(b.bitcast(bits, FLOATS), const(FLOATS, 2.0**119))
    is_none = b.icmp_unsigned("==", b.and_(words, const(WORDS, 0xFF)), const(WORDS, 0x7F))
    return b.select(is_none, const(FLOATS, 0.0), scaled)


class NVFP4:
    """Decoder of the NVFP4 tile."""

    block_weights = 64
    block_bytes = 36
    sums_per_block = 4

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scales = weights.load(0, WORDS)
        table = [value + OFFSET for value in VALUES]
        for number in range(4):
            packed = [weights.load(_NIBBLES + 128 * number + 64 * j, QUADS) for j in range(2)]
            upper = [b.bitcast(b.lshr(b.bitcast(vector, PAIRS), const(PAIRS, 4)), QUADS) for vector in packed]
            vectors = [lookup16(b, table, b.and_(vector, const(QUADS, 15))) for vector in packed + upper]
            quants = Quants(vectors, max(table), OFFSET)
            scale = half_scale(b, b.lshr(scales, const(WORDS, 8 * number)) if number else scales)
            for c in range(columns):
                planes = [dots(b, quants, Place(column, p, c, 16 * number, (number,))) for p in range(column.planes)]
                total = b.sitofp(joined(b, planes), FLOATS)
                b.store(fma(b, total, b.fmul(scale, column.scale(c)), b.load(acc[c])), acc[c])


FORMATS[KIND] = NVFP4()


@step(TileProductWords)
def matmul_nvfp4(row: int, thread: int, _n_threads: int) -> None:
    """NVFP4 matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_nvfp4_a15(row: int, thread: int, _n_threads: int) -> None:
    """NVFP4 matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_nvfp4(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of NVFP4 from rows as in the file."""
    interleave_rows(row, thread, KIND)
