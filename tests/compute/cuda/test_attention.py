"""Sinks in torch's attention, against the reference."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from mer.compute.cuda.blocks.attention import with_sinks
from mer.compute.reference.blocks.attention import attention


def test_sinks_are_one_more_position_for_each_head() -> None:
    rng = np.random.default_rng(1)
    n, heads, kv_heads, c = 7, 6, 2, 12
    share = heads // kv_heads
    q = rng.normal(size=(n, heads, c)).astype(np.float32)
    k, v = rng.normal(size=(2, n, kv_heads, c)).astype(np.float32)
    sinks = (2 * rng.normal(size=heads)).astype(np.float32)
    query = torch.from_numpy(q).view(1, n, kv_heads, share, c).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys, values = (torch.from_numpy(part).permute(1, 0, 2)[None] for part in (k, v))
    mask = torch.tril(torch.ones(n, n, dtype=torch.bool)).repeat(share, 1)[None, None]
    of_rows = torch.from_numpy(sinks).view(kv_heads, share).repeat_interleave(n, 1)
    keys, values, added = with_sinks(of_rows, keys, values, mask)
    got = functional.scaled_dot_product_attention(query, keys, values, attn_mask=added)
    got = got.unflatten(2, (share, n)).permute(0, 3, 1, 2, 4).reshape(n, heads, c)
    want = attention(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), sinks=sinks)
    assert np.allclose(got.numpy(), want, atol=1e-5)
