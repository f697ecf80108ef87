"""Q6_K: super-blocks of 256 weights of 6 bits, 16 int8 sub-scales, one half-float scale; weight = scale * sub * (q -
32).

The integer sum of a whole super-block is exact in int32 (256 * 32 * 127 * 128 < 2**28); one fma per super-block
follows. Tile block, 3360 bytes: 16 half scales, 16 vectors of 16 int8 sub-scales, the 128 bytes of low nibbles of each
row as 32 vectors and its 64 bytes of high bit pairs as 16 vectors, 4 bytes of each row to a vector, in the file's
order. Format: ggml's `block_q6_K` (ql[128], qh[64], scales[16], d).
"""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.ir import V16F32, V16I8, V16I16, V16I32, V32I16, V64I8, const, dot4, fma, load, widen_half
from mer.compute.kernels.step import step
from mer.compute.kernels.tile import FORMATS, ActivationColumn, matmul_rows

KIND = 14  # ggml type id
_SCALES, _LOW, _HIGH = 32, 288, 2336  # byte offsets in the tile block


class Q6_K:
    """Decoder of the Q6_K tile."""

    block_weights = 256
    block_bytes = 210
    sums_per_block = 16

    def _quads(self, b: Any, weights: Any, sub: int) -> list[Any]:
        """Return 4 vectors with the 16 six-bit weights of sub-block `sub` of each row, as unsigned bytes."""
        half, quarter, odd = sub // 8, sub % 8 // 2, sub % 2
        vectors = []
        for j in range(4):
            low = b.bitcast(load(b, weights, _LOW + 64 * (16 * half + 8 * (quarter % 2) + 4 * odd + j), V64I8), V32I16)
            if quarter >= 2:
                low = b.lshr(low, const(V32I16, 4))
            high = b.bitcast(load(b, weights, _HIGH + 64 * (8 * half + 4 * odd + j), V64I8), V32I16)
            shift = 4 - 2 * quarter
            if shift > 0:
                high = b.shl(high, const(V32I16, shift))
            elif shift < 0:
                high = b.lshr(high, const(V32I16, -shift))
            nibble = b.and_(b.bitcast(low, V64I8), const(V64I8, 0x0F))
            vectors.append(b.or_(nibble, b.and_(b.bitcast(high, V64I8), const(V64I8, 0x30))))
        return vectors

    def accumulate(self, b: Any, weights: Any, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        totals = [const(V16I32, 0)] * columns
        for sub in range(16):
            vectors = self._quads(b, weights, sub)
            scale = b.sext(load(b, weights, _SCALES + 16 * sub, V16I8), V16I32)
            for c in range(columns):
                part = column.sum(c, sub, -32)
                for j, vector in enumerate(vectors):
                    part = dot4(b, part, vector, column.quad(c, 16 * sub + 4 * j, V64I8))
                totals[c] = b.add(totals[c], b.mul(part, scale))
        scale = widen_half(b, load(b, weights, 0, V16I16))
        for c in range(columns):
            both = b.fmul(scale, column.scale(c))
            b.store(fma(b, b.sitofp(totals[c], V16F32), both, b.load(acc[c])), acc[c])


FORMATS[KIND] = Q6_K()


@step
def matmul_q6_k(row: int, _thread: int, _n_threads: int) -> None:
    """Q6_K matrix product; arguments as in `matmul_rows`."""
    matmul_rows(row, KIND)
