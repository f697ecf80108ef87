"""RoPE with the norms before it, and the write of K and V into the KV cache.

KV memory is a set of blocks of `KV_TILE` positions. A block holds, for each layer, the K tiles of all kv heads and then
their V tiles (`kv_layout.py`). A sequence's table lists its blocks in order of position, so a tile is always the same
64 absolute positions and a result does not depend on chunk edges or on the batch.
"""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.claim import chunk_of, claim_unit
from mer.compute.kernels.ir import copy_bytes, load_f32, load_i32, load_i64, store_f32
from mer.compute.kernels.kv_layout import F16_KIND, F32_KIND, Q8_0_KIND, size_of_tile
from mer.compute.kernels.kv_tile import store_half, store_i8
from mer.compute.kernels.numba_api import literally, njit
from mer.compute.kernels.step import step
from mer.compute.kernels.vector import amax, rotate, scale_product
from mer.compute.kernels.words import Words, columns

_MIN_VALUES = 512  # heads of fewer values take less time than claiming them


@njit
def _normalize(out, source, c, norm, eps):  # type: ignore[no-untyped-def]
    """Normalize one head of c floats; `out` may be `source`."""
    square = np.float32(0)
    for i in range(c):
        square += load_f32(source, i) * load_f32(source, i)
    scale = np.float32(1) / np.float32(math.sqrt(square / np.float32(c) + eps))
    whole = c // 16 * 16
    scale_product(out, source, norm, scale, whole)
    for i in range(whole, c):
        store_f32(out, i, load_f32(source, i) * scale * load_f32(norm, i))


