"""Grouped-query attention, RoPE, and what the KV cache makes of keys and values."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.blocks.router import softmax
from mer.compute.reference.products import F64
from mer.compute.reference.weights import Weights
from mer.config import KVType
from mer.model.operators import Attention, HeadNorms, Rope, RopeStyle


def attend(record: Attention, weights: Weights, x: F64, kv_type: KVType) -> F64:
    """Return what attention gives for the normalized x [T, D] of a whole sequence."""

    def normalized(q: F64, k: F64) -> tuple[F64, F64]:
        pairs = (q, record.q_norm), (k, record.k_norm)
        q, k = (a if it is None else rms_norm(a, weights.vector(it.weight.name), it.eps) for a, it in pairs)
        return q, k

    q, k, v = (weights.linear(linear, x) for linear in (record.q, record.k, record.v))
    if record.norms is HeadNorms.WHOLE:
        q, k = normalized(q, k)
    q, k, v = (a.reshape(len(x), -1, record.head_dim) for a in (q, k, v))
    if record.norms is HeadNorms.BEFORE:
        q, k = normalized(q, k)
    if record.v_eps is not None:
        v = rms_norm(v, 1.0, record.v_eps)
    turns = pair_turns(record.rope, None if record.rope.factors is None else weights.vector(record.rope.factors.name))
    magnitude = 1.0 if record.rope.yarn is None else record.rope.yarn.magnitude
    q, k = (rotated(a, np.arange(len(x)), turns, record.rope.style, magnitude) for a in (q, k))
    if record.norms is HeadNorms.AFTER:
        q, k = normalized(q, k)
    k, v = (round_kv(a, kv_type) for a in (k, v))
    sinks = None if record.sinks is None else weights.vector(record.sinks.name)
    out = attention(q, k, v, record.window, scale=record.scale, sinks=sinks)
    if record.gate is not None:
        gates = np.logaddexp(0, weights.linear(record.gate, x))
        out = out * gates.reshape(len(x), record.n_heads, -1)
    return weights.linear(record.out, out.reshape(len(x), -1))


def pair_turns(rope: Rope, factors: npt.ArrayLike | None = None) -> F64:
    """Return by how many radians each pair turns from one position to the next, [dim / 2]: pair by pair, by hand."""
    turns = [rope.scale * rope.base ** (-2.0 * pair / rope.dim) for pair in range(rope.dim // 2)]
    if factors is not None:
        turns = [turn / factor for turn, factor in zip(turns, np.asarray(factors, np.float64), strict=True)]
    yarn = rope.yarn
    if yarn is None:
        return np.array(turns)
    limits = [
        rope.dim * np.log(yarn.original / (beta * 2 * np.pi)) / (2 * np.log(rope.base))
        for beta in (yarn.beta_fast, yarn.beta_slow)
    ]
    low, high = (np.floor(limits[0]), np.ceil(limits[1])) if yarn.whole_pairs else limits
    low, high = max(low, 0), min(high, rope.dim - 1)
    out = []
    for pair, turn in enumerate(turns):
        slowed = min(max((pair - low) / max(0.001, high - low), 0), 1)  # share of the slowed turn
        out.append(turn * (1 - slowed) + turn / yarn.factor * slowed)
    return np.array(out)


def rotated(x: F64, positions: npt.ArrayLike, turns: F64, style: RopeStyle, magnitude: float = 1.0) -> F64:
    """Return heads x [T, H, C] with their first elements, two for each of `turns`, rotated by their position."""
    dim = 2 * len(turns)
    angles = np.asarray(positions, np.float64)[:, None] * turns
    turning = magnitude * np.exp(1j * angles)[:, None, :]  # [T, 1, dim / 2]
    first = np.arange(dim // 2)
    if style is RopeStyle.INTERLEAVED:
        left, right = 2 * first, 2 * first + 1
    else:
        left, right = first, first + dim // 2
    turned = (x[..., left] + 1j * x[..., right]) * turning
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


def attention(
    q: F64,
    k: F64,
    v: F64,
    window: int | None = None,
    *,
    scale: float | None = None,
    sinks: npt.ArrayLike | None = None,
) -> F64:
    """Return causal grouped-query attention [T, H, C] of the last T of S positions.

    Queries q [T, H, C] meet keys and values k, v [S, G, C]. Query head h attends
    with kv head h // (H / G); scores are multiplied by `scale`, by default 1 / sqrt(C). With a window, each attends
    to that many positions, its own included. With `sinks` [H], a key without a value has these scores.
    """
    n_tokens, n_heads, head_dim = q.shape
    n_positions, n_kv_heads, _ = k.shape
    keys = np.repeat(k, n_heads // n_kv_heads, axis=1)
    values = np.repeat(v, n_heads // n_kv_heads, axis=1)
    scores = np.einsum("thc,shc->hts", q, keys) * (head_dim**-0.5 if scale is None else scale)
    positions = np.arange(n_positions)
    ahead = positions[None, :] - positions[n_positions - n_tokens :, None]  # [T, S]
    unseen = (ahead > 0) | (ahead <= -(window or n_positions))
    scores = np.where(unseen, -np.inf, scores)
    if sinks is not None:
        column = np.broadcast_to(np.asarray(sinks, np.float64)[:, None, None], (n_heads, n_tokens, 1))
        scores = np.concatenate([scores, column], -1)
    out: F64 = np.einsum("hts,shc->thc", softmax(scores)[..., :n_positions], values)
    return out
