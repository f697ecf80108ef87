"""K and V of one kv head at 64 positions, a tile, in every type that the KV cache may have.

K lies with positions side by side, [C, 64]: a lane works for one position and walks the elements in order. V lies
[64, P], P being the head dimension C rounded up to 32: a lane works for one element and walks the positions in order.
The types are F32, F16 (rounded to nearest even) and Q8_0: int8, and behind all of a tile's int8 a half float
scale for each block of 32 elements of a position, [P / 32, 64]. Blocks are rounded as ggml's reference does:
scale = max|x| / 127, q = x * (1 / scale) to the nearest integer, ties away from zero; a block that holds NaN or
infinity becomes NaN.

F16 and the keys of Q8_0 are widened to float32 exactly, so that all types share their arithmetic, except that Q8_0's
scales are multiplied with the powers that meet the values instead of with these.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from llvmlite import ir
from numba import types

from mer.compute.kernels.ir import (
    F32,
    I8,
    I32,
    I64,
    V16F32,
    V16I8,
    V16I16,
    V16I32,
    const,
    fma,
    i64,
    load,
    narrow_half,
    prefetch,
    splat,
    store,
    sum16,
    widen_half,
)
from mer.compute.kernels.numba_api import cgutils, intrinsic
from mer.compute.kernels.vector import exp_vector

KV_TILE: Final = 64  # positions in a tile, and in a KV block
F32_KIND, F16_KIND, Q8_0_KIND = 0, 1, 8  # ggml type ids
BLOCK: Final = 32  # elements of a Q8_0 block
_SIZE: Final = {F32_KIND: 4, F16_KIND: 2, Q8_0_KIND: 1}
_SCORE_BYTES: Final = 4 * KV_TILE  # of one row


def tile_bytes(kind: int, head_dim: int) -> int:
    """Return the bytes of K, or of V, of one kv head at 64 positions."""
    padded = -(-head_dim // BLOCK) * BLOCK
    return KV_TILE * padded * _SIZE[kind] + (2 * KV_TILE * padded // BLOCK if kind == Q8_0_KIND else 0)


def _values(b: Any, kind: int, address: Any, offset: Any) -> Any:
    """Load 16 values as float32; of Q8_0 without their scale."""
    if kind == F32_KIND:
        return load(b, address, offset, V16F32, 4)
    if kind == F16_KIND:
        return widen_half(b, load(b, address, offset, V16I16, 2))
    return b.sitofp(b.sext(load(b, address, offset, V16I8, 1), V16I32), V16F32)


def _ask(b: Any, kind: int, ahead: Any, step: Any) -> None:
    """Ask for a step's share of a tile, from the second cache on; a pass over a tile has about 2 C steps.

    Two tiles would not fit the first cache beside each other.
    """
    share = {F32_KIND: 128, F16_KIND: 64, Q8_0_KIND: 34}[kind]
    for line in range(0, share, 64):
        prefetch(b, b.add(ahead, b.mul(step, i64(share))), line, 2)


class _Pass(NamedTuple):
    """IR values of one pass over a tile."""

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


def _score_rows(b: Any, ty: int, n_rows: int, at: _Pass) -> None:
    """Write the dot products [rows, 64] of queries q [C, 8], of which the first `n_rows` count, with a tile's keys."""
    size = _SIZE[ty]
    scales = b.add(at.keys, b.mul(at.padded, i64(KV_TILE)))
    block = i64(BLOCK) if ty == Q8_0_KIND else at.c
    with cgutils.for_range(b, i64(2), intp=I64) as half:
        first = b.mul(half.index, i64(32))
        acc = [[cgutils.alloca_once(b, V16F32) for _ in range(2)] for _ in range(n_rows)]
        for one in (part for row in acc for part in row):
            b.store(const(V16F32, 0.0), one)
        with cgutils.for_range(b, b.udiv(at.c, block), intp=I64) as outer:
            begin = b.mul(outer.index, block)
            factors = []
            if ty == Q8_0_KIND:
                place = b.mul(b.add(b.mul(outer.index, i64(KV_TILE)), first), i64(2))
                factors = [widen_half(b, load(b, scales, b.add(place, i64(32 * v)), V16I16, 2)) for v in range(2)]
            with cgutils.for_range(b, block, intp=I64) as loop:
                index = b.add(begin, loop.index)
                _ask(b, ty, at.values, b.add(b.mul(half.index, at.c), index))
                place = b.mul(b.add(b.mul(index, i64(KV_TILE)), first), i64(size))
                ks = [_values(b, ty, at.keys, b.add(place, i64(16 * size * v))) for v in range(2)]
                if factors:
                    ks = [b.fmul(k, factor) for k, factor in zip(ks, factors, strict=True)]
                offset = b.mul(index, i64(32))
                for r in range(n_rows):
                    query = splat(b, load(b, at.q, b.add(offset, i64(4 * r)), F32, 4), V16F32)
                    for v in range(2):
                        b.store(fma(b, ks[v], query, b.load(acc[r][v])), acc[r][v])
        for r in range(n_rows):
            for v in range(2):
                place = b.add(b.mul(first, i64(4)), i64(_SCORE_BYTES * r + 64 * v))
                store(b, b.load(acc[r][v]), at.scores, place, 4)


