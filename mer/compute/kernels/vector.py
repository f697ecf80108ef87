"""Float32 vector pieces that other kernels are made of: dot products, exponentials, quantized blocks."""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types

from mer.compute.kernels.ir import (
    F32,
    I32,
    I64,
    V16F32,
    V16I8,
    V16I32,
    call,
    const,
    fma,
    i64,
    load,
    splat,
    store,
    sum16,
)
from mer.compute.kernels.numba_api import cgutils, intrinsic

_LN2_HI, _LN2_LO = 0.693359375, -2.12194440e-4  # ln 2 in two parts, the first exact in few bits (Cody and Waite)
_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds a small float to an integer, to nearest even


def exp_vector(b: Any, x: Any) -> Any:
    """Return e**x for 16 lanes, within about 1 ulp; below -87.3 the result is e**-87.3, -inf gives 0, NaN stays NaN.

    x = n ln 2 + r with |r| <= ln 2 / 2; e**r by its Taylor polynomial of degree 7; then n is added to the exponent.
    """
    vanishes = b.fcmp_ordered("<", x, const(V16F32, -1e4))
    x = b.select(b.fcmp_ordered("<", x, const(V16F32, -87.3)), const(V16F32, -87.3), x)
    x = b.select(b.fcmp_ordered(">", x, const(V16F32, 88.3)), const(V16F32, 88.3), x)
    shifted = fma(b, x, const(V16F32, 1 / math.log(2)), const(V16F32, _MAGIC))
    n = b.fsub(shifted, const(V16F32, _MAGIC))
    r = fma(b, n, const(V16F32, -_LN2_HI), x)
    r = fma(b, n, const(V16F32, -_LN2_LO), r)
    value = const(V16F32, 1 / math.factorial(7))
    for k in range(6, -1, -1):
        value = fma(b, value, r, const(V16F32, 1 / math.factorial(k)))
    exponent = b.shl(b.bitcast(shifted, V16I32), const(V16I32, 23))
    scaled = b.bitcast(b.add(b.bitcast(value, V16I32), exponent), V16F32)
    scaled = b.select(b.fcmp_unordered("uno", x, x), x, scaled)
    return b.select(vanishes, const(V16F32, 0.0), scaled)


_EXP_REST = (  # (e**r - 1) / r for |r| <= ln 2 / 2, fitted so that e**r is off by no more than 2e-9 of itself
    1.0000000322590785, 0.49999994191551084, 0.1666643079887057, 0.04166800474002266, 0.00837419571686879,
    0.0013843606236848868,
)  # fmt: skip


def exp_of_negative(b: Any, x: Any) -> Any:
    """Return e**x for 16 lanes of at most 0, within about 1 ulp; below -87.3 the result is 0, NaN stays NaN.

    As `exp_vector`, less what only other numbers need. e**0 is 1.
    """
    shifted = fma(b, x, const(V16F32, 1 / math.log(2)), const(V16F32, _MAGIC))
    n = b.fsub(shifted, const(V16F32, _MAGIC))
    r = fma(b, n, const(V16F32, -_LN2_HI), x)
    r = fma(b, n, const(V16F32, -_LN2_LO), r)
    value = const(V16F32, _EXP_REST[-1])
    for coefficient in (*_EXP_REST[-2::-1], 1.0):
        value = fma(b, value, r, const(V16F32, coefficient))
    power = b.add(b.shl(b.bitcast(shifted, V16I32), const(V16I32, 23)), const(V16I32, 127 << 23))
    vanishes = b.fcmp_ordered("<", x, const(V16F32, -87.3))
    return b.select(vanishes, const(V16F32, 0.0), b.fmul(value, b.bitcast(power, V16F32)))


def _absolute(b: Any, x: Any) -> Any:
    return b.bitcast(b.and_(b.bitcast(x, V16I32), const(V16I32, 0x7FFFFFFF)), V16F32)


def round_to_int(b: Any, x: Any) -> Any:
    """Round 16 floats of magnitude below 2**22 to int32, to nearest even."""
    return b.sub(b.bitcast(b.fadd(x, const(V16F32, _MAGIC)), V16I32), ir.Constant(V16I32, [0x4B400000] * 16))


