"""Causal attention over the KV cache with an online softmax, in passes over the tiles of one kv head (`kv_tile.py`).

The arithmetic of a (token, head) is the same whatever is computed beside it. Its query is multiplied by the scale.
Positions are taken in spans of 8 tiles, aligned to absolute position: within a span tiles come in order, each rescaling
what came before (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"); the results of the spans
are merged in order (as in flash decoding: Dao et al. 2023). Tiles that lie whole outside a token's window are skipped.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.ir import atomic_add, load_f32, load_i32, load_i64, store_f32, store_i32, zero_bytes
from mer.compute.kernels.kv_integers import pack_query
from mer.compute.kernels.kv_layout import BLOCK, F16_KIND, F32_KIND, KV_TILE, Q8_0_KIND, size_of_tile
from mer.compute.kernels.kv_tile import PASS_BYTES, merge_row, tile_pass
from mer.compute.kernels.numba_api import literally, njit
from mer.compute.kernels.step import step
from mer.compute.kernels.words import Words, columns

SPAN: Final = 8 * KV_TILE  # positions whose results are merged as one
ROWS: Final = 64  # (token, head) pairs that one pass over the tiles serves, or the heads of a group if they are more
_OCTET: Final = 8


def _padded(head_dim: int) -> int:
    return -(-head_dim // BLOCK) * BLOCK


def state_bytes(rows: int, head_dim: int) -> int:
    """Return the bytes of the unfinished results of so many rows: float32 [rows, P], maxima, and totals."""
    return 4 * (-(-rows // 16) * 16) * (_padded(head_dim) + 2)


def thread_bytes(n_heads: int, n_kv_heads: int, head_dim: int) -> int:
    """Return the scratch that each thread needs: that of a pass over a tile, two states, queries."""
    rows = max(ROWS, n_heads // n_kv_heads)
    queries = 4 * (-(-rows // _OCTET) * _OCTET) * _padded(head_dim)
    return queries + 2 * state_bytes(rows, head_dim) + PASS_BYTES


def split_tokens(n_threads: int, n_kv_heads: int, batch_tokens: int) -> int:
    """Return the rows of a batch up to which spans are given out one by one, as there are few kv heads for a thread."""
    return min(batch_tokens, (4 * n_threads - 1) // n_kv_heads)


def split_bytes(n_tokens: int, n_heads: int, n_kv_heads: int, head_dim: int, max_blocks: int) -> int:
    """Return the bytes of counters and states for spans that are given out one by one."""
    items = n_tokens * n_kv_heads
    spans = -(-max_blocks * KV_TILE // SPAN)
    return -(-4 * items // 64) * 64 + items * spans * state_bytes(n_heads // n_kv_heads, head_dim)


@njit
def _clear(state, n_rows, padded):  # type: ignore[no-untyped-def]
    """Make a state that of no positions."""
    zero_bytes(state, 4 * n_rows * (padded + 2))
    for i in range(n_rows):
        store_f32(state + 4 * n_rows * padded, i, np.float32(-np.inf))


@njit
def _first_seen(position, window):  # type: ignore[no-untyped-def]
    """Return the first position that a token attends to."""
    return max(0, position + 1 - window) if window > 0 else 0


@njit
def _span(  # type: ignore[no-untyped-def]
    kind, span, kv, block_bytes, blocks, c, padded, values_at, q, state, n_rows, group, position, n, window, scores
):
    """Compute the state of one span for n tokens from `position` on, a group of heads each."""
    literally(kind)
    _clear(state, n_rows, padded)
    maxima = state + 4 * n_rows * padded
    totals = maxima + 4 * n_rows
    newest = position + n - 1
    begin = max(512 * span, _first_seen(position, window) // 64 * 64)
    end = min(512 * (span + 1), newest + 1)
    for start in range(begin, end, 64):
        tile = kv + load_i32(blocks, start // 64) * block_bytes
        ahead = tile if start + 64 > newest else kv + load_i32(blocks, start // 64 + 1) * block_bytes
        # all rows together, or token by token where not all see the whole tile
        step = n if start + 63 <= position and start >= _first_seen(newest, window) else 1
        for t in range(0, n, step):
            first = max(0, _first_seen(position + t + step - 1, window) - start)
            last = min(64, position + t + 1 - start)
            r, stop = t * group, (t + step) * group
            while first < last and r < stop:
                rows = min(r & -r, 8) if r > 0 else 8  # 8, 4, 2 or 1, never across a multiple of it
                while r + rows > stop:
                    rows //= 2
                tile_pass(
                    kind, rows, tile, tile + values_at, ahead, c, padded, q + 4 * (r // 8 * 8 * c + r % 8), scores,
                    state + 4 * r * padded, maxima + 4 * r, totals + 4 * r, first, last,
                )  # fmt: skip
                r += rows


@njit
def _merge(total, state, n_rows, padded, r, end):  # type: ignore[no-untyped-def]
    """Merge rows of the state of a span into those of all earlier ones."""
    for i in range(r, end):
        at = 4 * (n_rows * padded + i)
        merge_row(
            total + 4 * i * padded, total + at, total + at + 4 * n_rows,
            state + 4 * i * padded, state + at, state + at + 4 * n_rows, padded,
        )  # fmt: skip


@njit
def _finish(state, n_rows, padded, c, group, n, out, out_stride, sinks):  # type: ignore[no-untyped-def]
    """Write the results of n tokens: out is their first row, at the group's first head; sinks are its heads', or 0.

    A sink joins the total of all positions here, and no span's, so that it counts once however these are divided.
    """
    for r in range(n * group):
        target = out + r // group * out_stride + 4 * c * (r % group)
        total = load_f32(state, n_rows * padded + n_rows + r)
        if sinks != 0:
            above = np.float64(load_f32(sinks, r % group)) - np.float64(load_f32(state, n_rows * padded + r))
            total += np.float32(math.exp(above))  # infinite where nothing is left for the positions
        for i in range(c):
            store_f32(target, i, load_f32(state, r * padded + i) / total)


@njit
def _pack_queries(kind, q, source, q_head, h, c, group, n, scale):  # type: ignore[no-untyped-def]
    """Lay the scaled queries of n tokens' groups as a pass wants 8 rows; source is the first token's first head."""
    literally(kind)
    for r in range(n * group):
        query = source + q_head * (r // group * h + r % group)
        row = q + 4 * (r // 8 * 8 * c + r % 8)
        if kind == Q8_0_KIND:
            pack_query(row, query, c, scale)
        else:
            for i in range(c):
                store_f32(row, 8 * i, load_f32(query, i) * scale)


class AttentionWords(Words):
    """Words of a row of `attention`.

    q (float32 [T, H, C padded to 16]), n (T), heads (H << 32 | G), c, scale (address), kv (the layer's tiles in block
    0), block_bytes, positions, sequences (int32 [T]), table (int32), max_blocks, out (float32 [T, H * C]), out_stride
    (bytes), scratch, scratch_stride (`thread_bytes`), window (positions that a token attends to, its own included, or
    0), split (`split_tokens`), counters (`split_bytes`; the first 4 split G are counters and zero), sinks (float32 [H],
    or 0).
    """

    q: int
    n: int
    heads: int
    c: int
    scale: int
    kv: int
    block_bytes: int
    positions: int
    sequences: int
    table: int
    max_blocks: int
    out: int
    out_stride: int
    scratch: int
    scratch_stride: int
    window: int
    split: int
    counters: int
    sinks: int


ATTEND = columns(AttentionWords)


@njit
def _attention(row, thread, n_threads, kind):  # type: ignore[no-untyped-def]
    """Attention of T query rows over their sequences' KV blocks; claimed are kv heads of a few tokens, or of a span."""
    literally(kind)
    q0, n, heads = load_i64(row, ATTEND.q), load_i64(row, ATTEND.n), load_i64(row, ATTEND.heads)
    c, scale = load_i64(row, ATTEND.c), load_f32(load_i64(row, ATTEND.scale), 0)
    kv0, block_bytes = load_i64(row, ATTEND.kv), load_i64(row, ATTEND.block_bytes)
    positions, sequences = load_i64(row, ATTEND.positions), load_i64(row, ATTEND.sequences)
    table, max_blocks = load_i64(row, ATTEND.table), load_i64(row, ATTEND.max_blocks)
    out0, out_stride = load_i64(row, ATTEND.out), load_i64(row, ATTEND.out_stride)
    scratch = load_i64(row, ATTEND.scratch) + thread * load_i64(row, ATTEND.scratch_stride)
    window, split, counters = load_i64(row, ATTEND.window), load_i64(row, ATTEND.split), load_i64(row, ATTEND.counters)
    sinks = load_i64(row, ATTEND.sinks)
    h, g = heads >> 32, heads & 0xFFFFFFFF
    group = h // g  # heads that go through a tile together: one by one, each would read it again
    q_head, padded = (c + 15) // 16 * 64, (c + 31) // 32 * 32
    tile_size = size_of_tile(kind, padded)
    values_at = g * tile_size
    most = max(64, group)
    n_rows = (most + 15) // 16 * 16
    state_size = 4 * n_rows * (padded + 2)
    scores, total = scratch, scratch + PASS_BYTES
    own_state, q = total + state_size, total + 2 * state_size
    alone = n <= split
    step_tokens = 1 if alone else max(1, 64 // group)
    while step_tokens > 1 and (n + step_tokens - 1) // step_tokens * g < 4 * n_threads:
        step_tokens //= 2
    pieces = (n + step_tokens - 1) // step_tokens * g
    # of few rows a few spans are given out at a time, and whoever finishes a row's last one merges all of them
    spans = (max_blocks * 64 + 511) // 512
    per_part = max(1, spans * pieces // (8 * n_threads))
    n_parts = (spans + per_part - 1) // per_part if alone else 1
    part_size = 4 * ((group + 15) // 16 * 16) * (padded + 2)
    parts = counters + (4 * split * g + 63) // 64 * 64
    while True:
        item = claim_unit(row)
        if item >= pieces * n_parts:
            return
        piece, part = item // n_parts, item % n_parts
        head = piece % g
        stop = n - piece // g * step_tokens  # the last rows of a prompt have most to do
        t = max(0, stop - step_tokens)
        while t < stop:
            position, sequence = load_i32(positions, t), load_i32(sequences, t)
            run = 1
            while t + run < stop and load_i32(sequences, t + run) == sequence:
                run += 1
            lowest, highest = _first_seen(position, window) // 512, (position + run - 1) // 512
            begin, end = lowest, highest + 1
            if alone:
                begin, end = max(lowest, part * per_part), min(highest + 1, (part + 1) * per_part)
                if begin >= end:
                    break
            mine = parts + part_size * spans * piece
            if alone:
                n_rows = (group + 15) // 16 * 16
            _pack_queries(kind, q, q0 + q_head * (t * h + head * group), q_head, h, c, group, run, scale)
            if not alone:
                _clear(total, n_rows, padded)
            for span in range(begin, end):
                state = mine + part_size * span if alone else own_state
                _span(
                    kind, span, kv0 + head * tile_size, block_bytes, table + 4 * sequence * max_blocks, c, padded,
                    values_at, q, state, n_rows, group, position, run, window, scores,
                )  # fmt: skip
                for i in range(0 if alone else run):
                    if _first_seen(position + i, window) < 512 * (span + 1) and 512 * span <= position + i:
                        _merge(total, state, n_rows, padded, i * group, (i + 1) * group)
            if alone:
                if atomic_add(counters + 4 * piece, end - begin) + end - begin <= highest - lowest:
                    break
                store_i32(counters, piece, np.int32(0))
                _clear(total, n_rows, padded)
                for span in range(lowest, highest + 1):
                    _merge(total, mine + part_size * span, n_rows, padded, 0, group)
            out = out0 + t * out_stride + 4 * c * head * group
            own_sinks = sinks + 4 * head * group if sinks != 0 else 0
            _finish(total, n_rows, padded, c, group, run, out, out_stride, own_sinks)
            t += run


@step(AttentionWords)
def attention_f32(row: int, thread: int, n_threads: int) -> None:
    """Attention over a KV cache of F32."""
    _attention(row, thread, n_threads, F32_KIND)


@step(AttentionWords)
def attention_f16(row: int, thread: int, n_threads: int) -> None:
    """Attention over a KV cache of F16."""
    _attention(row, thread, n_threads, F16_KIND)


@step(AttentionWords)
def attention_q8_0(row: int, thread: int, n_threads: int) -> None:
    """Attention over a KV cache of Q8_0."""
    _attention(row, thread, n_threads, Q8_0_KIND)


ATTENTION = {F32_KIND: attention_f32, F16_KIND: attention_f16, Q8_0_KIND: attention_q8_0}