def _mix_rows(b: Any, ty: int, n_rows: int, at: _Pass, keeps: list[Any]) -> None:
    """Write out = out * keep + sum over positions from `first` before `last` of powers * values, in order.

    For `n_rows` rows: out [rows, P], powers [rows, 64], float32. Of Q8_0 the powers are multiplied by the scales.
    """
    size = _SIZE[ty]
    powers = at.scores
    if ty == Q8_0_KIND:
        powers = b.add(at.scores, i64(8 * _SCORE_BYTES + 64))
    scales = b.add(at.values, b.mul(at.padded, i64(KV_TILE)))
    row_bytes = b.mul(at.padded, i64(size))
    targets = [b.add(at.out, b.mul(b.mul(at.padded, i64(4)), i64(r))) for r in range(n_rows)]
    with cgutils.for_range(b, b.lshr(at.padded, i64(5)), intp=I64) as chunk:
        acc = [[cgutils.alloca_once(b, V16F32) for _ in range(2)] for _ in range(n_rows)]
        if ty == Q8_0_KIND:
            with cgutils.for_range(b, i64(KV_TILE // 16), intp=I64) as part:
                scale = b.mul(b.add(b.mul(chunk.index, i64(KV_TILE)), b.mul(part.index, i64(16))), i64(2))
                factor = widen_half(b, load(b, scales, scale, V16I16, 2))
                for r in range(n_rows):
                    offset = b.add(b.mul(part.index, i64(64)), i64(_SCORE_BYTES * r))
                    store(b, b.fmul(load(b, at.scores, offset, V16F32, 4), factor), powers, offset, 4)
        place = b.mul(chunk.index, i64(128))
        for r in range(n_rows):
            for v in range(2):
                old = load(b, targets[r], b.add(place, i64(64 * v)), V16F32, 4)
                b.store(b.fmul(old, keeps[r]), acc[r][v])
        column = b.mul(chunk.index, i64(BLOCK * size))
        with cgutils.for_range(b, b.sub(at.last, at.first), intp=I64) as loop:
            position = b.add(at.first, loop.index)
            _ask(b, ty, at.ahead, b.add(b.mul(chunk.index, i64(KV_TILE)), loop.index))
            row = b.add(b.mul(position, row_bytes), column)
            vs = [_values(b, ty, at.values, b.add(row, i64(16 * size * v))) for v in range(2)]
            offset = b.mul(position, i64(4))
            for r in range(n_rows):
                power = splat(b, load(b, powers, b.add(offset, i64(_SCORE_BYTES * r)), F32, 4), V16F32)
                for v in range(2):
                    b.store(fma(b, vs[v], power, b.load(acc[r][v])), acc[r][v])
        for r in range(n_rows):
            for v in range(2):
                store(b, b.load(acc[r][v]), targets[r], b.add(place, i64(64 * v)), 4)


def _larger(b: Any, x: Any, y: Any) -> Any:
    """Return x where it is larger than y, else y: y if x is NaN."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _max16(b: Any, vector: Any) -> Any:
    """Return the largest of 16 lanes that is not NaN."""
    width = 16
    while width > 1:
        width //= 2
        nothing = ir.Constant(vector.type, ir.Undefined)
        half = ir.VectorType(I32, width)
        low = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width))))
        high = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width, 2 * width))))
        vector = _larger(b, high, low)
    return b.extract_element(vector, ir.Constant(I32, 0))


def _finite_top(b: Any, top: Any) -> Any:
    """Return what is subtracted from scores: their maximum, or zero if all of them are minus infinity."""
    return b.select(b.fcmp_ordered("==", top, F32(float("-inf"))), F32(0.0), top)


def _exp_scalar(b: Any, x: Any) -> Any:
    return b.extract_element(exp_vector(b, splat(b, x, V16F32)), ir.Constant(I32, 0))


def _soften_row(b: Any, at: _Pass, row: Any) -> None:
    """Turn 64 scores into e**(score - maximum so far), zero before `first` and from `last` on.

    The row's maximum and total are updated; its scores are followed by what earlier results are to be multiplied with.
    A NaN among the scores makes the total NaN. The 64 powers are added as 4 vectors in order, and their lanes in one
    fixed tree.
    """
    scores = b.add(at.scores, b.mul(row, i64(_SCORE_BYTES)))
    maximum, total = (b.add(area, b.mul(row, i64(4))) for area in (at.maxima, at.totals))
    low, high = (splat(b, b.trunc(edge, I32), V16I32) for edge in (at.first, at.last))
    parts = []
    for v in range(4):
        lanes = ir.Constant(V16I32, list(range(16 * v, 16 * v + 16)))
        inside = b.and_(b.icmp_signed(">=", lanes, low), b.icmp_signed("<", lanes, high))
        parts.append(b.select(inside, load(b, scores, 64 * v, V16F32, 4), const(V16F32, float("-inf"))))
    largest = const(V16F32, float("-inf"))
    for part in parts:
        largest = _larger(b, part, largest)
    before = load(b, maximum, 0, F32, 4)
    top = _larger(b, _max16(b, largest), before)
    base = _finite_top(b, top)
    kept = _exp_scalar(b, b.fsub(before, base))
    bases, sums = splat(b, base, V16F32), const(V16F32, 0.0)
    for v, part in enumerate(parts):
        power = exp_vector(b, b.fsub(part, bases))
        store(b, power, scores, 64 * v, 4)
        sums = b.fadd(sums, power)
    store(b, top, maximum, 0, 4)
    store(b, kept, at.scores, b.add(i64(8 * _SCORE_BYTES), b.mul(row, i64(4))), 4)
    store(b, fma(b, load(b, total, 0, F32, 4), kept, sum16(b, sums)), total, 0, 4)


@intrinsic(prefer_literal=True)
def tile_pass(
    _ctx: Any,
    kind: Any,
    rows: Any,
    keys: Any,
    values: Any,
    ahead: Any,
    c: Any,
    padded: Any,
    q: Any,
    scores: Any,
    out: Any,
    maxima: Any,
    totals: Any,
    first: Any,
    last: Any,
) -> Any:
    """Add a tile to the results of `rows` rows: 8, 4, 2 or 1.

    Positions from `first` before `last` count. q is [C, 8], out [rows, P], scores has room for twice 8 rows of 64 and
    16 more; all are float32. `ahead` is the address of the tile that is read next.
    """
    signature = types.void(kind, types.int64, *[types.int64] * 12)

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        n, at = args[1], _Pass(*args[2:])
        for n_rows in (8, 4, 2, 1):
            with b.if_then(b.icmp_signed("==", n, i64(n_rows))):
                _score_rows(b, kind.literal_value, n_rows, at)
        with cgutils.for_range(b, n, intp=I64) as loop:
            _soften_row(b, at, loop.index)
        for n_rows in (8, 4, 2, 1):
            with b.if_then(b.icmp_signed("==", n, i64(n_rows))):
                factors = [load(b, at.scores, 8 * _SCORE_BYTES + 4 * r, F32, 4) for r in range(n_rows)]
                _mix_rows(b, kind.literal_value, n_rows, at, [splat(b, factor, V16F32) for factor in factors])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def merge_row(
    _ctx: Any, out: Any, maximum: Any, total: Any, other: Any, other_maximum: Any, other_total: Any, n: Any
) -> Any:
    """Merge the state of later positions, `other`, into that of earlier ones; n floats, a multiple of 16."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        out, maximum, total, other, other_maximum, other_total, n = args
        mine, theirs = (load(b, address, 0, F32, 4) for address in (maximum, other_maximum))
        top = _larger(b, theirs, mine)
        base = _finite_top(b, top)
        keep, weight = (_exp_scalar(b, b.fsub(one, base)) for one in (mine, theirs))
        both = b.fmul(load(b, total, 0, F32, 4), keep)
        store(b, fma(b, load(b, other_total, 0, F32, 4), weight, both), total, 0, 4)
        store(b, top, maximum, 0, 4)
        keeps, weights = (splat(b, factor, V16F32) for factor in (keep, weight))
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            old = b.fmul(load(b, out, offset, V16F32, 4), keeps)
            store(b, fma(b, load(b, other, offset, V16F32, 4), weights, old), out, offset, 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), codegen


@intrinsic
def store_half(_ctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Store a float32, rounded to a half float, at an address plus an index in half floats."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        store(b, narrow_half(b, args[2]), args[0], b.mul(args[1], i64(2)), 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def store_i8(_ctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Store the low byte of an integer at an address plus an index."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        store(b, b.trunc(args[2], I8), args[0], args[1], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen
