"""The KV cache on the device."""

from __future__ import annotations

import numpy as np
import torch

from mer.compute.cuda.device import Device
from mer.compute.cuda.inputs import Inputs
from mer.compute.kernels.kv_layout import BLOCK, KV_TILE
from mer.compute.messages import Batch, Uint8Array
from mer.compute.state import Paged, StateLayout
from mer.config import KVType

Tensor = torch.Tensor


class KVCache:
    """Keys and values of all layers in blocks of `KV_TILE` positions.

    Args:
        layout: what of a block is each layer's.
        n_blocks: of the cache.
        kv_type: how values are kept.
        device: holds it.
    """

    def __init__(self, layout: StateLayout, n_blocks: int, kv_type: KVType, device: Device) -> None:
        self._device = device
        self._bytes = device.zeros(n_blocks, layout.block_bytes, dtype=torch.uint8)
        self.layers = [
            LayerCache(self._bytes[:, offset : offset + layer.n_bytes], layer, kv_type)
            for offset, layer in zip(layout.offsets, layout.layers, strict=True)
        ]

    def begin_blocks(self, batch: Batch) -> None:
        """Zero the blocks that a batch begins: what is masked must be finite too, as 0 * NaN is NaN."""
        begun = np.flatnonzero(batch.positions % KV_TILE == 0)
        if len(begun):
            numbers = batch.tables[batch.sequences[begun], batch.positions[begun] // KV_TILE]
            self._bytes[self._device.to_device(numbers.astype(np.int64))] = 0

    def read_block(self, block: int) -> Uint8Array:
        """Return a copy of the bytes of a block, read-only."""
        kv = np.asarray(self._device.to_host(self._bytes[block]).numpy())
        kv.flags.writeable = False
        return kv

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put bytes that `read_block` once gave into a block."""
        self._bytes[block] = self._device.to_device(np.array(kv, np.uint8))


class LayerCache:
    """Keys and values of one layer.

    For each block, K or V, and KV head come the values [KV_TILE, C], in float32, half floats or int8, and for Q8_0,
    behind them, half-float scales [KV_TILE, C / 32]. They are rounded as the CPU worker does (`kv_layout.py`) and
    widened to float32, exactly, where they are attended to.

    Args:
        raw: uint8 [blocks, bytes of the layer].
        layer: how these are divided.
        kv_type: how values are kept.
    """

    def __init__(self, raw: Tensor, layer: Paged, kv_type: KVType) -> None:
        kind = {"f32": torch.float32, "f16": torch.float16, "q8_0": torch.int8}[kv_type]
        tiles = raw.unflatten(1, (2, layer.heads, layer.key_bytes))  # [blocks, 2, G, bytes of a tile]
        n_bytes = layer.key_bytes
        self._scales: Tensor | None = None
        positions = (KV_TILE, -1)
        if kv_type == "q8_0":
            n_bytes = layer.key_bytes * BLOCK // (BLOCK + 2)  # an int8 each, and a half float for each block
            self._scales = tiles[..., n_bytes:].view(torch.float16).unflatten(-1, positions)
        self._values = tiles[..., :n_bytes].view(kind).unflatten(-1, positions)

    def store(self, inputs: Inputs, k: Tensor, v: Tensor) -> None:
        """Put keys and values [T, G, C] of a batch in their places."""
        for number, values in enumerate((k, v)):
            if self._scales is not None:
                values, scales = round_q8_0(values)
                self._scales[:, number][inputs.blocks, :, inputs.offsets] = scales
            self._values[:, number][inputs.blocks, :, inputs.offsets] = values.to(self._values.dtype)

    def gathered(self, number: int, table: Tensor) -> Tensor:
        """Return keys (0) or values (1) of sequences as float32 [S, G, positions, C]."""
        values = _in_order(self._values[:, number][table]).float()
        if self._scales is not None:
            scales = _in_order(self._scales[:, number][table]).float()
            values.unflatten(-1, (-1, BLOCK)).mul_(scales[..., None])
        return values


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
