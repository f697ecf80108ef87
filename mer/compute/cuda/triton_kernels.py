"""Fused dequantize-and-multiply in Triton, for a few rows: weights are read once, in the file's bytes.

A program computes R rows of a matrix for one row of activations and walks all blocks along K, in float32 throughout.
Each thread keeps sums of its own until the end; they have one order, whatever is computed beside it. Instructions bind
as much as memory does, so that weights are loaded in words of 16 bits and not converted, see `_field`. `_dot` has a
branch for each weight type; the branch is chosen as a kernel is compiled. Rows behind the last are computed as the
first is, and not stored. Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h).
"""

from __future__ import annotations

import triton
import triton.language as tl

R = 8  # rows of a matrix that a program computes
WARPS = 1  # of a program: each thread has its share of all rows, and loads an activation once for these
KINDS = frozenset({0, 1, 2, 8, 12, 14, 16, 18, 20, 30, 39})  # ggml's ids of the types that have a branch
F32, F16, Q4_0, Q8_0, Q4_K, Q6_K = (tl.constexpr(kind) for kind in (0, 1, 2, 8, 12, 14))
IQ2_XXS, IQ3_XXS, IQ4_NL, BF16, MXFP4 = (tl.constexpr(kind) for kind in (16, 18, 20, 30, 39))
BOOKS = (("IQ2_XXS", 0), ("IQ3_XXS", 512))  # code books, and where their words of 32 bits begin in `books`
_IQ3_BOOK = tl.constexpr(BOOKS[1][1])
WORK_WORDS, BIASED_WORDS = 5, 8  # int64 of a pair that an expert computes
_WORK_WORDS, _BIASED_WORDS = tl.constexpr(WORK_WORDS), tl.constexpr(BIASED_WORDS)
_BLOCKS = tl.constexpr(8)  # blocks of 32 weights in one step
_PLAIN = tl.constexpr(256)  # plain numbers in one step


