"""Attention, router and output head on the device; keeps the batch that is under way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.attention import (
    Group,
    Inputs,
    KVCache,
    attend,
    blocks_needed,
    padded_tables,
    rope,
)
from mer.compute.cuda.device import Device
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.routed import Routed
from mer.compute.cuda.weights import DeviceWeights
from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.messages import Batch, Float32Array, Int32Array, Uint8Array
from mer.model.spec import ModelSpec

Tensor = torch.Tensor


class DeviceForward:
    """The dense part of a model on the device.

    All methods are to be called inside `Device.computing()`, in the worker's thread.

    Args:
        spec: the model.
        limits: the largest batch.
        weights: the dense weights.
        device: computes.
        kernels: multiply.
    """

    place = "device"

    def __init__(
        self, spec: ModelSpec, limits: Limits, weights: DeviceWeights, device: Device, kernels: TorchKernels
    ) -> None:
        attention = spec.attention
        self._spec, self._weights, self._device, self._kernels = spec, weights, device, kernels
        self._kv = KVCache(spec, limits.kv_blocks, limits.kv_type, device)
        self._frequencies = attention.rope.base ** (-np.arange(0, attention.rope.dim, 2) / max(attention.rope.dim, 1))
        self._inputs: Inputs | None = None
        self._masks: tuple[Tensor, ...] = ()
        self._x = self.h = self._shares = self.damaged = self.outputs = device.zeros(0)
        self.ids = device.zeros(0, dtype=torch.int64)  # [T, K], the router's choice
        self._predicted: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """Take over a batch."""
        self._kv.begin_blocks(batch)
        arrays = self.host_inputs(batch)
        many = [row for row in _spans(batch) if row.stop - row.start > 1]
        single = [row.start for row in _spans(batch) if row.stop - row.start == 1]
        groups = []
        if single:
            last = max(int(batch.positions[row]) for row in single)
            table = padded_tables(batch, single, blocks_needed(last))
            rows = slice(None) if not many else self._device.to_device(np.array(single, np.int64))
            groups.append(self._group(batch, rows, table, single))
        for rows in many:
            own = list(range(rows.start, rows.stop))
            table = padded_tables(batch, own[-1:], blocks_needed(int(batch.positions[own[-1]])))
            groups.append(self._group(batch, rows, table, own))
        tensors = {name: self._device.to_device(array) for name, array in arrays.items()}
        self.start(Inputs(**tensors, groups=tuple(groups)))

    def begin_blocks(self, batch: Batch) -> None:
        """Zero the KV blocks that a batch begins."""
        self._kv.begin_blocks(batch)

    def host_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arrays of a batch's `Inputs`, its groups excepted."""
        angle = batch.positions[:, None] * self._spec.attention.rope.scale * self._frequencies
        return {
            "tokens": batch.tokens.astype(np.int64),
            "blocks": batch.tables[batch.sequences, batch.positions // KV_TILE].astype(np.int64),
            "offsets": batch.positions.astype(np.int64) % KV_TILE,
            "angles": np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32),
            "outputs": batch.outputs.astype(np.int64),
        }

    def start(self, inputs: Inputs) -> None:
        """Begin with a batch that is on the device: its token embeddings become the residual stream."""
        self._inputs = inputs
        self._masks = tuple(group.mask(self._spec.attention.window) for group in inputs.groups)
        self._x = self._weights.rows("token_embd.weight", inputs.tokens)
        self.damaged = torch.zeros_like(inputs.tokens, dtype=torch.bool)

    def attend(self, layer: int, *, predict: bool = False) -> None:
        """Run attention and router of a layer, and the next layer's router with `predict`, if there is one."""
        spec, n, inputs = self._spec, len(self._x), self._batch()
        attention = spec.attention
        h = self._norm(self._x, f"blk.{layer}.attn_norm")
        q, k, v = (self._matmul(layer, f"attn_{name}", h).view(n, -1, attention.head_dim) for name in "qkv")
        if attention.q_norm is not None:
            q, k = (self._norm(heads, f"blk.{layer}.attn_{x}_norm") for heads, x in ((q, "q"), (k, "k")))
        q, k = (rope(spec, heads, inputs.angles) for heads in (q, k))
        self._kv.store(layer, inputs, k, v)
        attended = attend(spec, self._kv, layer, inputs, q, self._masks)
        self._x = self._x + self._matmul(layer, "attn_output", attended)
        self.h = self._norm(self._x, f"blk.{layer}.ffn_norm")
        self.ids, logits = self._route(layer, self.h)
        self._shares = functional.softmax(logits.gather(1, self.ids), 1)
        self.damaged = self.damaged | ~logits.isfinite().all(1)
        self._predicted = None
        if predict and layer + 1 < spec.n_routed:
            self._predicted, _ = self._route(layer + 1, self._norm(self._x, f"blk.{layer + 1}.ffn_norm"))

    def routed(self) -> Routed:
        """Return the last router's choice; waits for the device."""
        parts = [self.ids, self.damaged[:, None]]
        if self._predicted is not None:
            parts.append(self._predicted)
        host = self._device.to_host(torch.cat([part.int() for part in parts], 1)).numpy()
        k = self._spec.top_k
        ids = np.ascontiguousarray(host[:, :k])
        predicted = None if self._predicted is None else np.ascontiguousarray(host[:, k + 1 :])
        return Routed(ids, predicted, np.flatnonzero(host[:, k]).astype(np.int32))

    def combine(self, y: Tensor) -> None:
        """Add the weighted expert outputs y [T * K, D] to the residual stream, in router order."""
        parts = y.view(*self._shares.shape, -1) * self._shares[:, :, None]
        for rank in range(parts.shape[1]):
            self._x = self._x + parts[:, rank]

    def project(self) -> None:
        """Apply the final norm and the output head to the rows that the batch asked for."""
        head = "token_embd.weight" if self._spec.tied_head else "output.weight"
        h = self._norm(self._x[self._batch().outputs], "output_norm")
        self.outputs = self._kernels.matmul(self._weights.matrix(head), h)

    def results(self) -> tuple[Float32Array, Int32Array]:
        """Return logits [N, V] of `project`, and damaged rows; waits for the device."""
        damaged = self._device.to_host(self.damaged).numpy()
        logits = self._device.to_host(self.outputs).numpy()
        return logits, np.flatnonzero(damaged).astype(np.int32)

    def read_block(self, block: int) -> Uint8Array:
        """Return the KV of a block of all layers, as a copy."""
        return self._kv.read_block(block)

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put KV that `read_block` once gave into a block."""
        self._kv.write_block(block, kv)

    def _batch(self) -> Inputs:
        if self._inputs is None:
            raise RuntimeError("no batch has begun")
        return self._inputs

    def _group(self, batch: Batch, rows: Tensor | slice, table: np.ndarray, own: list[int]) -> Group:
        positions = batch.positions[own].astype(np.int64).reshape(len(table), -1)
        return Group(rows, self._device.to_device(table), self._device.to_device(positions))

    def _route(self, layer: int, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return a router's choice [T, K], by falling logits and of equal ones the lower number first, and logits."""
        gate = self._weights.matrix(f"blk.{layer}.ffn_gate_inp.weight")
        logits = self._kernels.matmul(gate, h, exact=True)
        return logits.sort(dim=1, descending=True, stable=True).indices[:, : self._spec.top_k], logits

    def _matmul(self, layer: int, name: str, x: Tensor) -> Tensor:
        return self._kernels.matmul(self._weights.matrix(f"blk.{layer}.{name}.weight"), x)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights.vector(f"{name}.weight")
        return functional.rms_norm(x, (x.shape[-1],), weight, self._spec.norm.eps)


def _spans(batch: Batch) -> list[slice]:
    """Return the rows of each sequence of a batch."""
    ends = [*np.flatnonzero(np.diff(batch.sequences)) + 1, len(batch.sequences)]
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
