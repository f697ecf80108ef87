"""Grouped-query attention, by torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from mer.compute.cuda.blocks.tools import Tools
from mer.compute.cuda.inputs import Inputs
from mer.compute.cuda.kv import LayerCache
from mer.model.operators import Attention, HeadNorms, Norm, Rope, RopeStyle

Tensor = torch.Tensor


class AttentionBlock:
    """attention(norm(x)), with keys and values stored on the way.

    Args:
        record: the attention.
        norm: before it.
        tools: weights and products.
        cache: of this layer.
        rope: number of the record's RoPE among those of the model.
    """

    def __init__(self, record: Attention, norm: Norm, tools: Tools, cache: LayerCache, rope: int) -> None:
        self._record, self._norm, self._tools, self._cache, self._rope = record, norm, tools, cache, rope

    def __call__(self, x: Tensor, inputs: Inputs, masks: Sequence[Tensor]) -> Tensor:
        """Return y for x [T, D]; `masks` has one for each group of the batch, for this layer's window."""
        record, tools = self._record, self._tools
        h = tools.norm(self._norm, x)
        shape = (len(x), -1, record.head_dim)
        q, k, v = (tools.linear(linear, h) for linear in (record.q, record.k, record.v))
        if record.norms is HeadNorms.WHOLE:
            q, k = self._normalized(q, k)
        q, k, v = (heads.view(shape) for heads in (q, k, v))
        if record.norms is HeadNorms.BEFORE:
            q, k = self._normalized(q, k)
        if record.v_eps is not None:
            v = functional.rms_norm(v, (record.head_dim,), None, record.v_eps)
        q, k = (rotated(record.rope, heads, inputs.angles[self._rope]) for heads in (q, k))
        if record.norms is HeadNorms.AFTER:
            q, k = self._normalized(q, k)
        self._cache.store(inputs, k, v)
        sinks = None if record.sinks is None else tools.weights.vector(record.sinks.name)
        out = attend(record, self._cache, inputs, q, masks, sinks)
        if record.gate is not None:
            gates = functional.softplus(tools.linear(record.gate, h))
            out = (out.unflatten(1, (gates.shape[1], -1)) * gates[:, :, None]).flatten(1)
        return tools.linear(record.out, out)

    def _normalized(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (q, self._record.q_norm), (k, self._record.k_norm)
        q, k = (heads if norm is None else self._tools.norm(norm, heads) for heads, norm in pairs)
        return q, k


def attend(
    record: Attention, cache: LayerCache, inputs: Inputs, q: Tensor, masks: Sequence[Tensor], sinks: Tensor | None
) -> Tensor:
    """Return causal grouped-query attention [T, H * C] of q [T, H, C] over the cache, with sinks [H] or without.

    Query heads that share a kv head are rows of one product: their number and the rows' order are no matter to it.
    """
    kv_heads = record.n_kv_heads
    share = record.n_heads // kv_heads
    out = torch.empty_like(q)
    for group, mask in zip(inputs.groups, masks, strict=True):
        rows, n = mask.shape[:2]
        grouped = q[group.rows].view(rows, n, kv_heads, share, record.head_dim)
        query = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, G, share * n, C]
        k, v = (cache.gathered(number, group.table) for number in (0, 1))
        every = mask.repeat(1, share, 1)[:, None]  # [S, 1, share * n, positions]
        if sinks is not None:
            k, v, every = with_sinks(sinks.view(kv_heads, share).repeat_interleave(n, 1), k, v, every)
        attended = functional.scaled_dot_product_attention(query, k, v, attn_mask=every, scale=record.scale)
        back = attended.unflatten(2, (share, n)).permute(0, 3, 1, 2, 4)  # [S, n, G, share, C]
        out[group.rows] = back.reshape(rows * n, record.n_heads, record.head_dim)
    return out.flatten(1)


def with_sinks(sinks: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values with one more position, both zero, and a mask that gives it the score of each row's sink.

    The product has no sinks of its own. What it adds to the scores is the mask: minus infinity where nothing is seen.

    Args:
        sinks: of each row, [G, rows].
        k: keys [S, G, positions, C].
        v: values of the same shape.
        mask: what a row sees, bool [S, 1, rows, positions].
    """
    k, v = (functional.pad(part, (0, 0, 0, 1)) for part in (k, v))
    seen = torch.zeros_like(mask, dtype=k.dtype).masked_fill(~mask, -torch.inf)
    seen = seen.expand(-1, len(sinks), -1, -1)
    last = sinks.to(k.dtype)[None, :, :, None].expand(len(seen), -1, -1, -1)
    return k, v, torch.cat([seen, last], -1)


def rotated(rope: Rope, x: Tensor, angles: Tensor) -> Tensor:
    """Return heads x [T, H, C] with their first elements rotated (Su et al. 2021)."""
    dim = rope.dim
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = angles[:, :, None]  # [T, 1, dim / 2]
    if rope.style is RopeStyle.INTERLEAVED:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., : dim // 2], turned[..., dim // 2 :]
        pairs = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([pairs, rest], -1)