@intrinsic
def dot(_ctx: Any, x: Any, y: Any, n: Any) -> Any:
    """Return the float32 dot product of `n` floats, a multiple of 16, as 16 partial sums added in one fixed tree."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        x, y, n = args
        acc = cgutils.alloca_once_value(b, const(V16F32, 0.0))
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            b.store(fma(b, load(b, x, offset, V16F32, 4), load(b, y, offset, V16F32, 4), b.load(acc)), acc)
        return sum16(b, b.load(acc))

    return types.float32(types.int64, types.int64, types.int64), codegen


@intrinsic
def scale_product(_ctx: Any, out: Any, x: Any, y: Any, factor: Any, n: Any) -> Any:
    """Write out = (x * factor) * y elementwise for `n` floats, a multiple of 16."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        out, x, y, factor, n = args
        factors = splat(b, factor, V16F32)
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            scaled = b.fmul(load(b, x, offset, V16F32, 4), factors)
            store(b, b.fmul(scaled, load(b, y, offset, V16F32, 4)), out, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def rotate(_ctx: Any, values: Any, pair: Any, cos: Any, sin: Any, n: Any) -> Any:
    """Turn `n` pairs of floats, a multiple of 16, in place: x = x * cos - y * sin, y = x * sin + y * cos.

    The elements of a pair are neighbours if `pair` is 1, or `pair` floats apart.
    """

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        values, pair, cos, sin, n = args
        neighbours = b.icmp_signed("==", pair, i64(1))
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            angle = b.mul(loop.index, i64(64))
            first = b.select(neighbours, b.mul(angle, i64(2)), angle)
            second = b.add(first, b.select(neighbours, i64(64), b.mul(pair, i64(4))))
            left, right = load(b, values, first, V16F32, 4), load(b, values, second, V16F32, 4)
            x = b.select(neighbours, b.shuffle_vector(left, right, ir.Constant(V16I32, list(range(0, 32, 2)))), left)
            y = b.select(neighbours, b.shuffle_vector(left, right, ir.Constant(V16I32, list(range(1, 32, 2)))), right)
            c, s = load(b, cos, angle, V16F32, 4), load(b, sin, angle, V16F32, 4)
            x, y = b.fsub(b.fmul(x, c), b.fmul(y, s)), b.fadd(b.fmul(x, s), b.fmul(y, c))
            for offset, half, own in ((first, 0, x), (second, 8, y)):
                mixed = ir.Constant(V16I32, [half + i // 2 + 16 * (i % 2) for i in range(16)])
                store(b, b.select(neighbours, b.shuffle_vector(x, y, mixed), own), values, offset)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def add_scaled(_ctx: Any, out: Any, x: Any, factor: Any, n: Any) -> Any:
    """Write out = fma(factor, x, out) elementwise for `n` floats, a multiple of 16."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        out, x, factor, n = args
        factors = splat(b, factor, V16F32)
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            value = fma(b, factors, load(b, x, offset, V16F32, 4), load(b, out, offset, V16F32, 4))
            store(b, value, out, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


@intrinsic
def cap16(_ctx: Any, x: Any, cap: Any, n: Any) -> Any:
    """Write x = cap * tanh(x / cap) for `n` floats, a multiple of 16, as cap - 2 cap / (1 + e**(2 x / cap))."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        x, cap, n = args
        caps = splat(b, cap, V16F32)
        factor = b.fdiv(const(V16F32, 2.0), caps)
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            power = exp_vector(b, b.fmul(load(b, x, offset, V16F32, 4), factor))
            rest = b.fdiv(b.fadd(caps, caps), b.fadd(power, const(V16F32, 1.0)))
            store(b, b.fsub(caps, rest), x, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


def larger_magnitudes(b: Any, most: Any, vector: Any) -> Any:
    """Return in each lane the larger of a magnitude, given as its bits, and that of 16 floats.

    Magnitudes order like their bits, NaN above infinity.
    """
    bits = b.bitcast(_absolute(b, vector), V16I32)
    return b.select(b.icmp_signed(">", bits, most), bits, most)


def largest_magnitude(b: Any, magnitudes: Any) -> Any:
    """Return the largest of 16 magnitudes that are given as their bits."""
    return b.bitcast(call(b, "llvm.vector.reduce.smax.v16i32", I32, magnitudes), F32)


@intrinsic
def amax(_ctx: Any, x: Any, n: Any) -> Any:
    """Return the largest magnitude of `n` floats, a multiple of 16; NaN if any element is NaN."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        x, n = args
        acc = cgutils.alloca_once_value(b, const(V16I32, 0))
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            value = load(b, x, b.mul(loop.index, i64(64)), V16F32, 4)
            b.store(larger_magnitudes(b, b.load(acc), value), acc)
        return largest_magnitude(b, b.load(acc))

    return types.float32(types.int64, types.int64), codegen


def _quantizer(select: Any) -> Any:
    """Return an intrinsic that rounds 16 floats times `inverse` and stores `select` of the integers as int8.

    Rounding is to nearest even; the intrinsic returns the sum of what it stored.
    """

    @intrinsic
    def quantize(_ctx: Any, x: Any, inverse: Any, out: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
            x, inverse, out = args
            scaled = b.fmul(load(b, x, 0, V16F32, 4), splat(b, inverse, V16F32))
            q = select(b, round_to_int(b, scaled))
            store(b, b.trunc(q, V16I8), out, 0, 1)
            return call(b, "llvm.vector.reduce.add.v16i32", I32, q)

        return types.int32(types.int64, types.float32, types.int64), codegen

    return quantize


def _high(b: Any, q: Any) -> Any:
    return b.ashr(b.add(q, const(V16I32, 64)), const(V16I32, 7))


def _low(b: Any, q: Any) -> Any:
    return b.sub(q, b.shl(_high(b, q), const(V16I32, 7)))


quantize16 = _quantizer(lambda b, q: q)  # the integers, -127..127
quantize16_high = _quantizer(_high)  # of integers -16256..16256 = 128 * high + low
quantize16_low = _quantizer(_low)  # -64..63
