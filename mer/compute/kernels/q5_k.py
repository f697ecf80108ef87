"""Q5_K: Q4_K with a fifth bit for each weight; weight = scale * sub-scale * q - minimum * sub-minimum, q from 0 to 31.

Arithmetic and order as in Q4_K (256 * 31 * 63 * 127 < 2**26). Tile block, 2816 bytes, 4 bytes of each row to a vector,
in the file's order: scale and minimum, 3 vectors of sub-scales and sub-minima, 8 of high bits, where bit s of byte i
belongs to weight i of sub-block s, 32 of nibbles. Format: ggml's `block_q5_K` (d, dmin, scales[12], qh[32], qs[128]).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.interleave import InterleaveWords, interleave_rows
from mer.compute.kernels.ir import I16, const, splat
from mer.compute.kernels.lanes import PAIRS, QUADS, TilePiece
from mer.compute.kernels.q4_k import Q4_K
from mer.compute.kernels.step import step
from mer.compute.kernels.super_block import times
from mer.compute.kernels.tile import FORMATS, TileProductWords, matmul_rows

KIND = 13  # ggml type id
_HIGH = 256  # byte offset of the high bits in the tile block


class Q5_K(Q4_K):
    """Decoder of the Q5_K tile."""

    block_bytes = 176
    _largest = 31
    _low = 768

    def _weights(self, b: Any, weights: TilePiece, turn: Any) -> list[list[Any]]:
        """Return 8 vectors of bytes for either sub-block."""
        shift = splat(b, b.trunc(times(b, turn, 2), I16), PAIRS)
        bits = [b.lshr(weights.load(_HIGH + 64 * j, PAIRS), shift) for j in range(8)]
        return [
            [
                b.or_(nibble, b.and_(b.bitcast(b.shl(bit, const(PAIRS, 4 - part)), QUADS), const(QUADS, 16)))
                for nibble, bit in zip(nibbles, bits, strict=True)
            ]
            for part, nibbles in enumerate(super()._weights(b, weights, turn))
        ]


FORMATS[KIND] = Q5_K()


@step(TileProductWords)
def matmul_q5_k(row: int, thread: int, _n_threads: int) -> None:
    """Q5_K matrix product on int8 activations."""
    matmul_rows(row, thread, KIND, 1)


@step(TileProductWords)
def matmul_q5_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q5_K matrix product on 15-bit activations."""
    matmul_rows(row, thread, KIND, 2)


@step(InterleaveWords)
def interleave_q5_k(row: int, thread: int, _n_threads: int) -> None:
    """Tiles of Q5_K from rows as in the file."""
    interleave_rows(row, thread, KIND)
