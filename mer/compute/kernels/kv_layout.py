"""The layout of the keys and values of one kv head at 64 positions, and the arguments of a pass over them.

A tile is K, or V, of one kv head at 64 positions, in every type that the KV cache may have: F32, F16 (rounded to
nearest even) and Q8_0. A pass reads it from the first byte to the last, as memory is fastest; with registers for fewer
sums, each half twice. Of K it takes 32 positions side by side and walks the elements, [2, C, 32]; of V 32 elements side
by side and walks the positions, [P / 32, 64, 32], P being the head dimension C rounded up to 32. The int8 of Q8_0 lie
in pairs, of two elements in K, [2, C / 2, 32, 2], and of two positions in V, [P / 32, 32, 32, 2]; behind them lies a
half float scale for each block of 32 elements of a position, [P / 32, 64]. Blocks are rounded as ggml's reference does:
scale = max|x| / 127, q = x * (1 / scale) to the nearest integer, ties away from zero; a block that holds NaN or
infinity becomes NaN.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from llvmlite import ir

from mer.compute.kernels.ir import I32, V16I32, i64, prefetch, splat
from mer.compute.kernels.lanes import PIECES
from mer.compute.kernels.numba_api import njit

KV_TILE: Final = 64  # positions in a tile, and in a KV block
F32_KIND, F16_KIND, Q8_0_KIND = 0, 1, 8  # ggml type ids
BLOCK: Final = 32  # elements of a Q8_0 block
SIZE: Final = {F32_KIND: 4, F16_KIND: 2, Q8_0_KIND: 1}  # bytes of a value
SCORE_BYTES: Final = 4 * KV_TILE  # of one row


def tile_bytes(kind: int, head_dim: int) -> int:
    """Return the bytes of K, or of V, of one kv head at 64 positions."""
    padded = -(-head_dim // BLOCK) * BLOCK
    return KV_TILE * padded * SIZE[kind] + (2 * KV_TILE * padded // BLOCK if kind == Q8_0_KIND else 0)


@njit
def size_of_tile(kind, padded):  # type: ignore[no-untyped-def]
    """Return `tile_bytes` of heads of so many elements, a multiple of 32."""
    if kind == F32_KIND:
        return 256 * padded
    return 128 * padded if kind == F16_KIND else 68 * padded


class Pass(NamedTuple):
    """IR values of one pass over a tile: addresses, sizes in elements, and the positions `first` before `last`."""

    keys: Any
    values: Any
    ahead: Any  # the next tile's keys
    c: Any
    padded: Any  # P
    q: Any
    scores: Any
    out: Any
    maxima: Any
    totals: Any
    first: Any
    last: Any

    def scales(self, b: Any, tile: Any) -> Any:
        """Return the address of the scales of a tile of Q8_0."""
        return b.add(tile, b.mul(self.padded, i64(KV_TILE)))

    def counting(self, b: Any, v: int) -> Any:
        """Return which of the 16 positions from 16 v on count, as <16 x i1>."""
        lanes = ir.Constant(V16I32, list(range(16 * v, 16 * v + 16)))
        low, high = (splat(b, b.trunc(edge, I32), V16I32) for edge in (self.first, self.last))
        return b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))

    def targets(self, b: Any, n_rows: int) -> list[Any]:
        """Return the addresses of the results of each row."""
        return [b.add(self.out, b.mul(b.mul(self.padded, i64(4)), i64(r))) for r in range(n_rows)]


def vectors_at_once(n_rows: int) -> int:
    """Return how many vectors of keys or values, 1 or 2, meet so many rows at once: as far as sums fit registers."""
    return 2 if PIECES == 1 or n_rows <= 2 else 1


def ask(b: Any, ahead: Any, step: Any, n_bytes: int) -> None:
    """Ask for what comes next, from the second cache on; two tiles would not fit the first beside each other."""
    for line in range(0, n_bytes, 64):
        prefetch(b, b.add(ahead, b.mul(step, i64(n_bytes))), line, 2)
