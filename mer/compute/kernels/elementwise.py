"""Steps on rows of float32: RMSNorm, row gathering, SwiGLU, biases, and weighted sums of outputs."""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.claim import chunk_of, claim_unit
from mer.compute.kernels.entry import COUNT, PAIR, ROW, entry_of
from mer.compute.kernels.ir import copy_bytes, load_f32, load_i32, load_i64
from mer.compute.kernels.step import ARG0, step
from mer.compute.kernels.vector import add_scaled, dot, scale_product, swiglu16

_MIN_VECTORS = 16  # a run of fewer vectors takes less time than claiming it


@step
def rms_norm(row: int, _thread: int, _n_threads: int) -> None:
    """Write out = x / sqrt(mean(x**2) + eps) * weight for rows of d floats.

    Rows of x, out and weight have room for a multiple of 16 floats; what pads x has no effect on the d results.

    Arguments: x, x_stride_bytes, index (int32 row numbers, or 0), n, d, weight, eps (address of a float32), out,
    out_stride_bytes. Rows are claimed.
    """
    x, x_stride, index = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    n, d, weight = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    eps = load_f32(load_i64(row, ARG0 + 6), 0)
    out, out_stride = load_i64(row, ARG0 + 7), load_i64(row, ARG0 + 8)
    whole, padded = d // 16 * 16, (d + 15) // 16 * 16
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        source = x + (load_i32(index, t) if index != 0 else t) * x_stride
        square = dot(source, source, whole)
        for i in range(whole, d):
            square += load_f32(source, i) * load_f32(source, i)
        scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(d) + eps))
        scale_product(out + t * out_stride, source, weight, scale, padded)


@step
def gather(row: int, _thread: int, _n_threads: int) -> None:
    """Copy to each entry's own rows of float32 those of its tokens.

    Arguments: table, number of entries, x, stride_bytes (of x and out), index (int32 row of x for each (token, choice)
    pair), out. Rows are claimed.
    """
    table, n_entries = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    x, stride = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3)
    index, out = load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    item, first = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        n, own, pair = load_i64(entry, COUNT), load_i64(entry, ROW), load_i64(entry, PAIR)
        while item < first + n:
            t = item - first
            copy_bytes(out + (own + t) * stride, x + load_i32(index, pair + t) * stride, stride)
            item = claim_unit(row)
        first += n


@step
def swiglu(row: int, _thread: int, n_threads: int) -> None:
    """Write gate = silu(gate) * up for each entry's own rows of float32.

    Arguments: table, number of entries, gate, up, stride_bytes (whole vectors of 16). Runs of vectors are claimed.
    """
    table, n_entries = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    gate, up, stride = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4)
    item, before = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        begin, vectors = load_i64(entry, ROW) * stride, load_i64(entry, COUNT) * stride // 64
        chunk = chunk_of(vectors, n_threads, _MIN_VECTORS)
        runs = (vectors + chunk - 1) // chunk
        while item < before + runs:
            first = (item - before) * chunk
            last = min(first + chunk, vectors)
            swiglu16(gate + begin + 64 * first, up + begin + 64 * first, 16 * (last - first))
            item = claim_unit(row)
        before += runs


@step
def combine(row: int, _thread: int, n_threads: int) -> None:
    """Add to each residual row the weighted outputs of its k experts, in router order.

    Arguments: x, stride_bytes (of x and y), n, padded_d, y, weights (float32 [n, k]), places (int32 [n, k]: rows of
    y), k. Runs of columns are claimed.
    """
    x, stride, n = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    vectors, y = load_i64(row, ARG0 + 3) // 16, load_i64(row, ARG0 + 4)
    weights, places, k = load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6), load_i64(row, ARG0 + 7)
    chunk = chunk_of(vectors, n_threads, _MIN_VECTORS)
    while True:
        first = claim_unit(row) * chunk
        if first >= vectors:
            return
        n_floats = 16 * (min(first + chunk, vectors) - first)
        for t in range(n):
            for j in range(t * k, (t + 1) * k):
                source = y + load_i32(places, j) * stride + 64 * first
                add_scaled(x + t * stride + 64 * first, source, load_f32(weights, j), n_floats)


@step
def add_gated(row: int, _thread: int, _n_threads: int) -> None:
    """Add to each residual row another one, times the logistic sigmoid of its logit.

    Arguments: x, stride_bytes (of x and y, whole vectors of 16), n, y, logits (one float32 at the start of each row),
    logit_stride_bytes. Rows are claimed.
    """
    x, stride, n = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    y, logits, logit_stride = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        logit = np.float64(load_f32(logits + t * logit_stride, 0))
        share = np.float32(1.0 / (1.0 + math.exp(-logit)))
        add_scaled(x + t * stride, y + t * stride, share, stride // 4)


@step
def fill_rows(row: int, _thread: int, _n_threads: int) -> None:
    """Write a bias to each row of results, for a product that adds to what is there.

    Arguments: out, stride_bytes (whole vectors of 16), n, bias (float32, padded like a row). Rows are claimed.
    """
    out, stride = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    n, bias = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        copy_bytes(out + t * stride, bias, stride)
