"""Joining the halves of gated networks; see `mer.model.operators.Activation`, whose numbers lie side by side."""

from __future__ import annotations

from typing import Any, Final

from numba import types

from mer.compute.kernels.ir import I64, V16F32, const, fma, i64, load, load_f32, splat, store
from mer.compute.kernels.numba_api import cgutils, intrinsic, njit
from mer.compute.kernels.vector import exp_vector

NUMBERS: Final = ("alpha", "beta", "limit", "shift")  # float32 at an activation's address, in this order


@intrinsic
def _swiglu16(_ctx: Any, gate: Any, up: Any, n: Any) -> Any:
    """Write gate = gate / (1 + e**-gate) * up for `n` floats, a multiple of 16."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        gate, up, n = args
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            g = load(b, gate, offset, V16F32, 4)
            denominator = b.fadd(exp_vector(b, b.fsub(const(V16F32, -0.0), g)), const(V16F32, 1.0))
            store(b, b.fmul(b.fdiv(g, denominator), load(b, up, offset, V16F32, 4)), gate, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _gated16(_ctx: Any, gate: Any, up: Any, n: Any, alpha: Any, beta: Any, limit: Any, shift: Any) -> Any:
    """Write to gate what an activation of these numbers makes of `n` floats, a multiple of 16; NaN stays NaN."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        gate, up, n = args[:3]
        alphas, betas, limits, shifts = (splat(b, number, V16F32) for number in args[3:])
        lows, one = b.fsub(const(V16F32, -0.0), limits), const(V16F32, 1.0)
        with cgutils.for_range(b, b.lshr(n, i64(4)), intp=I64) as loop:
            offset = b.mul(loop.index, i64(64))
            g, u = load(b, gate, offset, V16F32, 4), load(b, up, offset, V16F32, 4)
            g, u = (b.select(b.fcmp_ordered(">", it, limits), limits, it) for it in (g, u))
            u = b.select(b.fcmp_ordered("<", u, lows), lows, u)
            # beta * g first: of a beta of zero nothing is left, however large g is
            inner = b.fmul(b.fmul(alphas, g), fma(b, b.fmul(betas, g), g, one))
            denominator = b.fadd(exp_vector(b, b.fsub(const(V16F32, -0.0), inner)), one)
            store(b, b.fmul(b.fdiv(g, denominator), b.fadd(u, shifts)), gate, offset)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, *[types.float32] * 4), codegen


@njit
def join_halves(gate, up, n, activation):  # type: ignore[no-untyped-def]
    """Write gate = activation of gate and up for `n` floats, a multiple of 16; an address of 0 means SwiGLU."""
    if activation == 0:
        _swiglu16(gate, up, n)
    else:
        _gated16(
            gate, up, n, load_f32(activation, 0), load_f32(activation, 1), load_f32(activation, 2),
            load_f32(activation, 3),
        )  # fmt: skip
