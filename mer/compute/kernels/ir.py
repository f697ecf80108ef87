"""Emitting LLVM IR from numba intrinsics: vectors, fused multiply-add, atomics, futexes.

Every helper takes an `llvmlite` builder first. Vectors of floats have 16 lanes; LLVM splits them on targets with
narrower registers, so that every instruction-set form computes the same bits. Those of quantized weights have as many
as the form's registers (`lanes.py`).
"""

from __future__ import annotations

import platform
import time
from typing import Any

from llvmlite import binding, ir
from numba import types

from mer.compute.kernels.numba_api import cgutils, intrinsic
from mer.compute.kernels.target import FORM, Form

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
V64I8 = ir.VectorType(I8, 64)
V16I8, V16I16, V16I32, V16F32 = (ir.VectorType(t, 16) for t in (I8, I16, I32, F32))
_LLVM_MAJOR = binding.llvm_version_info[0]


_constants: dict[tuple[str, int, str], ir.Constant] = {}


def const(vector: ir.VectorType, value: float | int) -> ir.Constant:
    """Return a vector constant with every lane equal to `value`; the same object each time, which keeps its text."""
    key = str(vector.element), vector.count, repr(value)  # 0.0 equals -0.0
    made = _constants.get(key)
    if made is None:
        made = _constants[key] = ir.Constant(vector, [value] * vector.count)
    return made


def i64(value: int) -> ir.Constant:
    """Return a 64-bit integer constant."""
    return ir.Constant(I64, value)


def at(b: ir.IRBuilder, address: Any, offset: Any, ty: Any) -> Any:
    """Return the pointer to `ty` at an integer address plus a byte offset (an int or an IR value)."""
    offset = i64(offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(address, offset), ty.as_pointer())


def load(b: ir.IRBuilder, address: Any, offset: Any, ty: Any, align: int = 1) -> Any:
    """Load a value of type `ty` that may be aligned to as little as `align` bytes."""
    value = b.load(at(b, address, offset, ty))
    value.align = align
    return value


def store(b: ir.IRBuilder, value: Any, address: Any, offset: Any, align: int = 4) -> None:
    """Store a value that may be aligned to as little as `align` bytes."""
    b.store(value, at(b, address, offset, value.type)).align = align


def prefetch(b: ir.IRBuilder, address: Any, offset: int, locality: int = 3) -> None:
    """Ask for the cache line at an address, which need not exist, into all caches (3) or from the second on (2)."""
    read_data = [ir.Constant(I32, n) for n in (0, locality, 1)]
    call(b, "llvm.prefetch.p0", ir.VoidType(), at(b, address, offset, I8), *read_data)


def splat(b: ir.IRBuilder, scalar: Any, vector: ir.VectorType) -> Any:
    """Broadcast a scalar to every lane."""
    one = b.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), const(ir.VectorType(I32, vector.count), 0))


