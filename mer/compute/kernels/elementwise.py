"""Steps on rows of float32: RMSNorm, row gathering, activations, biases, and weighted sums of outputs."""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.activation import join_halves
from mer.compute.kernels.claim import chunk_of, claim_unit
from mer.compute.kernels.entry import COUNT, EXPERT_BIT, PAIR, RAW, ROW, TableWords, entry_of
from mer.compute.kernels.ir import copy_bytes, load_f32, load_i32, load_i64, store_f32, zero_bytes
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import step
from mer.compute.kernels.vector import add_scaled, cap16, dot, scale_product
from mer.compute.kernels.words import Words, columns

_MIN_VECTORS = 16  # a run of fewer vectors takes less time than claiming it


@njit
def inverse_rms(x, d, eps):  # type: ignore[no-untyped-def]
    """Return 1 / sqrt(mean(x**2) + eps) of d floats."""
    whole = d // 16 * 16
    square = dot(x, x, whole)
    for i in range(whole, d):
        square += load_f32(x, i) * load_f32(x, i)
    return np.float32(1) / np.float32(math.sqrt(square / np.float32(d) + eps))


class NormWords(Words):
    """Words of a row of `rms_norm`.

    x, x_stride (bytes), index (int32 row numbers, or 0), n, d, weight, eps (address of a float32), out, out_stride
    (bytes).
    """

    x: int
    x_stride: int
    index: int
    n: int
    d: int
    weight: int
    eps: int
    out: int
    out_stride: int


NORM = columns(NormWords)


@step(NormWords)
def rms_norm(row: int, _thread: int, _n_threads: int) -> None:
    """Write out = x / sqrt(mean(x**2) + eps) * weight for rows of d floats.

    Rows of x, out and weight have room for a multiple of 16 floats; what pads x has no effect on the d results.

    Rows are claimed.
    """
    x, x_stride, index = load_i64(row, NORM.x), load_i64(row, NORM.x_stride), load_i64(row, NORM.index)
    n, d, weight = load_i64(row, NORM.n), load_i64(row, NORM.d), load_i64(row, NORM.weight)
    eps = load_f32(load_i64(row, NORM.eps), 0)
    out, out_stride = load_i64(row, NORM.out), load_i64(row, NORM.out_stride)
    padded = (d + 15) // 16 * 16
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        source = x + (load_i32(index, t) if index != 0 else t) * x_stride
        scale = inverse_rms(source, d, eps)
        scale_product(out + t * out_stride, source, weight, scale, padded)


class GatherWords(TableWords):
    """Words of a row of `gather`.

    table, n_entries (see `TableWords`), x, stride (bytes, of x and out), index (int32 row of x for each (token, choice)
    pair), out.
    """

    x: int
    stride: int
    index: int
    out: int


GATHER = columns(GatherWords)


@step(GatherWords)
def gather(row: int, _thread: int, _n_threads: int) -> None:
    """Copy to each entry's own rows of float32 those of its tokens.

    Rows are claimed.
    """
    table, n_entries = load_i64(row, GATHER.table), load_i64(row, GATHER.n_entries)
    x, stride = load_i64(row, GATHER.x), load_i64(row, GATHER.stride)
    index, out = load_i64(row, GATHER.index), load_i64(row, GATHER.out)
    item, first = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        n, own, pair = load_i64(entry, COUNT), load_i64(entry, ROW), load_i64(entry, PAIR)
        while item < first + n:
            t = item - first
            copy_bytes(out + (own + t) * stride, x + load_i32(index, pair + t) * stride, stride)
            item = claim_unit(row)
        first += n


class ActivateWords(TableWords):
    """Words of a row of `activate`.

    table, n_entries (see `TableWords`), gate, up, stride (bytes, whole vectors of 16), activation (address of its
    numbers, or 0: SwiGLU).
    """

    gate: int
    up: int
    stride: int
    activation: int


ACTIVATE = columns(ActivateWords)


@step(ActivateWords)
def activate(row: int, _thread: int, n_threads: int) -> None:
    """Write gate = activation of gate and up for each entry's own rows of float32.

    Runs of vectors are claimed.
    """
    table, n_entries = load_i64(row, ACTIVATE.table), load_i64(row, ACTIVATE.n_entries)
    gate, up, stride = load_i64(row, ACTIVATE.gate), load_i64(row, ACTIVATE.up), load_i64(row, ACTIVATE.stride)
    activation = load_i64(row, ACTIVATE.activation)
    item, before = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        begin, vectors = load_i64(entry, ROW) * stride, load_i64(entry, COUNT) * stride // 64
        chunk = chunk_of(vectors, n_threads, _MIN_VECTORS)
        runs = (vectors + chunk - 1) // chunk
        while item < before + runs:
            first = (item - before) * chunk
            last = min(first + chunk, vectors)
            join_halves(gate + begin + 64 * first, up + begin + 64 * first, 16 * (last - first), activation)
            item = claim_unit(row)
        before += runs