@triton.jit
def _halves(pointer, mask):  # type: ignore[no-untyped-def]
    """Return the float16 numbers at byte pointers as float32, 0 where masked."""
    return tl.load(pointer.to(tl.pointer_type(tl.float16)), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _words(pointer, mask):  # type: ignore[no-untyped-def]
    """Return the little-endian 16-bit words at byte pointers as int32, 0 where masked."""
    return tl.load(pointer.to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.int32)


@triton.jit
def _field(words, MASK: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of a mask, where they stand, less ZERO, as float32.

    Exact below 2^23, where the mantissa of 2^23 has room for them: one logical operation and one subtraction, where a
    conversion from integers takes as long as four.
    """
    return ((words & MASK) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)


@triton.jit
def _e2m1(codes):  # type: ignore[no-untyped-def]
    """Return what the nibbles of MXFP4 stand for, doubled."""
    code = codes.to(tl.int32)
    size = tl.where((code & 6) == 0, code & 1, (2 | code & 1) << ((code >> 1) & 3) >> 1)
    return tl.where((code & 8) != 0, -_field(size, 15, 0), _field(size, 15, 0))


@triton.jit
def _four(words, x, j, mask):  # type: ignore[no-untyped-def]
    """Return, less 8 times their activations, the products of words' nibbles with activations at x and x + 16.

    Words hold bytes 2 j and 2 j + 1; lower nibbles are of weights 2 j and 2 j + 1, upper ones of those 16 behind.
    What a nibble's place in the word multiplies it by, its activation is divided by, which is exact.
    """
    a = tl.load(x + 2 * j, mask=mask, other=0.0)
    b = tl.load(x + 2 * j + 1, mask=mask, other=0.0) * 0.00390625
    c = tl.load(x + 2 * j + 16, mask=mask, other=0.0) * 0.0625
    d = tl.load(x + 2 * j + 17, mask=mask, other=0.0) * 0.000244140625
    lower = _field(words, 0xF, 8) * a[None] + _field(words, 0xF00, 2048) * b[None]
    return lower + _field(words, 0xF0, 128) * c[None] + _field(words, 0xF000, 32768) * d[None]


@triton.jit
def _dot_q4_0(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte j of a block's 16 holds weight j below and weight 16 + j above."""
    acc = tl.zeros((R, _BLOCKS, 8), tl.float32)
    j = tl.arange(0, 8)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        block = rows[:, None] + b[None, :] * 18
        words = _words(block[:, :, None] + 2 + 2 * j[None, None, :], there[None, :, None])
        dot = _four(words, x + b[:, None] * 32, j[None, :], there[:, None])
        acc += dot * _halves(block, there[None, :])[:, :, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _dot_mxfp4(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte j of a block's 16, behind its exponent, holds weight j below and weight 16 + j above."""
    acc = tl.zeros((R, _BLOCKS, 16), tl.float32)
    j = tl.arange(0, 16)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        block = rows[:, None] + b[None, :] * 17
        q = tl.load(block[:, :, None] + 1 + j[None, None, :], mask=there[None, :, None], other=0)
        at = x + b[:, None] * 32 + j[None, :]
        low = tl.load(at, mask=there[:, None], other=0.0)
        high = tl.load(at + 16, mask=there[:, None], other=0.0)
        scale = tl.exp2(tl.load(block, mask=there[None, :], other=0).to(tl.float32) - 128)
        acc += (_e2m1(q & 15) * low[None] + _e2m1(q >> 4) * high[None]) * scale[:, :, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _iq4(codes):  # type: ignore[no-untyped-def]
    """Return what nibbles of IQ4_NL stand for; four words hold the 16 values, with 128 added."""
    low = tl.where(codes < 4, 0x3F2D1801, 0x766A5D4F)
    high = tl.where(codes < 12, 0xA6998D81 - 0x100000000, 0xF1D9C5B5 - 0x100000000)
    return _field(tl.where(codes < 8, low, high) >> ((codes & 3) * 8), 0xFF, 128)


@triton.jit
def _dot_iq4_nl(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Byte j of a block's 16 holds weight j below and weight 16 + j above."""
    acc = tl.zeros((R, _BLOCKS, 8), tl.float32)
    j = tl.arange(0, 8)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        block = rows[:, None] + b[None, :] * 18
        words = _words(block[:, :, None] + 2 + 2 * j[None, None, :], there[None, :, None])
        dot = tl.zeros((R, _BLOCKS, 8), tl.float32)
        for nibble in tl.static_range(4):  # of weights 2 j, 16 + 2 j, 2 j + 1, 17 + 2 j
            at = x + b[:, None] * 32 + 2 * j[None, :] + 16 * (nibble % 2) + nibble // 2
            dot += _iq4((words >> (4 * nibble)) & 15) * tl.load(at, mask=there[:, None], other=0.0)[None]
        acc += dot * _halves(block, there[None, :])[:, :, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _eight(low, high, seven, x):  # type: ignore[no-untyped-def]
    """Return the products of 8 magnitudes, bytes of two words, with activations at x; `seven` holds 7 of their signs.

    The eighth makes the number of negative ones even.
    """
    folded = seven ^ (seven >> 4)
    folded ^= folded >> 2
    signs = seven | (((folded ^ (folded >> 1)) & 1) << 7)
    dot = tl.zeros(signs.shape, tl.float32)
    for i in tl.static_range(8):
        size = _field((low if i < 4 else high) >> (8 * (i % 4)), 0xFF, 0)
        dot += tl.where(((signs >> i) & 1) != 0, -size, size) * tl.load(x + i)[None]
    return dot


@triton.jit
def _dot_iq2_xxs(rows, x, books, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """8 groups of 32 weights: the numbers of 4 entries of 8, then 4 times 7 signs and the sub-scale."""
    acc = tl.zeros((R, 8, 4), tl.float32)
    g, j = tl.arange(0, 8), tl.arange(0, 4)
    everywhere = tl.full((1, 1, 1), 1, tl.int1)
    for b in range(n_blocks):
        block = rows + b * 66
        group = block[:, None, None] + 2 + 8 * g[None, :, None]
        entry = books + 2 * tl.load(group + j[None, None, :]).to(tl.int32)
        packed = _words(group + 4, everywhere) | (_words(group + 6, everywhere) << 16)
        at = x + b * 256 + 32 * g[:, None] + 8 * j[None, :]
        dot = _eight(tl.load(entry), tl.load(entry + 1), (packed >> (7 * j)[None, None, :]) & 127, at)
        acc += dot * _field((packed >> 27) & 30 | 1, 31, 0) * (_halves(block, True) * 0.125)[:, None, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _dot_iq3_xxs(rows, x, books, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The numbers of 64 entries of 4 weights, then for each 32 weights 4 times 7 signs and the sub-scale."""
    acc = tl.zeros((R, 8, 4), tl.float32)
    g, j = tl.arange(0, 8), tl.arange(0, 4)
    everywhere = tl.full((1, 1, 1), 1, tl.int1)
    for b in range(n_blocks):
        block = rows + b * 98
        numbers = _words(block[:, None, None] + 2 + 8 * g[None, :, None] + 2 * j[None, None, :], everywhere)
        other = block[:, None, None] + 66 + 4 * g[None, :, None]
        packed = _words(other, everywhere) | (_words(other + 2, everywhere) << 16)
        at = x + b * 256 + 32 * g[:, None] + 8 * j[None, :]
        low, high = tl.load(books + _IQ3_BOOK + (numbers & 255)), tl.load(books + _IQ3_BOOK + (numbers >> 8))
        dot = _eight(low, high, (packed >> (7 * j)[None, None, :]) & 127, at)
        acc += dot * _field((packed >> 27) & 30 | 1, 31, 0) * (_halves(block, True) * 0.25)[:, None, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _dot_q8_0(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    acc = tl.zeros((R, _BLOCKS, 16), tl.float32)
    j = tl.arange(0, 16)
    for first in range(0, n_blocks, _BLOCKS):
        b = first + tl.arange(0, _BLOCKS)
        there = b < n_blocks
        block = rows[:, None] + b[None, :] * 34
        words = _words(block[:, :, None] + 2 + 2 * j[None, None, :], there[None, :, None]) ^ 0x8080
        at = x + b[:, None] * 32 + 2 * j[None, :]
        even = tl.load(at, mask=there[:, None], other=0.0)
        odd = tl.load(at + 1, mask=there[:, None], other=0.0) * 0.00390625
        dot = _field(words, 0xFF, 128) * even[None] + _field(words, 0xFF00, 32768) * odd[None]
        acc += dot * _halves(block, there[None, :])[:, :, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _six_bits(block, g, HIGH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scale and minimum of sub-block 2 g, or with HIGH 2 g + 1, of Q4_K: of 6 bits each, in bytes 4 to 15."""
    sub = 2 * g + HIGH
    near = tl.load(block + 4 + sub % 4).to(tl.int32)
    far = tl.load(block + 8 + sub % 4).to(tl.int32)
    shared = tl.load(block + 12 + sub % 4).to(tl.int32)
    factor = tl.where(g < 2, near & 63, (shared & 15) | (near >> 6 << 4))
    lift = tl.where(g < 2, far & 63, (shared >> 4) | (far >> 6 << 4))
    return _field(factor, 63, 0), _field(lift, 63, 0)


@triton.jit
def _dot_q4_k(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """A super-block is 4 runs of 32 bytes: sub-block 2 g in the lower nibbles of run g, 2 g + 1 in the upper ones."""
    acc = tl.zeros((R, 4, 16), tl.float32)
    g, j = tl.arange(0, 4), tl.arange(0, 16)
    everywhere = tl.full((1, 1), 1, tl.int1)
    for b in range(n_blocks):
        block = rows + b * 144
        scale, minimum = _halves(block, True), _halves(block + 2, True)
        words = _words(block[:, None, None] + 16 + 32 * g[None, :, None] + 2 * j[None, None, :], everywhere[None])
        at = x + b * 256 + 64 * g[:, None] + 2 * j[None, :]
        a, a2 = tl.load(at), tl.load(at + 1)
        c, c2 = tl.load(at + 32), tl.load(at + 33)
        low = _field(words, 0xF, 0) * a[None] + _field(words, 0xF00, 0) * (a2 * 0.00390625)[None]
        high = _field(words, 0xF0, 0) * (c * 0.0625)[None] + _field(words, 0xF000, 0) * (c2 * 0.000244140625)[None]
        factor, lift = _six_bits(block[:, None], g[None, :], 0)
        high_factor, high_lift = _six_bits(block[:, None], g[None, :], 1)
        dots = factor[:, :, None] * low + high_factor[:, :, None] * high
        lifts = lift[:, :, None] * (a + a2)[None] + high_lift[:, :, None] * (c + c2)[None]
        acc += scale[:, None, None] * dots - minimum[:, None, None] * lifts
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _run_q6_k(block, low, high, x, h, j, RUN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return what two weights of run RUN of each half add, without the block's own scale."""
    bits = ((low >> (4 * (RUN // 2))) & 0x0F0F) | (((high >> (2 * RUN)) & 0x0303) << 4)
    at = x + 128 * h[:, None] + 32 * RUN + 2 * j[None, :]
    even, odd = tl.load(at), tl.load(at + 1) * 0.00390625
    dot = _field(bits, 0x3F, 32) * even[None] + _field(bits, 0x3F00, 8192) * odd[None]
    factor = tl.load(block[:, None, None] + 192 + 8 * h[None, :, None] + 2 * RUN + (j // 8)[None, None, :])
    return dot * _field(factor.to(tl.int32) ^ 0x80, 0xFF, 128)


@triton.jit
def _dot_q6_k(rows, x, n_blocks, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two halves of 128 weights; each has 64 bytes of lower bits, 32 of upper ones, and 8 sub-scales."""
    acc = tl.zeros((R, 2, 16), tl.float32)
    h, j = tl.arange(0, 2), tl.arange(0, 16)
    everywhere = tl.full((1, 1, 1), 1, tl.int1)
    for b in range(n_blocks):
        block, at = rows + b * 210, x + b * 256
        lower = block[:, None, None] + 64 * h[None, :, None] + 2 * j[None, None, :]
        first, second = _words(lower, everywhere), _words(lower + 32, everywhere)
        high = _words(block[:, None, None] + 128 + 32 * h[None, :, None] + 2 * j[None, None, :], everywhere)
        sums = _run_q6_k(block, first, high, at, h, j, 0) + _run_q6_k(block, second, high, at, h, j, 1)
        sums += _run_q6_k(block, first, high, at, h, j, 2) + _run_q6_k(block, second, high, at, h, j, 3)
        acc += sums * _halves(block + 208, True)[:, None, None]
    return tl.sum(tl.sum(acc, 2), 1)


@triton.jit
def _dot_plain(rows, x, cols, KIND: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    number: tl.constexpr = tl.float32 if KIND == F32 else tl.float16 if KIND == F16 else tl.bfloat16
    size: tl.constexpr = 4 if KIND == F32 else 2
    acc = tl.zeros((R, _PLAIN), tl.float32)
    for first in range(0, cols, _PLAIN):
        j = first + tl.arange(0, _PLAIN)
        there = j < cols
        at = (rows[:, None] + size * j[None, :]).to(tl.pointer_type(number))
        weights = tl.load(at, mask=there[None, :], other=0.0).to(tl.float32)
        acc += weights * tl.load(x + j, mask=there, other=0.0)[None, :]
    return tl.sum(acc, 1)


@triton.jit
def _dot(address, books, row, n_rows, x, cols, row_bytes, KIND: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the products [R] of rows of the matrix at an address with activations x [cols]; `books` as in `BOOKS`."""
    mask = row < n_rows
    base = address.to(tl.int64).to(tl.pointer_type(tl.uint8))
    rows = base + tl.where(mask, row, 0).to(tl.int64) * row_bytes
    if KIND == Q4_0:
        return _dot_q4_0(rows, x, cols // 32, R)
    elif KIND == MXFP4:
        return _dot_mxfp4(rows, x, cols // 32, R)
    elif KIND == IQ4_NL:
        return _dot_iq4_nl(rows, x, cols // 32, R)
    elif KIND == IQ2_XXS:
        return _dot_iq2_xxs(rows, x, books, cols // 256, R)
    elif KIND == IQ3_XXS:
        return _dot_iq3_xxs(rows, x, books, cols // 256, R)
    elif KIND == Q8_0:
        return _dot_q8_0(rows, x, cols // 32, R)
    elif KIND == Q4_K:
        return _dot_q4_k(rows, x, cols // 256, R)
    elif KIND == Q6_K:
        return _dot_q6_k(rows, x, cols // 256, R)
    else:
        return _dot_plain(rows, x, cols, KIND, R)


@triton.jit
def _floats(address, row, n_rows):  # type: ignore[no-untyped-def]
    """Return float32 numbers [R] of the vector at an address, 0 behind its end."""
    return tl.load(address.to(tl.pointer_type(tl.float32)) + row, mask=row < n_rows, other=0.0)


@triton.jit
def matvec(  # type: ignore[no-untyped-def]
    address, books, x, out, n_rows, cols, row_bytes, KIND: tl.constexpr, R: tl.constexpr
):
    """out[t] = matrix @ x[t], for x [T, cols] and out [T, n_rows]; grid (row groups, T)."""
    row, t = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    sums = _dot(address, books, row, n_rows, x + t * cols, cols, row_bytes, KIND, R)
    tl.store(out + t * n_rows + row, sums, mask=row < n_rows)


@triton.jit
def gate_up(  # type: ignore[no-untyped-def]
    work,
    books,
    x,
    inner,
    n_rows,
    cols,
    gate_bytes,
    up_bytes,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BIASED: tl.constexpr,
    R: tl.constexpr,
):
    """inner[p] = activation of gate @ x and up @ x; grid (row groups, P).

    work is [P, 5]: row of x, row of y, addresses of gate, up and down; or [P, 8] with those of their biases, if
    BIASED. The activation's numbers are constants, so that those of SwiGLU leave nothing of what others need.
    """
    work += tl.program_id(1) * (_BIASED_WORDS if BIASED else _WORK_WORDS)
    row, p = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    at = x + tl.load(work) * cols
    gate = _dot(tl.load(work + 2), books, row, n_rows, at, cols, gate_bytes, GATE, R)
    up = _dot(tl.load(work + 3), books, row, n_rows, at, cols, up_bytes, UP, R)
    if BIASED:
        gate += _floats(tl.load(work + 5), row, n_rows)
        up += _floats(tl.load(work + 6), row, n_rows)
    if float("inf") > LIMIT:  # not by `tl.minimum`, which makes a number of NaN
        gate, up = tl.where(gate > LIMIT, LIMIT, gate), tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    z = gate if ALPHA == 1 else ALPHA * gate
    if BETA != 0:
        z *= 1 + BETA * gate * gate
    if SHIFT != 0:
        up += SHIFT
    tl.store(inner + p * n_rows + row, gate * tl.sigmoid(z) * up, mask=row < n_rows)


@triton.jit
def down(  # type: ignore[no-untyped-def]
    work, books, inner, y, n_rows, cols, row_bytes, KIND: tl.constexpr, BIASED: tl.constexpr, R: tl.constexpr
):
    """y[pair] = down @ inner[p], for the same work; grid (row groups, P)."""
    row, p = tl.program_id(0) * R + tl.arange(0, R), tl.program_id(1)
    work += p * (_BIASED_WORDS if BIASED else _WORK_WORDS)
    sums = _dot(tl.load(work + 4), books, row, n_rows, inner + p * cols, cols, row_bytes, KIND, R)
    if BIASED:
        sums += _floats(tl.load(work + 7), row, n_rows)
    tl.store(y + tl.load(work + 1) * n_rows + row, sums, mask=row < n_rows)
