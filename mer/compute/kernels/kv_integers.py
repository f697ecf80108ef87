"""Keys and values of Q8_0 meet queries and powers as integers: int8 of the cache and int16 of what meets it.

A row's query, and its powers times the scales of a block of values, are rounded to 15 bits of the largest of them; sums
of products are then exact in 32 bits (at most 64 * 127 * 32767), so that every form has the same bits, and float32 has
one fma for each block. Two products of int16 take one instruction where one of float32 does.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types

from mer.compute.kernels.dots import dot2
from mer.compute.kernels.ir import (
    F32,
    I8,
    I16,
    I32,
    I64,
    V16F32,
    V16I16,
    V16I32,
    const,
    fma,
    i64,
    load,
    splat,
    store,
    widen_half,
)
from mer.compute.kernels.kv_layout import BLOCK, KV_TILE, SCORE_BYTES, Pass, ask, vectors_at_once
from mer.compute.kernels.lanes import PAIRS, PIECES, ROW_LANES, WORDS
from mer.compute.kernels.numba_api import cgutils, intrinsic
from mer.compute.kernels.vector import larger_magnitudes, largest_magnitude, round_to_int

_V32I8, _V32I16, _V8I32 = ir.VectorType(I8, 32), ir.VectorType(I16, 32), ir.VectorType(I32, 8)
_LARGEST: Final = 32767.0
_NOTHING: Final = 1e-30  # where the largest is no more, all are taken for zero


def _pieces(b: Any, vector: Any, piece: ir.VectorType) -> list[Any]:
    """Cut a vector into as many as the form's registers need."""
    if PIECES == 1:
        return [vector]
    nothing = ir.Constant(vector.type, ir.Undefined)
    lanes = ir.VectorType(I32, piece.count)
    return [
        b.shuffle_vector(vector, nothing, ir.Constant(lanes, list(range(start, start + piece.count))))
        for start in range(0, vector.type.count, piece.count)
    ]


class _Sums:
    """16 sums of 32 bits, in as many vectors as the form's registers need."""

    def __init__(self, b: Any) -> None:
        self._b = b
        self._parts = [cgutils.alloca_once(b, WORDS) for _ in range(PIECES)]

    def clear(self) -> None:
        """Make all of them zero."""
        for part in self._parts:
            self._b.store(const(WORDS, 0), part)

    def add(self, left: Any, right: Any) -> None:
        """Add 16 dot products of pairs of int16."""
        cut = [_pieces(self._b, vector, PAIRS) for vector in (left, right)]
        for part, x, y in zip(self._parts, *cut, strict=True):
            self._b.store(dot2(self._b, self._b.load(part), x, y), part)

    def floats(self) -> Any:
        """Return them as float32."""
        parts = [self._b.load(part) for part in self._parts]
        if PIECES == 1:
            return self._b.sitofp(parts[0], V16F32)
        lanes = ir.Constant(V16I32, list(range(2 * ROW_LANES)))
        return self._b.sitofp(self._b.shuffle_vector(*parts, lanes), V16F32)


def _widened(b: Any, address: Any, offset: Any) -> Any:
    """Load 16 pairs of int8 as int16."""
    return b.sext(load(b, address, offset, _V32I8, 1), _V32I16)


def _pair(b: Any, address: Any, offset: Any) -> Any:
    """Load a pair of int16 and broadcast it."""
    return b.bitcast(splat(b, load(b, address, offset, I32, 4), V16I32), _V32I16)


