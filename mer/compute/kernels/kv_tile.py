"""One pass over a tile of keys and values: scores, an online softmax, and the sum of values; and merging of results."""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types

from mer.compute.kernels import kv_floats, kv_integers
from mer.compute.kernels.ir import (
    F32,
    I8,
    I32,
    I64,
    V16F32,
    V16I32,
    const,
    fma,
    i64,
    load,
    narrow_half,
    splat,
    store,
    sum16,
)
from mer.compute.kernels.kv_layout import KV_TILE, Q8_0_KIND, SCORE_BYTES, Pass
from mer.compute.kernels.numba_api import cgutils, intrinsic
from mer.compute.kernels.vector import exp_of_negative

_KEEPS: Final = 8 * SCORE_BYTES  # of each row: what earlier results are to be multiplied with
_TOPS: Final = _KEEPS + 64  # of each row: the largest score so far
_V8F32 = ir.VectorType(F32, 8)
PASS_BYTES: Final = _TOPS + 64 + 8 * 2 * KV_TILE  # scores of 8 rows, the above, and powers as int16


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


def _finite(b: Any, tops: Any) -> Any:
    """Return what is subtracted from scores: the largest of them, or zero if all of them are minus infinity."""
    zero = const(tops.type, 0.0)
    return b.select(b.fcmp_ordered("==", tops, const(tops.type, float("-inf"))), zero, tops)


def _scores(b: Any, at: Pass, row: Any) -> list[Any]:
    """Load a row's 64 scores, minus infinity before `first` and from `last` on."""
    vectors = []
    for v in range(KV_TILE // 16):
        scores = load(b, at.scores, b.add(b.mul(row, i64(SCORE_BYTES)), i64(64 * v)), V16F32, 4)
        vectors.append(b.select(at.counting(b, v), scores, const(V16F32, float("-inf"))))
    return vectors


def _soften(b: Any, at: Pass, n: Any) -> None:
    """Turn the scores of n rows into e**(score - largest so far), zero before `first` and from `last` on.

    Largest scores and totals are updated, and what earlier results are to be multiplied with is left behind the scores.
    A NaN among the scores makes the total NaN. The 64 powers of a row are added as 4 vectors in order, and their lanes
    in one fixed tree.
    """
    with cgutils.for_range(b, n, intp=I64) as loop:
        largest = const(V16F32, float("-inf"))
        for vector in _scores(b, at, loop.index):
            largest = _larger(b, vector, largest)
        store(b, _max16(b, largest), at.scores, b.add(i64(_TOPS), b.mul(loop.index, i64(4))), 4)
    lanes = ir.Constant(V16I32, [min(lane, 7) for lane in range(16)])
    before = load(b, at.maxima, 0, _V8F32, 4)  # of rows from n on it is not used
    before = b.shuffle_vector(before, ir.Constant(_V8F32, ir.Undefined), lanes)
    tops = _larger(b, load(b, at.scores, _TOPS, V16F32, 4), before)
    bases = _finite(b, tops)
    store(b, tops, at.scores, _TOPS, 4)
    store(b, exp_of_negative(b, b.fsub(before, bases)), at.scores, _KEEPS, 4)
    with cgutils.for_range(b, n, intp=I64) as loop:
        offset = b.mul(loop.index, i64(4))
        top = load(b, at.scores, b.add(offset, i64(_TOPS)), F32, 4)
        base, sums = _finite(b, splat(b, top, V16F32)), const(V16F32, 0.0)
        for v, vector in enumerate(_scores(b, at, loop.index)):
            power = exp_of_negative(b, b.fsub(vector, base))
            store(b, power, at.scores, b.add(b.mul(loop.index, i64(SCORE_BYTES)), i64(64 * v)), 4)
            sums = b.fadd(sums, power)
        store(b, top, at.maxima, offset, 4)
        kept, total = load(b, at.scores, b.add(offset, i64(_KEEPS)), F32, 4), load(b, at.totals, offset, F32, 4)
        store(b, fma(b, total, kept, sum16(b, sums)), at.totals, offset, 4)


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

    Positions from `first` before `last` count. q is float32 [C, 8], or what `pack_query` writes for Q8_0; out is
    float32 [rows, P]; scores has room for `PASS_BYTES`. `ahead` is the address of the tile that is read next.
    """
    # Results are rescaled from tile to tile; to know the maximum before would take reading all keys twice.
    signature = types.void(kind, types.int64, *[types.int64] * 12)

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        n, at, literal = args[1], Pass(*args[2:]), kind.literal_value
        for n_rows in (8, 4, 2, 1):
            with b.if_then(b.icmp_signed("==", n, i64(n_rows))):
                if literal == Q8_0_KIND:
                    kv_integers.score_rows(b, n_rows, at)
                else:
                    kv_floats.score_rows(b, literal, n_rows, at)
        _soften(b, at, n)
        for n_rows in (8, 4, 2, 1):
            with b.if_then(b.icmp_signed("==", n, i64(n_rows))):
                keeps = [splat(b, load(b, at.scores, _KEEPS + 4 * r, F32, 4), V16F32) for r in range(n_rows)]
                if literal == Q8_0_KIND:
                    kv_integers.mix_rows(b, n_rows, at, keeps)
                else:
                    kv_floats.mix_rows(b, literal, n_rows, at, keeps)
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
        base = _finite(b, splat(b, top, V16F32))
        keep, weight = (exp_of_negative(b, b.fsub(splat(b, one, V16F32), base)) for one in (mine, theirs))
        both = b.fmul(splat(b, load(b, total, 0, F32, 4), V16F32), keep)
        both = fma(b, splat(b, load(b, other_total, 0, F32, 4), V16F32), weight, both)
        store(b, b.extract_element(both, ir.Constant(I32, 0)), total, 0, 4)
        store(b, top, maximum, 0, 4)
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            old = b.fmul(load(b, out, offset, V16F32, 4), keep)
            store(b, fma(b, load(b, other, offset, V16F32, 4), weight, old), out, offset, 4)
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
