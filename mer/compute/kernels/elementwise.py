"""Steps on rows of float32: RMSNorm, row gathering, SwiGLU, and the weighted sum of expert outputs."""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.entry import COUNT, PAIR, ROW, entry_of
from mer.compute.kernels.ir import copy_bytes, load_f32, load_i32, load_i64
from mer.compute.kernels.step import ARG0, step
from mer.compute.kernels.vector import add_scaled, dot, scale_product, swiglu16


@step
def rms_norm(row: int, thread: int, n_threads: int) -> None:
    """Write out = x / sqrt(mean(x**2) + eps) * weight for rows of d floats.

    Rows of x, out and weight have room for a multiple of 16 floats; what pads x has no effect on the d results.

    Arguments: x, x_stride_bytes, index (int32 row numbers, or 0), n, d, weight, eps (address of a float32), out,
    out_stride_bytes, turn (the thread that takes the first row).
    """
    x, x_stride, index = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    n, d, weight = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    eps = load_f32(load_i64(row, ARG0 + 6), 0)
    out, out_stride = load_i64(row, ARG0 + 7), load_i64(row, ARG0 + 8)
    whole, padded = d // 16 * 16, (d + 15) // 16 * 16
    for t in range((thread + n_threads - load_i64(row, ARG0 + 9)) % n_threads, n, n_threads):
        source = x + (load_i32(index, t) if index != 0 else t) * x_stride
        square = dot(source, source, whole)
        for i in range(whole, d):
            square += load_f32(source, i) * load_f32(source, i)
        scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(d) + eps))
        scale_product(out + t * out_stride, source, weight, scale, padded)


@step
def gather(row: int, thread: int, n_threads: int) -> None:
    """Copy to each entry's own rows of float32 those of its tokens.

    Arguments: table, number of entries, x, stride_bytes (of x and out), index (int32 row of x for each (token, choice)
    pair), out.
    """
    table, n_entries = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    x, stride = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3)
    index, out = load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        n, own, pair = load_i64(entry, COUNT), load_i64(entry, ROW), load_i64(entry, PAIR)
        for t in range(thread, n, n_threads):
            copy_bytes(out + (own + t) * stride, x + load_i32(index, pair + t) * stride, stride)


@step
def swiglu(row: int, thread: int, n_threads: int) -> None:
    """Write gate = silu(gate) * up for each entry's own rows of float32.

    Arguments: table, number of entries, gate, up, stride_bytes (whole vectors of 16).
    """
    table, n_entries = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    gate, up, stride = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4)
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        begin, vectors = load_i64(entry, ROW) * stride, load_i64(entry, COUNT) * stride // 64
        first, last = vectors * thread // n_threads, vectors * (thread + 1) // n_threads
        swiglu16(gate + begin + 64 * first, up + begin + 64 * first, 16 * (last - first))


@step
def combine(row: int, thread: int, n_threads: int) -> None:
    """Add to each residual row the weighted outputs of its k experts, in router order.

    Arguments: x, stride_bytes (of x and y), n, padded_d, y, weights (float32 [n, k]), places (int32 [n, k]: rows of
    y), k. Threads split the columns.
    """
    x, stride, n = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    vectors, y = load_i64(row, ARG0 + 3) // 16, load_i64(row, ARG0 + 4)
    weights, places, k = load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6), load_i64(row, ARG0 + 7)
    first, last = vectors * thread // n_threads, vectors * (thread + 1) // n_threads
    for t in range(n):
        for j in range(t * k, (t + 1) * k):
            source = y + load_i32(places, j) * stride + 64 * first
            add_scaled(x + t * stride + 64 * first, source, load_f32(weights, j), 16 * (last - first))