class CombineWords(Words):
    """Words of a row of `combine`.

    x, stride (bytes, of x and y), n, padded_d, y, weights (float32 [n, k]), places (int32 [n, k]: rows of y), k.
    """

    x: int
    stride: int
    n: int
    padded_d: int
    y: int
    weights: int
    places: int
    k: int


COMBINE = columns(CombineWords)


@step(CombineWords)
def combine(row: int, _thread: int, n_threads: int) -> None:
    """Add to each residual row the weighted outputs of its k experts, in router order.

    Runs of columns are claimed.
    """
    x, stride, n = load_i64(row, COMBINE.x), load_i64(row, COMBINE.stride), load_i64(row, COMBINE.n)
    vectors, y = load_i64(row, COMBINE.padded_d) // 16, load_i64(row, COMBINE.y)
    weights, places, k = load_i64(row, COMBINE.weights), load_i64(row, COMBINE.places), load_i64(row, COMBINE.k)
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


class GatedWords(Words):
    """Words of a row of `add_gated`.

    x, stride (bytes, of x and y, whole vectors of 16), n, y, logits (one float32 at the start of each row),
    logit_stride (bytes).
    """

    x: int
    stride: int
    n: int
    y: int
    logits: int
    logit_stride: int


GATED = columns(GatedWords)