def call(b: ir.IRBuilder, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic or an external C function by name."""
    signature = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), args)


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    """Return x * y + z rounded once, for float32 scalars or vectors."""
    lanes = f"v{x.type.count}" if isinstance(x.type, ir.VectorType) else ""
    return call(b, f"llvm.fma.{lanes}f32", x.type, x, y, z)


def widen_half(b: ir.IRBuilder, half: Any) -> Any:
    """Convert IEEE half floats, given as a vector of i16, to float32, exactly.

    Without a conversion instruction: shift exponent and fraction into place and multiply by 2**112, which also makes
    subnormals right; an exponent of all ones (infinity, NaN) is then forced.
    """
    halves, words, floats = (ir.VectorType(t, half.type.count) for t in (F16, I32, F32))
    if FORM is not Form.PORTABLE:
        return b.fpext(b.bitcast(half, halves), floats)
    wide = b.zext(half, words)
    magnitude = b.shl(b.and_(wide, const(words, 0x7FFF)), const(words, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, floats), const(floats, 2.0**112)), words)
    special = b.icmp_unsigned(">=", magnitude, const(words, 0x7C00 << 13))
    forced = b.or_(magnitude, const(words, 0x7F800000))
    sign = b.shl(b.and_(wide, const(words, 0x8000)), const(words, 16))
    return b.bitcast(b.or_(b.select(special, forced, scaled), sign), floats)


def narrow_half(b: ir.IRBuilder, x: Any) -> Any:
    """Round a float32 to a half float, given as i16: to nearest even, to infinity from 65520 on; NaN stays NaN.

    By integers in every form. Below 2**-14 adding 0.5 puts the last bit of a subnormal half where float32 rounds;
    above, half of the last bit less one, and the bit itself, are added before 13 bits are cut off.
    """
    bits = b.bitcast(x, I32)
    magnitude = b.and_(bits, I32(0x7FFFFFFF))
    small = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, F32), F32(0.5)), I32), I32(0x3F000000))
    odd = b.and_(b.lshr(magnitude, I32(13)), I32(1))
    normal = b.lshr(b.sub(b.add(b.add(magnitude, odd), I32(0xFFF)), I32(112 << 23)), I32(13))
    half = b.select(b.icmp_unsigned("<", magnitude, I32(0x38800000)), small, normal)
    half = b.select(b.icmp_unsigned(">=", magnitude, I32(0x47800000)), I32(0x7C00), half)
    half = b.select(b.icmp_unsigned(">", magnitude, I32(0x7F800000)), I32(0x7E00), half)
    return b.trunc(b.or_(half, b.and_(b.lshr(bits, I32(16)), I32(0x8000))), I16)


def half_pair(b: ir.IRBuilder, address: Any, offset: int) -> tuple[Any, Any]:
    """Return the first and the second half float of each of 16 words as float32."""
    words = load(b, address, offset, V16I32)
    first, second = b.trunc(words, V16I16), b.trunc(b.lshr(words, const(V16I32, 16)), V16I16)
    return widen_half(b, first), widen_half(b, second)


def widen_bfloat(b: ir.IRBuilder, brain: Any) -> Any:
    """Convert 16 bfloat16, given as <16 x i16>, to float32, exactly."""
    return b.bitcast(b.shl(b.zext(brain, V16I32), const(V16I32, 16)), V16F32)


def sum16(b: ir.IRBuilder, vector: Any) -> Any:
    """Add 16 float32 lanes in one fixed tree: lanes i and i + 8, then + 4, + 2, + 1."""
    width = LANES
    while width > 1:
        width //= 2
        half = ir.VectorType(I32, width)
        nothing = ir.Constant(vector.type, ir.Undefined)
        low = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width))))
        high = b.shuffle_vector(vector, nothing, ir.Constant(half, list(range(width, 2 * width))))
        vector = b.fadd(low, high)
    return b.extract_element(vector, ir.Constant(I32, 0))


def lane_mask(b: ir.IRBuilder, count: Any) -> Any:
    """Return <16 x i1> whose first `count` (an i64 value) lanes are true."""
    lanes = ir.Constant(V16I32, list(range(16)))
    return b.icmp_unsigned("<", lanes, splat(b, b.trunc(count, I32), V16I32))


def masked_load(b: ir.IRBuilder, address: Any, offset: Any, vector: ir.VectorType, mask: Any) -> Any:
    """Load the masked lanes; the others are zero and their memory is not touched."""
    element = {F32: "f32", I16: "i16"}[vector.element]
    pointer = at(b, address, offset, vector)
    # LLVM 22 takes the alignment as an attribute of the pointer, earlier releases as an argument
    name = f"llvm.masked.load.v16{element}.p0"
    zero = ir.Constant(vector, None)
    if _LLVM_MAJOR >= 22:
        return call(b, name, vector, pointer, mask, zero)
    return call(b, name, vector, pointer, ir.Constant(I32, 1), mask, zero)


@intrinsic
def atomic_load(_ctx: Any, address: Any) -> Any:
    """Load the int32 at an address, sequentially consistent."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.sext(b.load_atomic(at(b, args[0], 0, I32), "seq_cst", 4), I64)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_store(_ctx: Any, address: Any, value: Any) -> Any:
    """Store an int32 at an address, with release ordering."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        b.store_atomic(b.trunc(args[1], I32), at(b, args[0], 0, I32), "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def atomic_add(_ctx: Any, address: Any, value: Any) -> Any:
    """Add to the int32 at an address, sequentially consistent, and return what it was before."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.sext(b.atomic_rmw("add", at(b, args[0], 0, I32), b.trunc(args[1], I32), "seq_cst"), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load_i64(_ctx: Any, address: Any) -> Any:
    """Load the int64 at an address, sequentially consistent."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        return b.load_atomic(at(b, args[0], 0, I64), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def compare_exchange(_ctx: Any, address: Any, expected: Any, new: Any) -> Any:
    """Put `new` where the int64 at an address is `expected`, sequentially consistent; return 1 if it was, else 0."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        pair = b.cmpxchg(at(b, args[0], 0, I64), args[1], args[2], "seq_cst", "seq_cst")
        return b.zext(b.extract_value(pair, 1), I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def pause(_ctx: Any) -> Any:
    """Tell the processor that this is a spin loop, where it has such an instruction."""

    def codegen(context: Any, b: Any, _signature: Any, _args: Any) -> Any:
        if platform.machine() == "x86_64":
            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def syscall6(_ctx: Any, number: Any, a: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
    """Call the C library's `syscall` with six integer arguments and return its result."""

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
        return b.call(function, args)

    return types.int64(*[types.int64] * 7), codegen


@intrinsic
def clock_ns(_ctx: Any, room: Any) -> Any:
    """Return CLOCK_MONOTONIC in nanoseconds; `room` is the address of 16 bytes to work in.

    By the C library, which asks the kernel's shared page where it can: a system call takes several times as long.
    """

    def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [I32, I64]), "clock_gettime")
        b.call(function, [ir.Constant(I32, time.CLOCK_MONOTONIC), args[0]])
        seconds, rest = load(b, args[0], 0, I64, 8), load(b, args[0], 8, I64, 8)
        return b.add(b.mul(seconds, i64(1_000_000_000)), rest)

    return types.int64(types.int64), codegen


@intrinsic
def call_step(_ctx: Any, function: Any, row: Any, thread: Any, n_threads: Any) -> Any:
    """Call the C function at an address with (row address, thread, number of threads)."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        pointer = b.inttoptr(args[0], ir.FunctionType(ir.VoidType(), [I64, I64, I64]).as_pointer())
        b.call(pointer, args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _scalar_loader(ir_type: Any, numba_type: Any) -> Any:
    @intrinsic
    def load_scalar(_ctx: Any, address: Any, index: Any) -> Any:
        def codegen(_context: Any, b: Any, _signature: Any, args: Any) -> Any:
            size = numba_type.bitwidth // 8
            return load(b, args[0], b.mul(args[1], i64(size)), ir_type, size)

        return numba_type(types.int64, types.int64), codegen

    return load_scalar


load_i64 = _scalar_loader(I64, types.int64)
load_i32 = _scalar_loader(I32, types.int32)
load_f32 = _scalar_loader(F32, types.float32)
load_f64 = _scalar_loader(ir.DoubleType(), types.float64)


@intrinsic
def store_i64(_ctx: Any, address: Any, value: Any) -> Any:
    """Store an int64 at an address."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        store(b, args[1], args[0], 0, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def store_f32(_ctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Store a float32 at an address plus an index in floats."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        store(b, args[2], args[0], b.mul(args[1], i64(4)), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def store_i32(_ctx: Any, address: Any, index: Any, value: Any) -> Any:
    """Store an int32 at an address plus an index in int32s."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        store(b, args[2], args[0], b.mul(args[1], i64(4)), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int32), codegen


@intrinsic
def copy_bytes(_ctx: Any, target: Any, source: Any, n_bytes: Any) -> Any:
    """Copy bytes between areas that do not overlap."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        pointers = [b.inttoptr(a, I8.as_pointer()) for a in args[:2]]
        cgutils.raw_memcpy(b, pointers[0], pointers[1], args[2], 1, align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def zero_bytes(_ctx: Any, target: Any, n_bytes: Any) -> Any:
    """Set bytes to zero."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        cgutils.memset(b, b.inttoptr(args[0], I8.as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
