"""Q4_0: blocks of 32 weights, a half-float scale and 16 bytes of nibbles; weight = scale * (nibble - 8).

Tile block, 288 bytes: 16 half scales, then 4 vectors; vector j holds for each row weights 4j..4j+3 in the low nibbles
and 16+4j..16+4j+3 in the high ones. Format: ggml's `block_q4_0`.
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.interleave import interleave_rows
from mer.compute.kernels.ir import V16F32, V16I16, V16I32, V32I16, V64I8, const, dot4, fma, load, widen_half
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, ActivationColumn, joined, matmul_rows

KIND = 2  # ggml type id


def nibbles(b: Any, weights: Any, offset: int) -> tuple[list[Any], list[Any]]:
    """Return the 4 low-nibble and 4 high-nibble vectors of 256 packed bytes."""
    low, high = [], []
    for j in range(4):
        packed = load(b, weights, offset + 64 * j, V64I8)
        shifted = b.bitcast(b.lshr(b.bitcast(packed, V32I16), const(V32I16, 4)), V64I8)
        low.append(b.and_(packed, const(V64I8, 15)))
        high.append(b.and_(shifted, const(V64I8, 15)))
    return low, high


def nibble_dot(b: Any, zero: int, low: list[Any], high: list[Any], column: ActivationColumn, c: int) -> Any:
    """Return the 16 int32 dot products of 32 nibbles per row, less `zero`, with column c's activations."""
    planes = []
    for plane in range(column.planes):
        total = column.sum(plane, c, [0], -zero) if zero else const(V16I32, 0)
        for part, vectors in enumerate((low, high)):
            for j, vector in enumerate(vectors):
                total = dot4(b, total, vector, column.quad(plane, c, 16 * part + 4 * j, V64I8))
        planes.append(total)
    return joined(b, planes)


def accumulate_nibbles(
    b: Any, scale: Any, zero: int, low: list[Any], high: list[Any], column: ActivationColumn, acc: list[Any]
) -> None:
    """Add to each column's `acc` the product of 32 weights per row, less `zero`, with its activations, by `scale`."""
    for c, total in enumerate(acc):
        dots = nibble_dot(b, zero, low, high, column, c)
        both = b.fmul(scale, column.scale(c))
        b.store(fma(b, b.sitofp(dots, V16F32), both, b.load(total)), total)


class Q4_0:
    """Decoder of the Q4_0 tile."""

    block_weights = 32
    block_bytes = 18
    sums_per_block = 1

    def accumulate(self, b: Any, weights: Any, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        scale = widen_half(b, load(b, weights, 0, V16I16))
        low, high = nibbles(b, weights, 32)
        accumulate_nibbles(b, scale, 8, low, high, column, acc)


FORMATS[KIND] = Q4_0()


@step
def matmul_q4_0(row: int, thread: int, _n_threads: int) -> None:
    """Q4_0 matrix product on int8 activations; arguments as in `matmul_rows`."""
    matmul_rows(row, thread, KIND, 1)


@step
def matmul_q4_0_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q4_0 matrix product on 15-bit activations; arguments as in `matmul_rows`."""
    matmul_rows(row, thread, KIND, 2)


@step
def interleave_q4_0(row: int, thread: int, n_threads: int) -> None:
    """Tiles of Q4_0 from rows as in the file; arguments as in `interleave_rows`."""
    interleave_rows(row, thread, n_threads, KIND)