@njit
def _place_head(out, source, c, norm, last, eps, rope_dim, pair, cos, sin):  # type: ignore[no-untyped-def]
    """Copy one head of c floats and rotate its first rope_dim elements.

    If `norm` is not 0 it is normalized, before it is rotated or, with `last`, after that. pair is 1 for pairs (2i, 2i +
    1), or rope_dim / 2 for pairs (i, i + rope_dim / 2). `out` may be `source`.
    """
    if norm == 0 or last != 0:
        copy_bytes(out, source, 4 * c)
    else:
        _normalize(out, source, c, norm, eps)
    turned = rope_dim // 2 // 16 * 16
    rotate(out, pair, cos, sin, turned)
    for i in range(turned, rope_dim // 2):
        first = 2 * i if pair == 1 else i
        x, y = load_f32(out, first), load_f32(out, first + pair)
        store_f32(out, first, x * load_f32(cos, i) - y * load_f32(sin, i))
        store_f32(out, first + pair, x * load_f32(sin, i) + y * load_f32(cos, i))
    if norm != 0 and last != 0:
        _normalize(out, out, c, norm, eps)


@njit
def _nearest(x):  # type: ignore[no-untyped-def]
    """Return the integer nearest to a number of magnitude below 128, ties away from zero; 0 for any other."""
    size = abs(x)
    if not size < np.float32(128):
        return 0
    whole = int(size)
    if size - np.float32(whole) >= np.float32(0.5):
        whole += 1
    return whole if x >= np.float32(0) else -whole


@njit
def _store_head(kind, tile, scales, source, c, start, block_step, pair_step, step):  # type: ignore[no-untyped-def]
    """Round one head of c floats into a tile.

    The first element has index `start`; the second of a pair lies `step` behind the first, the next pair `pair_step`,
    the next 32 elements `block_step`. `scales` is the address of the position's first scale of Q8_0.
    """
    literally(kind)
    for block in range((c + 31) // 32):
        inverse = np.float32(1)
        if kind == Q8_0_KIND:
            peak = amax(source + 128 * block, 32)
            scale = peak / np.float32(127)
            inverse = np.float32(1) / scale if scale > np.float32(0) else np.float32(0)
            store_half(scales, 64 * block, scale if scale < np.float32(np.inf) else np.float32(np.nan))
        for i in range(min(32, c - 32 * block)):
            at = start + block_step * block + i // 2 * pair_step + i % 2 * step
            x = load_f32(source, 32 * block + i)
            if kind == Q8_0_KIND:
                store_i8(tile, at, _nearest(x * inverse))
            elif kind == F16_KIND:
                store_half(tile, at, x)
            else:
                store_f32(tile, at, x)


class RopeStoreWords(Words):
    """Words of a row of `rope_store`.

    q_raw, k_raw (is changed), v_raw, q_raw_stride, kv_raw_stride (bytes), q (float32 [T, H, C padded to 16]), n (T),
    heads (H << 32 | G), c, rope (rope_dim << 32 | pair), angles (float32 [T, 2, rope_dim / 2]: cosines, sines), q_norm
    (or 0), k_norm (or 0), eps (address), kv (the layer's tiles in block 0), block_bytes, positions (int32 [T]),
    sequences (int32 [T]), table (int32), max_blocks, norms_last (1: the norms come after RoPE).
    """

    q_raw: int
    k_raw: int
    v_raw: int
    q_raw_stride: int
    kv_raw_stride: int
    q: int
    n: int
    heads: int
    c: int
    rope: int
    angles: int
    q_norm: int
    k_norm: int
    eps: int
    kv: int
    block_bytes: int
    positions: int
    sequences: int
    table: int
    max_blocks: int
    norms_last: int


ROPE = columns(RopeStoreWords)


@njit
def _rope_store(row, n_threads, kind):  # type: ignore[no-untyped-def]
    """Normalize (where the model does) and rotate Q and K, Q into padded heads, and write K and V to the KV cache.

    Runs of (row, head) pairs are claimed.
    """
    literally(kind)
    q_raw, k_raw, v_raw = load_i64(row, ROPE.q_raw), load_i64(row, ROPE.k_raw), load_i64(row, ROPE.v_raw)
    q_stride, kv_stride, q = load_i64(row, ROPE.q_raw_stride), load_i64(row, ROPE.kv_raw_stride), load_i64(row, ROPE.q)
    n, heads, c = load_i64(row, ROPE.n), load_i64(row, ROPE.heads), load_i64(row, ROPE.c)
    rope, angles = load_i64(row, ROPE.rope), load_i64(row, ROPE.angles)
    q_norm, k_norm, eps = load_i64(row, ROPE.q_norm), load_i64(row, ROPE.k_norm), load_f32(load_i64(row, ROPE.eps), 0)
    kv, block_bytes = load_i64(row, ROPE.kv), load_i64(row, ROPE.block_bytes)
    positions, sequences = load_i64(row, ROPE.positions), load_i64(row, ROPE.sequences)
    table, max_blocks, last = load_i64(row, ROPE.table), load_i64(row, ROPE.max_blocks), load_i64(row, ROPE.norms_last)
    h, g = heads >> 32, heads & 0xFFFFFFFF
    rope_dim, pair = rope >> 32, rope & 0xFFFFFFFF
    q_head, padded = (c + 15) // 16 * 64, (c + 31) // 32 * 32
    tile_size = size_of_tile(kind, padded)
    # Rotated and stored by one step: by two, each head would leave the cache in between, behind one more barrier.
    items = n * (h + 2 * g)
    chunk = chunk_of(items, n_threads, max(1, _MIN_VALUES // c))
    while True:
        begin = claim_unit(row) * chunk
        if begin >= items:
            return
        for item in range(begin, min(begin + chunk, items)):
            t, head = item // (h + 2 * g), item % (h + 2 * g)
            cos = angles + 4 * rope_dim * t
            sin = cos + 2 * rope_dim
            if head < h:
                source = q_raw + t * q_stride + 4 * c * head
                _place_head(q + q_head * (t * h + head), source, c, q_norm, last, eps, rope_dim, pair, cos, sin)
                continue
            tile = head - h  # K tiles, then V tiles
            position = load_i32(positions, t)
            block = load_i32(table, load_i32(sequences, t) * max_blocks + position // 64)
            target = kv + block * block_bytes + tile * tile_size
            slot = position % 64
            scales = target + 64 * padded + 2 * slot
            if tile < g:
                source = k_raw + t * kv_stride + 4 * c * tile
                _place_head(source, source, c, k_norm, last, eps, rope_dim, pair, cos, sin)
                side = slot // 32 * 32 * c
                if kind == Q8_0_KIND:
                    _store_head(kind, target, scales, source, c, side + slot % 32 * 2, 1024, 64, 1)
                else:
                    _store_head(kind, target, scales, source, c, side + slot % 32, 1024, 64, 32)
            else:
                source = v_raw + t * kv_stride + 4 * c * (tile - g)
                if kind == Q8_0_KIND:
                    _store_head(kind, target, scales, source, c, slot // 2 * 64 + slot % 2, 2048, 4, 2)
                else:
                    _store_head(kind, target, scales, source, c, 32 * slot, 2048, 2, 1)


@step(RopeStoreWords)
def rope_store_f32(row: int, _thread: int, n_threads: int) -> None:
    """RoPE and the write into a KV cache of F32."""
    _rope_store(row, n_threads, F32_KIND)


@step(RopeStoreWords)
def rope_store_f16(row: int, _thread: int, n_threads: int) -> None:
    """RoPE and the write into a KV cache of F16."""
    _rope_store(row, n_threads, F16_KIND)


@step(RopeStoreWords)
def rope_store_q8_0(row: int, _thread: int, n_threads: int) -> None:
    """RoPE and the write into a KV cache of Q8_0."""
    _rope_store(row, n_threads, Q8_0_KIND)


ROPE_STORE = {F32_KIND: rope_store_f32, F16_KIND: rope_store_f16, Q8_0_KIND: rope_store_q8_0}
