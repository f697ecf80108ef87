"""Q6_K: super-blocks of 256 weights of 6 bits, 16 int8 sub-scales, one half-float scale; weight = scale * sub * (q -
32).

The integer sum of a whole super-block is exact in int32 (256 * 32 * 127 * 128 < 2**28); one fma per super-block
follows. Tile block, 3360 bytes: 16 half scales, 16 vectors of 16 int8 sub-scales, the 128 bytes of low nibbles of each
row as 32 vectors and its 64 bytes of high bit pairs as 16 vectors, 4 bytes of each row to a vector, in the file's
order. Format: ggml's `block_q6_K` (ql[128], qh[64], scales[16], d).
"""

from __future__ import annotations

import itertools
from typing import Any

from mer.compute.kernels.interleave import interleave_rows
from mer.compute.kernels.ir import (
    I64,
    V16F32,
    V16I8,
    V16I16,
    V16I32,
    V32I16,
    V64I8,
    const,
    dot4,
    fma,
    i64,
    load,
    widen_half,
)
from mer.compute.kernels.numba_api import cgutils
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, PLANE_SHIFT, ActivationColumn, matmul_rows

KIND = 14  # ggml type id
_SCALES, _LOW, _HIGH = 32, 288, 2336  # byte offsets in the tile block


class Q6_K:
    """Decoder of the Q6_K tile."""

    block_weights = 256
    block_bytes = 210
    sums_per_block = 16

    def _weights(self, b: Any, low: list[Any], high: list[Any], quarter: int) -> list[Any]:
        """Return 4 vectors with the 16 six-bit weights of each row from quarter `quarter` of a half, as bytes."""
        vectors = []
        for j in range(4):
            nibbles = low[4 * (quarter % 2) + j]
            if quarter >= 2:
                nibbles = b.lshr(nibbles, const(V32I16, 4))
            pairs, shift = high[j], 4 - 2 * quarter
            if shift > 0:
                pairs = b.shl(pairs, const(V32I16, shift))
            elif shift < 0:
                pairs = b.lshr(pairs, const(V32I16, -shift))
            nibble = b.and_(b.bitcast(nibbles, V64I8), const(V64I8, 0x0F))
            vectors.append(b.or_(nibble, b.and_(b.bitcast(pairs, V64I8), const(V64I8, 0x30))))
        return vectors

    def accumulate(self, b: Any, weights: Any, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`. A loop over (half, odd), so that the code of 16 sub-blocks is compiled as that of 4."""
        planes = range(column.planes)
        totals = [[cgutils.alloca_once_value(b, const(V16I32, 0)) for _ in range(columns)] for _ in planes]
        with cgutils.for_range(b, i64(4), intp=I64) as loop:
            half, odd = b.lshr(loop.index, i64(1)), b.and_(loop.index, i64(1))
            sub = b.add(b.mul(half, i64(8)), odd)  # the first of sub-blocks sub, sub + 2, sub + 4, sub + 6
            scales = b.add(weights, b.mul(sub, i64(16)))
            low = b.add(weights, b.add(b.mul(half, i64(64 * 16)), b.mul(odd, i64(64 * 4))))
            high = b.add(weights, b.mul(loop.index, i64(64 * 4)))
            lows = [load(b, low, _LOW + 64 * (8 * run + j), V32I16) for run in range(2) for j in range(4)]
            highs = [load(b, high, _HIGH + 64 * j, V32I16) for j in range(4)]
            here = column.advanced(b.mul(sub, i64(16)), sub)
            for quarter in range(4):
                vectors = self._weights(b, lows, highs, quarter)
                scale = b.sext(load(b, scales, _SCALES + 16 * 2 * quarter, V16I8), V16I32)
                for c, plane in itertools.product(range(columns), planes):
                    part = here.sum(plane, c, 2 * quarter, -32)
                    for j, vector in enumerate(vectors):
                        part = dot4(b, part, vector, here.quad(plane, c, 32 * quarter + 4 * j, V64I8))
                    total = totals[plane][c]
                    b.store(b.add(b.load(total), b.mul(part, scale)), total)
        scale = widen_half(b, load(b, weights, 0, V16I16))
        for c in range(columns):
            both = b.fmul(scale, column.scale(c))
            for plane in planes:  # joined as floats: two planes of a super-block do not fit int32 together
                weight = const(V16F32, float(1 << PLANE_SHIFT * (column.planes - 1 - plane)))
                total = b.sitofp(b.load(totals[plane][c]), V16F32)
                b.store(fma(b, total, b.fmul(both, weight), b.load(acc[c])), acc[c])


FORMATS[KIND] = Q6_K()


@step
def matmul_q6_k(row: int, thread: int, _n_threads: int) -> None:
    """Q6_K matrix product on int8 activations; arguments as in `matmul_rows`."""
    matmul_rows(row, thread, KIND, 1)


@step
def matmul_q6_k_a15(row: int, thread: int, _n_threads: int) -> None:
    """Q6_K matrix product on 15-bit activations; arguments as in `matmul_rows`."""
    matmul_rows(row, thread, KIND, 2)


@step
def interleave_q6_k(row: int, thread: int, n_threads: int) -> None:
    """Tiles of Q6_K from rows as in the file; arguments as in `interleave_rows`."""
    interleave_rows(row, thread, n_threads, KIND)
