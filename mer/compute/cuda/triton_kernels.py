"""Fused dequantize-and-multiply in Triton, for a few rows: weights are read once, in the file's bytes.

A program computes R rows of a matrix for one row of activations and walks all blocks along K, in float32 throughout.
Its sums have one order, whatever is computed beside it. `_dot` has a branch for each weight type; the branch is chosen
as a kernel is compiled. Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h).
"""

from __future__ import annotations

import triton
import triton.language as tl

R = 8  # rows of a matrix that a program computes
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16, MXFP4 = (tl.constexpr(kind) for kind in (0, 1, 2, 8, 12, 14, 30, 39))
KINDS = frozenset({0, 1, 2, 8, 12, 14, 30, 39})  # ggml's ids of the types that have a branch
_BLOCKS = tl.constexpr(8)  # blocks of 32 weights in one step
_PLAIN = tl.constexpr(256)  # plain numbers in one step


@triton.jit
def _halves(pointer, mask):  # type: ignore[no-untyped-def]
    """Return the float16 numbers at byte pointers as float32, 0 where masked."""
    return tl.load(pointer.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _signed(values):  # type: ignore[no-untyped-def]
    """Return bytes as the signed numbers that they stand for, as float32."""
    return values.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _e2m1(codes):  # type: ignore[no-untyped-def]
    """Return what the nibbles of MXFP4 stand for, doubled."""
    code = (codes & 7).to(tl.int32)
    size = tl.where(code < 4, code, tl.where(code < 6, 2 * code - 4, 4 * code - 16)).to(tl.float32)
    return tl.where((codes & 8) != 0, -size, size)


@triton.jit
def _dot_nibbles(rows, mask, x, n_blocks, KIND: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q4_0 and MXFP4: byte j of a block's 16 holds weight j below and weight 16 + j above."""
    block_bytes: tl.constexpr = 18 if KIND == Q4_0 else 17
    head: tl.constexpr = 2 if KIND == Q4_0 else 1
    acc = tl.zeros((R,), tl.float32)
    j = tl.arange(0, 16)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        both = mask[:, None] & there[None, :]
        block = rows[:, None] + b[None, :] * block_bytes
        q = tl.load(block[:, :, None] + head + j[None, None, :], mask=both[:, :, None], other=0)
        at = x + b[:, None] * 32 + j[None, :]
        low = tl.load(at, mask=there[:, None], other=0.0)
        high = tl.load(at + 16, mask=there[:, None], other=0.0)
        if KIND == Q4_0:
            scale = _halves(block, both)
            products = ((q & 15).to(tl.float32) - 8) * low[None] + ((q >> 4).to(tl.float32) - 8) * high[None]
        else:
            exponent = tl.load(block, mask=both, other=0).to(tl.float32)
            scale = tl.exp2(exponent - 128)
            products = _e2m1(q & 15) * low[None] + _e2m1(q >> 4) * high[None]
        acc += tl.sum(tl.sum(products, 2) * scale, 1)
    return acc


@triton.jit
def _dot_q8_0(rows, mask, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    acc = tl.zeros((R,), tl.float32)
    j = tl.arange(0, 32)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        both = mask[:, None] & there[None, :]
        block = rows[:, None] + b[None, :] * 34
        q = tl.load(block[:, :, None] + 2 + j[None, None, :], mask=both[:, :, None], other=0)
        values = tl.load(x + b[:, None] * 32 + j[None, :], mask=there[:, None], other=0.0)
        acc += tl.sum(tl.sum(_signed(q) * values[None], 2) * _halves(block, both), 1)
    return acc


@triton.jit
def _six_bits(block, mask, SUB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale and minimum of a sub-block of Q4_K, of 6 bits each, which lie in bytes 4 to 15."""
    if SUB < 4:
        factor = tl.load(block + 4 + SUB, mask=mask, other=0) & 63
        lift = tl.load(block + 8 + SUB, mask=mask, other=0) & 63
    else:
        shared = tl.load(block + 8 + SUB, mask=mask, other=0)
        factor = (shared & 15) | (tl.load(block + SUB, mask=mask, other=0) >> 6 << 4)
        lift = (shared >> 4) | (tl.load(block + 4 + SUB, mask=mask, other=0) >> 6 << 4)
    return factor.to(tl.float32), lift.to(tl.float32)


@triton.jit
def _sub_q4_k(block, mask, nibbles, x, SUB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale * (nibbles @ x) and minimum * sum(x) of a sub-block, both without the block's own scales."""
    factor, lift = _six_bits(block, mask, SUB)
    values = tl.load(x + 32 * SUB + tl.arange(0, 32))
    dot = tl.sum(nibbles.to(tl.float32) * values[None, :], 1)
    return factor * dot, lift * tl.sum(values, 0)


@triton.jit
def _dot_q4_k(rows, mask, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """A super-block is 4 runs of 32 bytes: sub-block 2 g in the lower nibbles of run g, 2 g + 1 in the upper ones."""
    acc = tl.zeros((R,), tl.float32)
    j = tl.arange(0, 32)
    for b in range(n_blocks):
        block, at = rows + b * 144, x + b * 256
        scale, minimum = _halves(block, mask), _halves(block + 2, mask)
        for g in tl.static_range(4):
            q = tl.load(block[:, None] + 16 + 32 * g + j[None, :], mask=mask[:, None], other=0)
            low, low_minimum = _sub_q4_k(block, mask, q & 15, at, 2 * g)
            high, high_minimum = _sub_q4_k(block, mask, q >> 4, at, 2 * g + 1)
            acc += scale * (low + high) - minimum * (low_minimum + high_minimum)
    return acc


@triton.jit
def _run_q6_k(block, mask, high, x, HALF: tl.constexpr, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what 32 weights of a half add, without the block's own scale."""
    j = tl.arange(0, 32)
    low = tl.load(block[:, None] + 64 * HALF + 32 * (RUN % 2) + j[None, :], mask=mask[:, None], other=0)
    q = ((low >> (4 * (RUN // 2))) & 15) | (((high >> (2 * RUN)) & 3) << 4)
    factor = tl.load(block[:, None] + 192 + 8 * HALF + 2 * RUN + (j // 16)[None, :], mask=mask[:, None], other=0)
    values = tl.load(x + 128 * HALF + 32 * RUN + j)
    return tl.sum(_signed(factor) * (q.to(tl.float32) - 32) * values[None, :], 1)


@triton.jit
def _dot_q6_k(rows, mask, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two halves of 128 weights; each has 64 bytes of lower bits, 32 of upper ones, and 8 sub-scales."""
    acc = tl.zeros((R,), tl.float32)
    j = tl.arange(0, 32)
    for b in range(n_blocks):
        block, at = rows + b * 210, x + b * 256
        scale = _halves(block + 208, mask)
        for half in tl.static_range(2):
            high = tl.load(block[:, None] + 128 + 32 * half + j[None, :], mask=mask[:, None], other=0)
            for run in tl.static_range(4):
                acc += scale * _run_q6_k(block, mask, high, at, half, run)
    return acc


@triton.jit
def _dot_plain(rows, mask, x, cols, KIND: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    number: tl.constexpr = tl.float32 if KIND == F32 else tl.float16 if KIND == F16 else tl.bfloat16
    size: tl.constexpr = 4 if KIND == F32 else 2
    acc = tl.zeros((R,), tl.float32)
    for first in range(0, cols, _PLAIN):
        j = first + tl.arange(0, _PLAIN)
        there = j < cols
        at = (rows[:, None] + size * j[None, :]).to(tl.pointer_type(number))
        weights = tl.load(at, mask=mask[:, None] & there[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weights * tl.load(x + j, mask=there, other=0.0)[None, :], 1)
    return acc


@triton.jit
def _dot(address, row, n_rows, x, cols, row_bytes, KIND: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the products [R] of rows of the matrix at an address with activations x [cols]."""
    mask = row < n_rows
    base = address.to(tl.int64).to(tl.pointer_type(tl.uint8))
    rows = base + tl.where(mask, row, 0).to(tl.int64) * row_bytes
    if KIND == Q4_0 or KIND == MXFP4:  # noqa: SIM109 (Triton compares constants, and looks none up)
        return _dot_nibbles(rows, mask, x, cols // 32, KIND, R)
    elif KIND == Q8_0:
        return _dot_q8_0(rows, mask, x, cols // 32, R)
    elif KIND == Q4_K:
        return _dot_q4_k(rows, mask, x, cols // 256, R)
    elif KIND == Q6_K:
        return _dot_q6_k(rows, mask, x, cols // 256, R)
    else:
        return _dot_plain(rows, mask, x, cols, KIND, R)


@triton.jit
def matvec(  # type: ignore[no-untyped-def]
    address, x, out, n_rows, cols, row_bytes, KIND: tl.constexpr, R: tl.constexpr
):
    """out[t] = matrix @ x[t], for x [T, cols] and out [T, n_rows]; grid (row groups, T)."""
    row, t = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    sums = _dot(address, row, n_rows, x + t * cols, cols, row_bytes, KIND, R)
    tl.store(out + t * n_rows + row, sums, mask=row < n_rows)


@triton.jit
def gate_up(  # type: ignore[no-untyped-def]
    work, x, inner, n_rows, cols, gate_bytes, up_bytes, GATE: tl.constexpr, UP: tl.constexpr, R: tl.constexpr
):
    """inner[p] = silu(gate @ x) * (up @ x), for work [P, 5]: row of x, row of y, addresses of gate, up and down."""
    row, p = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    at = x + tl.load(work + p * 5) * cols
    gate = _dot(tl.load(work + p * 5 + 2), row, n_rows, at, cols, gate_bytes, GATE, R)
    up = _dot(tl.load(work + p * 5 + 3), row, n_rows, at, cols, up_bytes, UP, R)
    tl.store(inner + p * n_rows + row, gate * tl.sigmoid(gate) * up, mask=row < n_rows)


@triton.jit
def down(  # type: ignore[no-untyped-def]
    work, inner, y, n_rows, cols, row_bytes, KIND: tl.constexpr, R: tl.constexpr
):
    """y[pair] = down @ inner[p], for the same work; grid (row groups, P)."""
    row, p = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    sums = _dot(tl.load(work + p * 5 + 4), row, n_rows, inner + p * cols, cols, row_bytes, KIND, R)
    tl.store(y + tl.load(work + p * 5 + 1) * n_rows + row, sums, mask=row < n_rows)
