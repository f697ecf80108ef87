"""Grouped-query attention, RoPE, and what the KV cache makes of keys and values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.blocks.router import softmax
from mer.compute.reference.products import F64
from mer.compute.reference.weights import Weights
from mer.config import KVType
from mer.model.operators import Attention, RopeStyle


def attend(record: Attention, weights: Weights, x: F64, kv_type: KVType) -> F64:
    """Return what attention gives for the normalized x [T, D] of a whole sequence."""
    q = weights.linear(record.q, x).reshape(len(x), record.n_heads, record.head_dim)
    k = weights.linear(record.k, x).reshape(len(x), record.n_kv_heads, record.head_dim)
    v = weights.linear(record.v, x).reshape(len(x), record.n_kv_heads, record.head_dim)
    if record.q_norm is not None:
        q = rms_norm(q, weights.vector(record.q_norm.weight.name), record.q_norm.eps)
    if record.k_norm is not None:
        k = rms_norm(k, weights.vector(record.k_norm.weight.name), record.k_norm.eps)
    positions, turn = np.arange(len(x)), record.rope
    q, k = (rope(a, positions, dim=turn.dim, base=turn.base, scale=turn.scale, style=turn.style) for a in (q, k))
    k, v = (round_kv(a, kv_type) for a in (k, v))
    return weights.linear(record.out, attention(q, k, v, record.window).reshape(len(x), -1))


def rope(x: F64, positions: npt.ArrayLike, *, dim: int, base: float, scale: float, style: RopeStyle) -> F64:
    """Return heads x [T, H, C] with their first `dim` elements rotated by their position (Su et al. 2021).

    Pair i of dim / 2 turns by position * scale * base ** (-2 i / dim).
    """
    angles = np.asarray(positions, np.float64)[:, None] * scale * base ** (-2.0 * np.arange(dim // 2) / dim)
    turns = np.exp(1j * angles)[:, None, :]  # [T, 1, dim / 2]
    first = np.arange(dim // 2)
    if style is RopeStyle.INTERLEAVED:
        left, right = 2 * first, 2 * first + 1
    else:
        left, right = first, first + dim // 2
    turned = (x[..., left] + 1j * x[..., right]) * turns
    out = x.copy()
    out[..., left], out[..., right] = turned.real, turned.imag
    return out


def round_kv(x: F64, kv_type: KVType) -> F64:
    """Return keys or values x [..., C] as the KV cache keeps them.

    f32 and f16 round to nearest even. q8_0 rounds blocks of 32 as ggml's reference does: in float32
    scale = max|x| / 127 and q = x * (1 / scale), to the nearest integer with ties away from zero; then
    the scale becomes a half float.
    """
    values = np.asarray(x, np.float32)
    if kv_type == "f32":
        return values.astype(np.float64)
    if kv_type == "f16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float64)
    blocks = values.reshape(*values.shape[:-1], -1, 32)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    scaled = blocks * inverse
    q = np.copysign(np.floor(np.abs(scaled.astype(np.float64)) + 0.5), scaled)  # exact: float64 holds the sum
    out: F64 = (q * scales.astype(np.float16)).reshape(values.shape)
    return out


def attention(q: F64, k: F64, v: F64, window: int | None = None) -> F64:
    """Return causal grouped-query attention [T, H, C] of the last T of S positions.

    Queries q [T, H, C] meet keys and values k, v [S, G, C]. Query head h attends
    with kv head h // (H / G); scores are divided by sqrt(C). With a window, each attends
    to that many positions, its own included.
    """
    n_tokens, n_heads, head_dim = q.shape
    n_positions, n_kv_heads, _ = k.shape
    keys = np.repeat(k, n_heads // n_kv_heads, axis=1)
    values = np.repeat(v, n_heads // n_kv_heads, axis=1)
    scores = np.einsum("thc,shc->hts", q, keys) / np.sqrt(head_dim)
    positions = np.arange(n_positions)
    ahead = positions[None, :] - positions[n_positions - n_tokens :, None]  # [T, S]
    unseen = (ahead > 0) | (ahead <= -(window or n_positions))
    out: F64 = np.einsum("hts,shc->thc", softmax(np.where(unseen, -np.inf, scores)), values)
    return out