@step(GatedWords)
def add_gated(row: int, _thread: int, _n_threads: int) -> None:
    """Add to each residual row another one, times the logistic sigmoid of its logit.

    Rows are claimed.
    """
    x, stride, n = load_i64(row, GATED.x), load_i64(row, GATED.stride), load_i64(row, GATED.n)
    y, logits, logit_stride = load_i64(row, GATED.y), load_i64(row, GATED.logits), load_i64(row, GATED.logit_stride)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        logit = np.float64(load_f32(logits + t * logit_stride, 0))
        share = np.float32(1.0 / (1.0 + math.exp(-logit)))
        add_scaled(x + t * stride, y + t * stride, share, stride // 4)


class FillEntriesWords(TableWords):
    """Words of a row of `fill_entries`.

    table, n_entries (see `TableWords`), out, stride (bytes), first (word of the entry that gives the first row: ROW or
    PAIR), biases (float32, one row for each expert), n_bytes (of such a row).
    """

    out: int
    stride: int
    first: int
    biases: int
    n_bytes: int


FILL_ENTRIES = columns(FillEntriesWords)


@step(FillEntriesWords)
def fill_entries(row: int, _thread: int, _n_threads: int) -> None:
    """Write to an entry's own rows of results the bias of its expert, for a product that adds to what is there.

    Rows are claimed.
    """
    table, n_entries = load_i64(row, FILL_ENTRIES.table), load_i64(row, FILL_ENTRIES.n_entries)
    out, stride = load_i64(row, FILL_ENTRIES.out), load_i64(row, FILL_ENTRIES.stride)
    first = load_i64(row, FILL_ENTRIES.first)
    biases, n_bytes = load_i64(row, FILL_ENTRIES.biases), load_i64(row, FILL_ENTRIES.n_bytes)
    item, before = claim_unit(row), 0
    for number in range(n_entries):
        entry = entry_of(row, table, number)
        n, own = load_i64(entry, COUNT), load_i64(entry, first)
        bias = biases + (load_i64(entry, RAW) >> EXPERT_BIT) * n_bytes
        while item < before + n:
            copy_bytes(out + (own + item - before) * stride, bias, n_bytes)
            item = claim_unit(row)
        before += n


class FillWords(Words):
    """Words of a row of `fill_rows` and of `add_bias`.

    out, stride (bytes, whole vectors of 16), n, bias (float32, padded like a row).
    """

    out: int
    stride: int
    n: int
    bias: int


FILL = columns(FillWords)


@step(FillWords)
def fill_rows(row: int, _thread: int, _n_threads: int) -> None:
    """Write a bias to each row of results, for a product that adds to what is there.

    Rows are claimed.
    """
    out, stride = load_i64(row, FILL.out), load_i64(row, FILL.stride)
    n, bias = load_i64(row, FILL.n), load_i64(row, FILL.bias)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        copy_bytes(out + t * stride, bias, stride)


@step(FillWords)
def add_bias(row: int, _thread: int, _n_threads: int) -> None:
    """Add a bias to each row of results, for a product that adds to what is there.

    Rows are claimed.
    """
    out, stride = load_i64(row, FILL.out), load_i64(row, FILL.stride)
    n, bias = load_i64(row, FILL.n), load_i64(row, FILL.bias)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        add_scaled(out + t * stride, bias, np.float32(1), stride // 4)


class ClearWords(Words):
    """Words of a row of `clear_rows`.

    x, stride (bytes, whole vectors of 16), n.
    """

    x: int
    stride: int
    n: int


CLEAR = columns(ClearWords)


@step(ClearWords)
def clear_rows(row: int, _thread: int, _n_threads: int) -> None:
    """Write zeros to rows, for steps that add to what is there.

    Rows are claimed.
    """
    x, stride, n = load_i64(row, CLEAR.x), load_i64(row, CLEAR.stride), load_i64(row, CLEAR.n)
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        zero_bytes(x + t * stride, stride)


class AdditionWords(Words):
    """Words of a row of `add_rows`.

    x, stride (bytes, of x and y, whole vectors of 16), n, d, y, norm (float32 weight of d, padded like a row, or 0),
    eps (address of a float32), scale (address of a float32, or 0).
    """

    x: int
    stride: int
    n: int
    d: int
    y: int
    norm: int
    eps: int
    scale: int


ADDITION = columns(AdditionWords)


@step(AdditionWords)
def add_rows(row: int, _thread: int, _n_threads: int) -> None:
    """Write x = (x + norm(y)) * scale for rows of d floats; see `Addition`. With a norm, y is normalized in place.

    Rows are claimed.
    """
    x, stride, n = load_i64(row, ADDITION.x), load_i64(row, ADDITION.stride), load_i64(row, ADDITION.n)
    d, y, norm = load_i64(row, ADDITION.d), load_i64(row, ADDITION.y), load_i64(row, ADDITION.norm)
    eps, scale = load_f32(load_i64(row, ADDITION.eps), 0), load_i64(row, ADDITION.scale)
    padded = stride // 4
    while True:
        t = claim_unit(row)
        if t >= n:
            return
        to, source = x + t * stride, y + t * stride
        if norm != 0:
            scale_product(source, source, norm, inverse_rms(source, d, eps), padded)
        add_scaled(to, source, np.float32(1), padded)
        if scale != 0:
            for i in range(d):
                store_f32(to, i, load_f32(to, i) * load_f32(scale, 0))


class HeadsWords(Words):
    """Words of a row of `normalize_heads`.

    values (float32 [n, heads, c], rows at a stride), stride (bytes), n, heads, c, eps (address of a float32).
    """

    values: int
    stride: int
    n: int
    heads: int
    c: int
    eps: int


HEADS = columns(HeadsWords)


@step(HeadsWords)
def normalize_heads(row: int, _thread: int, _n_threads: int) -> None:
    """Divide each head of each row by its root mean square, in place.

    Heads are claimed. They lie side by side without padding, so that whole vectors would reach into the next one.
    """
    values, stride = load_i64(row, HEADS.values), load_i64(row, HEADS.stride)
    n, heads, c = load_i64(row, HEADS.n), load_i64(row, HEADS.heads), load_i64(row, HEADS.c)
    eps = load_f32(load_i64(row, HEADS.eps), 0)
    while True:
        item = claim_unit(row)
        if item >= n * heads:
            return
        head = values + item // heads * stride + 4 * c * (item % heads)
        factor = inverse_rms(head, c, eps)
        for i in range(c):
            store_f32(head, i, load_f32(head, i) * factor)


class CapWords(Words):
    """Words of a row of `cap_rows`.

    x, stride (bytes, whole vectors of 16), n, cap (address of a float32).
    """

    x: int
    stride: int
    n: int
    cap: int


CAP = columns(CapWords)


@step(CapWords)
def cap_rows(row: int, _thread: int, n_threads: int) -> None:
    """Write x = cap * tanh(x / cap).

    Runs of vectors are claimed.
    """
    x, vectors = load_i64(row, CAP.x), load_i64(row, CAP.stride) // 64 * load_i64(row, CAP.n)
    cap = load_f32(load_i64(row, CAP.cap), 0)
    chunk = chunk_of(vectors, n_threads, _MIN_VECTORS)
    while True:
        first = claim_unit(row) * chunk
        if first >= vectors:
            return
        cap16(x + 64 * first, cap, 16 * (min(first + chunk, vectors) - first))
