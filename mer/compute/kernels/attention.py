"""RoPE with the write into the KV cache, and causal attention over it with an online softmax.

KV memory is a set of blocks of `KV_TILE` positions. A block holds, for each layer, K and then V as float32
[kv heads, KV_TILE, padded head dim]. A sequence's table lists its blocks in order of position, so a tile is always the
same 64 absolute positions and a result does not depend on chunk edges or on the batch.
"""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.ir import atomic_add, copy_bytes, load_f32, load_i32, load_i64, store_f32
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import ARG0, COUNTER, step
from mer.compute.kernels.vector import dot, exp_sum, rotate, scale_product, weighted_rows

KV_TILE = 64  # positions in a KV block


@njit
def _kv_address(kv, block_bytes, table, max_blocks, sequence, position, head_bytes, head):  # type: ignore[no-untyped-def]
    """Address of the K vector of one position and head; `kv` is the layer's K area in block 0."""
    block = load_i32(table, sequence * max_blocks + position // 64)
    return kv + block * block_bytes + head * head_bytes + (position % 64) * (head_bytes // 64)


@njit
def _place_head(out, source, c, norm, eps, rope_dim, pair, cos, sin):  # type: ignore[no-untyped-def]
    """Copy one head of c floats, normalized if `norm` is not 0, and rotate its first rope_dim elements.

    pair is 1 for pairs (2i, 2i + 1), or rope_dim / 2 for pairs (i, i + rope_dim / 2).
    """
    if norm == 0:
        copy_bytes(out, source, 4 * c)
    else:
        square = np.float32(0)
        for i in range(c):
            square += load_f32(source, i) * load_f32(source, i)
        scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(c) + eps))
        whole = c // 16 * 16
        scale_product(out, source, norm, scale, whole)
        for i in range(whole, c):
            store_f32(out, i, load_f32(source, i) * scale * load_f32(norm, i))
    turned = rope_dim // 2 // 16 * 16
    rotate(out, pair, cos, sin, turned)
    for i in range(turned, rope_dim // 2):
        first = 2 * i if pair == 1 else i
        x, y = load_f32(out, first), load_f32(out, first + pair)
        store_f32(out, first, x * load_f32(cos, i) - y * load_f32(sin, i))
        store_f32(out, first + pair, x * load_f32(sin, i) + y * load_f32(cos, i))


@step
def rope_store(row: int, thread: int, n_threads: int) -> None:
    """Normalize (where the model does) and rotate Q and K, pad Q's heads, and write K and V into the KV cache.

    Arguments: q_raw, k_raw, v_raw, q_raw_stride_bytes, kv_raw_stride_bytes, q (float32 [T, H, padded C]), n (T), heads
    (H << 32 | G), c, rope (rope_dim << 32 | pair), angles (float32 [T, 2, rope_dim / 2]: cosines, sines), q_norm (or
    0), k_norm (or 0), eps (address), kv, block_bytes, positions (int32 [T]), sequences (int32 [T]), table (int32),
    max_blocks.
    """
    q_raw, k_raw, v_raw = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    q_stride, kv_stride, q = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5)
    n, heads, c = load_i64(row, ARG0 + 6), load_i64(row, ARG0 + 7), load_i64(row, ARG0 + 8)
    rope, angles = load_i64(row, ARG0 + 9), load_i64(row, ARG0 + 10)
    q_norm, k_norm, eps = load_i64(row, ARG0 + 11), load_i64(row, ARG0 + 12), load_f32(load_i64(row, ARG0 + 13), 0)
    kv, block_bytes = load_i64(row, ARG0 + 14), load_i64(row, ARG0 + 15)
    positions, sequences = load_i64(row, ARG0 + 16), load_i64(row, ARG0 + 17)
    table, max_blocks = load_i64(row, ARG0 + 18), load_i64(row, ARG0 + 19)
    h, g = heads >> 32, heads & 0xFFFFFFFF
    rope_dim, pair = rope >> 32, rope & 0xFFFFFFFF
    padded = (c + 15) // 16 * 16
    head_bytes = 4 * 64 * padded
    items = n * (h + 2 * g)
    for item in range(items * thread // n_threads, items * (thread + 1) // n_threads):
        t, head = item // (h + 2 * g), item % (h + 2 * g)
        cos = angles + 4 * rope_dim * t
        sin = cos + 2 * rope_dim
        if head < h:
            source = q_raw + t * q_stride + 4 * c * head
            _place_head(q + 4 * padded * (t * h + head), source, c, q_norm, eps, rope_dim, pair, cos, sin)
            continue
        head -= h
        is_value = head >= g
        head = head - g if is_value else head
        target = _kv_address(
            kv, block_bytes, table, max_blocks, load_i32(sequences, t), load_i32(positions, t), head_bytes, head
        )
        if is_value:
            _place_head(target + g * head_bytes, v_raw + t * kv_stride + 4 * c * head, c, 0, eps, 0, 1, cos, sin)
        else:
            _place_head(target, k_raw + t * kv_stride + 4 * c * head, c, k_norm, eps, rope_dim, pair, cos, sin)


@step
def attention(row: int, thread: int, _n_threads: int) -> None:
    """Causal attention of T query rows over their sequences' KV blocks; (token, head) pairs are claimed one by one.

    Arguments: q (float32 [T, H, padded C]), n (T), heads (H << 32 | G), c, scale (address), kv, block_bytes, positions,
    sequences, table, max_blocks, out (float32 [T, H * C]), out_stride_bytes, scratch, scratch_stride_bytes (64 scores
    and one padded head for each thread).
    """
    q, n, heads = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    c, scale = load_i64(row, ARG0 + 3), load_f32(load_i64(row, ARG0 + 4), 0)
    kv, block_bytes = load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6)
    positions, sequences = load_i64(row, ARG0 + 7), load_i64(row, ARG0 + 8)
    table, max_blocks = load_i64(row, ARG0 + 9), load_i64(row, ARG0 + 10)
    out, out_stride = load_i64(row, ARG0 + 11), load_i64(row, ARG0 + 12)
    scores = load_i64(row, ARG0 + 13) + thread * load_i64(row, ARG0 + 14)
    acc = scores + 4 * 64
    h, g = heads >> 32, heads & 0xFFFFFFFF
    padded = (c + 15) // 16 * 16
    stride = 4 * padded
    head_bytes = 64 * stride
    while True:
        item = atomic_add(row + 8 * COUNTER, 1)
        if item >= n * h:
            return
        t, head = item // h, item % h
        query = q + stride * item
        sequence, last = load_i32(sequences, t), load_i32(positions, t)
        maximum, total = np.float32(-np.inf), np.float32(0)
        for i in range(padded):
            store_f32(acc, i, np.float32(0))
        for begin in range(0, last + 1, 64):
            keys = _kv_address(kv, block_bytes, table, max_blocks, sequence, begin, head_bytes, head // (h // g))
            count = min(64, last + 1 - begin)
            top = maximum
            for j in range(count):
                score = dot(query, keys + j * stride, padded) * scale
                store_f32(scores, j, score)
                if not score <= top:  # a NaN score becomes the maximum and makes the row NaN
                    top = score
            for j in range(count, (count + 15) // 16 * 16):
                store_f32(scores, j, np.float32(-np.inf))
            keep = np.float32(0) if begin == 0 else np.float32(math.exp(maximum - top))
            total = total * keep + exp_sum(scores, top, (count + 15) // 16 * 16)
            weighted_rows(acc, scores, keys + g * head_bytes, count, stride, padded, keep)
            maximum = top
        target = out + t * out_stride + 4 * c * head
        for i in range(c):
            store_f32(target, i, load_f32(acc, i) / total)