def _ask_scales(b: Any, at: Pass, tile: Any) -> None:
    """Ask for the scales of the tile that is read next."""
    with cgutils.for_range(b, b.udiv(at.padded, i64(BLOCK // 2)), intp=I64) as loop:
        ask(b, at.scales(b, tile), loop.index, 64)


def score_rows(b: Any, n_rows: int, at: Pass) -> None:
    """Write the dot products [rows, 64] of queries, of which the first `n_rows` count, with a tile's keys.

    q is int16 [C / 2, 8, 2] and, behind, the float32 factors of the 8 rows, as `pack_query` writes them.
    """
    # Keys are multiplied as integers: as float32 each would be converted first, once for each pass.
    n_vectors = vectors_at_once(n_rows)
    scales = at.scales(b, at.keys)
    factors = b.add(at.q, b.mul(at.c, i64(16)))
    _ask_scales(b, at, at.values)
    with cgutils.for_range(b, i64(KV_TILE // (16 * n_vectors)), intp=I64) as part:
        first = b.mul(part.index, i64(16 * n_vectors))
        side = b.add(b.mul(b.mul(b.lshr(first, i64(5)), at.c), i64(16)), b.and_(first, i64(31)))
        totals = [[cgutils.alloca_once(b, V16F32) for _ in range(n_vectors)] for _ in range(n_rows)]
        sums = [[_Sums(b) for _ in range(n_vectors)] for _ in range(n_rows)]
        for total in (total for row in totals for total in row):
            b.store(const(V16F32, 0.0), total)
        with cgutils.for_range(b, b.udiv(at.c, i64(BLOCK)), intp=I64) as block:
            for one in (one for row in sums for one in row):
                one.clear()
            with cgutils.for_range(b, i64(BLOCK // 2), intp=I64) as loop:
                index = b.add(b.mul(block.index, i64(BLOCK // 2)), loop.index)
                ask(b, at.values, b.add(b.mul(part.index, b.lshr(at.c, i64(1))), index), 32 * n_vectors)
                place = b.mul(b.add(side, b.mul(index, i64(32))), i64(2))
                keys = [_widened(b, at.keys, b.add(place, i64(32 * v))) for v in range(n_vectors)]
                for r in range(n_rows):
                    query = _pair(b, at.q, b.add(b.mul(index, i64(32)), i64(4 * r)))
                    for v in range(n_vectors):
                        sums[r][v].add(keys[v], query)
            for v in range(n_vectors):
                place = b.add(b.mul(b.add(b.mul(block.index, i64(KV_TILE)), first), i64(2)), i64(32 * v))
                scale = widen_half(b, load(b, scales, place, V16I16, 2))
                for r in range(n_rows):
                    b.store(fma(b, sums[r][v].floats(), scale, b.load(totals[r][v])), totals[r][v])
        for r in range(n_rows):
            factor = splat(b, load(b, factors, 4 * r, F32, 4), V16F32)
            for v in range(n_vectors):
                place = b.add(b.mul(first, i64(4)), i64(SCORE_BYTES * r + 64 * v))
                store(b, b.fmul(b.load(totals[r][v]), factor), at.scores, place, 4)


def _precision(b: Any, magnitudes: Any) -> tuple[Any, Any]:
    """Return what makes floats of 15 bits of the largest, in 16 lanes, and the factor that makes them what they were.

    The factor is NaN where one of them is NaN or infinite.
    """
    most = largest_magnitude(b, magnitudes)
    inverse = b.select(b.fcmp_ordered(">", most, F32(_NOTHING)), b.fdiv(F32(_LARGEST), most), F32(0.0))
    factor = b.fmul(most, F32(1 / _LARGEST))
    factor = b.select(b.fcmp_ordered("<", factor, F32(float("inf"))), factor, F32(float("nan")))
    return splat(b, inverse, V16F32), factor


def mix_rows(b: Any, n_rows: int, at: Pass, keeps: list[Any]) -> None:
    """Write out = out * keep + sum over positions from `first` before `last` of powers * values.

    For `n_rows` rows: out [rows, P], powers [rows, 64] in place of the scores, zero for all other positions, float32.
    """
    # Powers are rounded to integers: as float32 each value would be converted first, once for each pass.
    n_vectors = vectors_at_once(n_rows)
    targets, scales = at.targets(b, n_rows), at.scales(b, at.values)
    rounded = b.add(at.scores, i64(8 * SCORE_BYTES + 128))
    _ask_scales(b, at, at.ahead)
    begin, end = b.lshr(at.first, i64(1)), b.lshr(b.add(at.last, i64(1)), i64(1))
    with cgutils.for_range(b, b.udiv(at.padded, i64(BLOCK)), intp=I64) as block:
        scale = []
        for v in range(KV_TILE // 16):
            place = b.add(b.mul(block.index, i64(2 * KV_TILE)), i64(32 * v))
            there = widen_half(b, load(b, scales, place, V16I16, 2))
            scale.append(b.select(at.counting(b, v), there, const(V16F32, 0.0)))
        factors = []
        for r in range(n_rows):
            powers = [load(b, at.scores, SCORE_BYTES * r + 64 * v, V16F32, 4) for v in range(KV_TILE // 16)]
            products = [b.fmul(power, one) for power, one in zip(powers, scale, strict=True)]
            magnitudes = const(V16I32, 0)
            for product in products:
                magnitudes = larger_magnitudes(b, magnitudes, product)
            inverse, factor = _precision(b, magnitudes)
            factors.append(splat(b, factor, V16F32))
            for v, product in enumerate(products):
                integers = b.trunc(round_to_int(b, b.fmul(product, inverse)), V16I16)
                store(b, integers, rounded, 2 * KV_TILE * r + 32 * v, 4)
        for part in range(0, BLOCK // 16, n_vectors):
            sums = [[_Sums(b) for _ in range(n_vectors)] for _ in range(n_rows)]
            for one in (one for row in sums for one in row):
                one.clear()
            column = b.add(b.mul(block.index, i64(BLOCK * KV_TILE)), i64(32 * part))
            with cgutils.for_range(b, b.sub(end, begin), intp=I64) as loop:
                pair = b.add(begin, loop.index)
                step = b.add(b.mul(block.index, i64(KV_TILE // n_vectors)), i64(KV_TILE // 2 * part // n_vectors))
                ask(b, at.ahead, b.add(step, loop.index), 32 * n_vectors)
                here = b.add(column, b.mul(pair, i64(2 * BLOCK)))
                values = [_widened(b, at.values, b.add(here, i64(32 * v))) for v in range(n_vectors)]
                for r in range(n_rows):
                    power = _pair(b, rounded, b.add(b.mul(pair, i64(4)), i64(2 * KV_TILE * r)))
                    for v in range(n_vectors):
                        sums[r][v].add(values[v], power)
            for r in range(n_rows):
                for v in range(n_vectors):
                    place = b.add(b.mul(block.index, i64(4 * BLOCK)), i64(64 * (part + v)))
                    kept = b.fmul(load(b, targets[r], place, V16F32, 4), keeps[r])
                    store(b, fma(b, sums[r][v].floats(), factors[r], kept), targets[r], place, 4)


@intrinsic
def pack_query(_ctx: Any, out: Any, query: Any, c: Any, scale: Any) -> Any:
    """Write a query of c floats, a multiple of 32, times `scale` as int16 pairs 32 bytes apart, and its factor behind.

    `out` is the row's place among the 8 of [C / 2, 8, 2].
    """

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        out, query, c, scale = args
        times = splat(b, scale, V16F32)
        magnitudes = cgutils.alloca_once_value(b, const(V16I32, 0))
        vectors = b.lshr(c, i64(4))
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            vector = b.fmul(load(b, query, b.mul(loop.index, i64(64)), V16F32, 4), times)
            b.store(larger_magnitudes(b, b.load(magnitudes), vector), magnitudes)
        inverse, factor = _precision(b, b.load(magnitudes))
        with cgutils.for_range(b, vectors, intp=I64) as loop:
            vector = b.fmul(load(b, query, b.mul(loop.index, i64(64)), V16F32, 4), times)
            pairs = b.bitcast(b.trunc(round_to_int(b, b.fmul(vector, inverse)), V16I16), _V8I32)
            for i in range(8):
                pair = b.extract_element(pairs, ir.Constant(I32, i))
                store(b, pair, out, b.add(b.mul(loop.index, i64(256)), i64(32 * i)), 4)
        store(b, factor, out, b.mul(c, i64(16)), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen
