"""RoPE, the KV cache on the device, and attention by torch's scaled_dot_product_attention."""

from __future__ import annotations

import attrs
import numpy as np
import torch
from torch.nn import functional

from mer.compute.cuda.device import Device
from mer.compute.cuda.sizes import kv_block_bytes
from mer.compute.kernels.kv_layout import BLOCK, KV_TILE
from mer.compute.messages import Batch, Uint8Array
from mer.config import KVType
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec

Tensor = torch.Tensor


@attrs.frozen(eq=False)
class Group:
    """Rows that attend together: one row of each of S sequences, or all rows of one sequence (S is 1)."""

    rows: Tensor | slice  # of the batch
    table: Tensor  # int64 [S, blocks]
    positions: Tensor  # int64 [S, rows of a sequence]

    def mask(self, window: int | None) -> Tensor:
        """Return [S, rows of a sequence, positions]: what each row may look at, within a window if there is one."""
        there = torch.arange(self.table.shape[1] * KV_TILE, device=self.table.device)
        own = self.positions[..., None]
        seen = there <= own
        return seen if window is None else seen & (there > own - window)


@attrs.frozen(eq=False)
class Inputs:
    """A batch on the device.

    Attributes:
        tokens: int64 [T].
        blocks, offsets: int64 [T], where each row's KV goes.
        angles: float32 [2, T, rope_dim / 2], cosines and sines.
        outputs: int64 [N].
        groups: who attends with whom.
    """

    tokens: Tensor
    blocks: Tensor
    offsets: Tensor
    angles: Tensor
    outputs: Tensor
    groups: tuple[Group, ...]


def blocks_needed(position: int) -> int:
    """Return the number of KV blocks that hold the positions up to this one."""
    return position // KV_TILE + 1


def padded_tables(batch: Batch, rows: list[int], width: int) -> np.ndarray:
    """Return the tables [len(rows), width] of the sequences of these rows, cut behind each row's own block.

    The rest names the sequence's first block: what lies there is finite if the sequence is, and masked anyway.
    """
    tables = np.empty((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        table = batch.tables[batch.sequences[row]]
        needed = blocks_needed(int(batch.positions[row]))
        tables[place] = table[0]
        tables[place, :needed] = table[:needed]
    return tables


class KVCache:
    """Keys and values of all layers in blocks of `KV_TILE` positions.

    For each block, layer, K or V, and KV head come the values [KV_TILE, C], in float32, half floats or int8, and for
    Q8_0, behind them, half-float scales [KV_TILE, C / 32]. They are rounded as the CPU worker does (`kv_layout.py`) and
    widened to float32, exactly, where they are attended to.

    Args:
        spec: the model.
        n_blocks: of the cache.
        kv_type: how values are kept.
        device: holds it.
    """

    def __init__(self, spec: ModelSpec, n_blocks: int, kv_type: KVType, device: Device) -> None:
        attention = spec.attention
        self._device = device
        kind = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.int8}[kv_type]
        n_bytes = KV_TILE * attention.head_dim * kind.itemsize
        tile_bytes = kv_block_bytes(spec, kv_type) // (spec.n_routed * 2 * attention.n_kv_heads)
        # uint8 [blocks, L, 2, G, bytes of a tile]
        self._bytes = device.zeros(n_blocks, spec.n_routed, 2, attention.n_kv_heads, tile_bytes, dtype=torch.uint8)
        positions = (KV_TILE, -1)
        self._values = self._bytes[..., :n_bytes].view(kind).unflatten(-1, positions)
        self._scales: Tensor | None = None
        if kv_type == "q8_0":
            self._scales = self._bytes[..., n_bytes:].view(torch.float16).unflatten(-1, positions)

    def begin_blocks(self, batch: Batch) -> None:
        """Zero the blocks that a batch begins: what is masked must be finite too, as 0 * NaN is NaN."""
        begun = np.flatnonzero(batch.positions % KV_TILE == 0)
        if len(begun):
            numbers = batch.tables[batch.sequences[begun], batch.positions[begun] // KV_TILE]
            self._bytes[self._device.to_device(numbers.astype(np.int64))] = 0

    def store(self, layer: int, inputs: Inputs, k: Tensor, v: Tensor) -> None:
        """Put keys and values [T, G, C] of a batch in their places."""
        for number, values in enumerate((k, v)):
            if self._scales is not None:
                values, scales = round_q8_0(values)
                self._scales[:, layer, number][inputs.blocks, :, inputs.offsets] = scales
            self._values[:, layer, number][inputs.blocks, :, inputs.offsets] = values.to(self._values.dtype)

    def gathered(self, layer: int, number: int, table: Tensor) -> Tensor:
        """Return keys (0) or values (1) of sequences as float32 [S, G, positions, C]."""
        values = _in_order(self._values[:, layer, number][table]).float()
        if self._scales is not None:
            scales = _in_order(self._scales[:, layer, number][table]).float()
            values.unflatten(-1, (-1, BLOCK)).mul_(scales[..., None])
        return values

    def read_block(self, block: int) -> Uint8Array:
        """Return a copy of the bytes of a block, read-only."""
        kv = np.asarray(self._device.to_host(self._bytes[block]).numpy()).reshape(-1)
        kv.flags.writeable = False
        return kv

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put bytes that `read_block` once gave into a block."""
        self._bytes[block] = self._device.to_device(np.array(kv, np.uint8).reshape(self._bytes.shape[1:]))


def _in_order(blocks: Tensor) -> Tensor:
    """Return [S, G, positions, n] of [S, blocks, G, KV_TILE, n]."""
    return blocks.transpose(1, 2).flatten(2, 3)


def round_q8_0(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 of float32 [..., C], as float32, and the half-float scales [..., C / 32]; see `kv_layout.py`."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    exact = torch.nan_to_num(blocks * inverse[..., None], 0.0, 0.0, 0.0)
    size = exact.abs()
    whole = size.floor()
    nearest = torch.copysign(whole + (size - whole >= 0.5), exact).flatten(-2)
    return nearest, torch.where(scales < torch.inf, scales, torch.nan).half()


def attend(spec: ModelSpec, cache: KVCache, layer: int, inputs: Inputs, q: Tensor, masks: tuple[Tensor, ...]) -> Tensor:
    """Return causal grouped-query attention [T, H * C] of q [T, H, C] over the cache.

    Query heads that share a kv head are rows of one product: their number and the rows' order are no matter to it.
    """
    attention = spec.attention
    share = attention.n_heads // attention.n_kv_heads
    out = torch.empty_like(q)
    for group, mask in zip(inputs.groups, masks, strict=True):
        rows, n = mask.shape[:2]
        grouped = q[group.rows].view(rows, n, attention.n_kv_heads, share, attention.head_dim)
        query = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [S, G, share * n, C]
        k, v = (cache.gathered(layer, number, group.table) for number in (0, 1))
        every = mask.repeat(1, share, 1)[:, None]  # [S, 1, share * n, positions]
        attended = functional.scaled_dot_product_attention(query, k, v, attn_mask=every)
        back = attended.unflatten(2, (share, n)).permute(0, 3, 1, 2, 4)  # [S, n, G, share, C]
        out[group.rows] = back.reshape(rows * n, attention.n_heads, attention.head_dim)
    return out.flatten(1)


def rope(spec: ModelSpec, x: Tensor, angles: Tensor) -> Tensor:
    """Return heads x [T, H, C] with their first rope_dim elements rotated (Su et al. 2021)."""
    attention = spec.attention
    dim = attention.rope.dim
    turned, rest = x[..., :dim], x[..., dim:]
    cos, sin = angles[:, :, None]  # [T, 1, dim / 2]
    if attention.rope.style is RopeStyle.INTERLEAVED:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned[..., : dim // 2], turned[..., dim // 2 :]
        pairs = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([pairs, rest], -1)
