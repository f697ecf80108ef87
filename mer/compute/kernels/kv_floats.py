"""Keys and values of F32 and F16 meet queries and powers: all in float32, to which F16 is widened exactly."""

from __future__ import annotations

from typing import Any

from mer.compute.kernels.ir import F32, I64, V16F32, V16I16, const, fma, i64, load, splat, store, widen_half
from mer.compute.kernels.kv_layout import F32_KIND, KV_TILE, SCORE_BYTES, SIZE, Pass, ask, vectors_at_once
from mer.compute.kernels.numba_api import cgutils


def _values(b: Any, kind: int, address: Any, offset: Any) -> Any:
    """Load 16 values as float32."""
    if kind == F32_KIND:
        return load(b, address, offset, V16F32, 4)
    return widen_half(b, load(b, address, offset, V16I16, 2))


def _multiply(b: Any, acc: list[list[Any]], vectors: list[Any], scalars: list[Any]) -> None:
    """Add each row's scalar times each vector to the row's sums."""
    for sums, scalar in zip(acc, scalars, strict=True):
        lanes = splat(b, scalar, V16F32)
        for total, vector in zip(sums, vectors, strict=True):
            b.store(fma(b, vector, lanes, b.load(total)), total)


def score_rows(b: Any, kind: int, n_rows: int, at: Pass) -> None:
    """Write the dot products [rows, 64] of queries q [C, 8], of which the first `n_rows` count, with a tile's keys."""
    size, n_vectors = SIZE[kind], vectors_at_once(n_rows)
    with cgutils.for_range(b, i64(KV_TILE // (16 * n_vectors)), intp=I64) as part:
        first = b.mul(part.index, i64(16 * n_vectors))
        acc = [[cgutils.alloca_once(b, V16F32) for _ in range(n_vectors)] for _ in range(n_rows)]
        for one in (one for row in acc for one in row):
            b.store(const(V16F32, 0.0), one)
        side = b.add(b.mul(b.mul(b.lshr(first, i64(5)), at.c), i64(32)), b.and_(first, i64(31)))
        with cgutils.for_range(b, at.c, intp=I64) as loop:
            ask(b, at.values, b.add(b.mul(part.index, at.c), loop.index), 16 * size * n_vectors)
            place = b.mul(b.add(side, b.mul(loop.index, i64(32))), i64(size))
            keys = [_values(b, kind, at.keys, b.add(place, i64(16 * size * v))) for v in range(n_vectors)]
            offset = b.mul(loop.index, i64(32))
            _multiply(b, acc, keys, [load(b, at.q, b.add(offset, i64(4 * r)), F32, 4) for r in range(n_rows)])
        for r in range(n_rows):
            for v in range(n_vectors):
                place = b.add(b.mul(first, i64(4)), i64(SCORE_BYTES * r + 64 * v))
                store(b, b.load(acc[r][v]), at.scores, place, 4)


def mix_rows(b: Any, kind: int, n_rows: int, at: Pass, keeps: list[Any]) -> None:
    """Write out = out * keep + sum over positions from `first` before `last` of powers * values, in order.

    For `n_rows` rows: out [rows, P], powers [rows, 64] in place of the scores, float32.
    """
    size, targets = SIZE[kind], at.targets(b, n_rows)
    n_vectors = vectors_at_once(n_rows)
    chunks = b.udiv(at.padded, i64(16 * n_vectors))
    with cgutils.for_range(b, chunks, intp=I64) as chunk:
        acc = [[cgutils.alloca_once(b, V16F32) for _ in range(n_vectors)] for _ in range(n_rows)]
        place = b.mul(chunk.index, i64(64 * n_vectors))
        for r in range(n_rows):
            for v in range(n_vectors):
                old = load(b, targets[r], b.add(place, i64(64 * v)), V16F32, 4)
                b.store(b.fmul(old, keeps[r]), acc[r][v])
        element = b.mul(chunk.index, i64(16 * n_vectors))
        column = b.add(b.mul(b.lshr(element, i64(5)), i64(32 * KV_TILE)), b.and_(element, i64(31)))
        with cgutils.for_range(b, b.sub(at.last, at.first), intp=I64) as loop:
            position = b.add(at.first, loop.index)
            ask(b, at.ahead, b.add(b.mul(chunk.index, i64(KV_TILE)), loop.index), 16 * size * n_vectors)
            here = b.mul(b.add(column, b.mul(position, i64(32))), i64(size))
            values = [_values(b, kind, at.values, b.add(here, i64(16 * size * v))) for v in range(n_vectors)]
            offset = b.mul(position, i64(4))
            powers = [load(b, at.scores, b.add(offset, i64(SCORE_BYTES * r)), F32, 4) for r in range(n_rows)]
            _multiply(b, acc, values, powers)
        for r in range(n_rows):
            for v in range(n_vectors):
                store(b, b.load(acc[r][v]), targets[r], b.add(place, i64(64 * v)), 4)
