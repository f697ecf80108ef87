"""The dense part of a model on the device: the blocks of its layers, strung together; keeps the batch under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mer.compute.cpu.dense_forward import Routed
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.blocks.attention import AttentionBlock
from mer.compute.cuda.blocks.feed_forward import FeedForwardBlock
from mer.compute.cuda.blocks.router import RouterBlock
from mer.compute.cuda.blocks.tools import Tools
from mer.compute.cuda.device import Device
from mer.compute.cuda.inputs import Group, Inputs, blocks_needed, padded_tables
from mer.compute.cuda.kv import KVCache
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.sizes import kv_layout
from mer.compute.cuda.weights import DeviceWeights
from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.messages import Batch, Float32Array, Int32Array, Uint8Array
from mer.compute.places import Pairs
from mer.model.operators import Addition, Attention, Experts
from mer.model.rope import Rotation
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

    def __init__(
        self, spec: ModelSpec, limits: Limits, weights: DeviceWeights, device: Device, kernels: TorchKernels
    ) -> None:
        self._spec, self._weights, self._device = spec, weights, device
        self._tools = Tools(weights, kernels)
        self._kv = KVCache(kv_layout(spec, limits.kv_type), limits.kv_blocks, limits.kv_type, device)
        self._rotations: list[Rotation] = []  # of the model's ropes, made once the weights are there
        self._between: list[list[tuple[Attention | None, AttentionBlock | FeedForwardBlock, Addition]]] = [[]]
        self._routers: list[RouterBlock] = []
        self._shared: list[FeedForwardBlock | None] = []
        self._sums: list[tuple[Experts, Addition]] = []  # what becomes of the outputs of experts and shared network
        self._make_blocks()
        self._windows = dict.fromkeys(layer.mixer.window for layer in spec.layers)
        self._inputs: Inputs | None = None
        self._masks: dict[int | None, tuple[Tensor, ...]] = {}
        self._x = self.h = self._shares = self.damaged = self.outputs = device.zeros(0)
        self.ids = device.zeros(0, dtype=torch.int64)  # [T, K], the router's choice
        self.y = device.zeros(limits.batch_tokens * spec.top_k, spec.d_model)  # expert outputs, one row for each pair
        self._predicted: Tensor | None = None
        self._shared_ran = False  # in the routed layer under way
        self._shared_y: Tensor | None = None  # what it has given, unless it has been added to x

    def _make_blocks(self) -> None:
        tools = self._tools
        for layer, cache in zip(self._spec.layers, self._kv.layers, strict=True):
            rope = self._spec.ropes.index(layer.mixer.rope)
            mixer = AttentionBlock(layer.mixer, layer.mixer_norm, tools, cache, rope)
            self._between[-1].append((layer.mixer, mixer, layer.mixer_add))
            if isinstance(layer.ffn, Experts):
                record, shared = layer.ffn, layer.ffn.shared
                self._routers.append(RouterBlock(record, layer.ffn_norm, tools))
                block = None if shared is None else FeedForwardBlock(shared, record.shared_norm, tools)
                self._shared.append(block)
                self._sums.append((record, layer.ffn_add))
                self._between.append([])
            else:
                ffn = FeedForwardBlock(layer.ffn, layer.ffn_norm, tools)
                self._between[-1].append((None, ffn, layer.ffn_add))

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
        self.start(Inputs.of(tensors, tuple(groups)))

    def begin_blocks(self, batch: Batch) -> None:
        """Zero the KV blocks that a batch begins."""
        self._kv.begin_blocks(batch)

    def host_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the arrays of a batch's `Inputs`, its groups excepted."""
        arrays: dict[str, Any] = {
            "tokens": batch.tokens.astype(np.int64),
            "blocks": batch.tables[batch.sequences, batch.positions // KV_TILE].astype(np.int64),
            "offsets": batch.positions.astype(np.int64) % KV_TILE,
            "outputs": batch.outputs.astype(np.int64),
        }
        if not self._rotations:
            host = self._device.to_host
            self._rotations = [Rotation(it, lambda name: host(self._weights.vector(name))) for it in self._spec.ropes]
        for number, rotation in enumerate(self._rotations):
            arrays[f"angles{number}"] = rotation.angles(batch.positions)
        return arrays

    def start(self, inputs: Inputs) -> None:
        """Begin with a batch that is on the device: its token embeddings become the residual stream."""
        self._inputs = inputs
        self._masks = {window: tuple(group.mask(window) for group in inputs.groups) for window in self._windows}
        self._x = self._weights.rows(self._spec.embedding.name, inputs.tokens)
        if self._spec.embedding_scale != 1:
            self._x = self._x * self._spec.embedding_scale
        self.damaged = torch.zeros_like(inputs.tokens, dtype=torch.bool)

    def advance(self, to: int, *, predict: bool = False) -> None:
        """Run everything up to and with a router, or after the last one, to the logits; see `Advance`."""
        inputs = self._batch()
        for record, block, addition in self._between[to]:
            if isinstance(block, AttentionBlock):
                assert record is not None
                y = block(self._x, inputs, self._masks[record.window])
            else:
                y = block(self._x)
            self._x = self._tools.added(addition, self._x, y)
        if to == len(self._routers):
            h = self._tools.norm(self._spec.norm, self._x[inputs.outputs])
            self.outputs = self._tools.linear(self._spec.head, h)
            if self._spec.softcap is not None:
                self.outputs = self._spec.softcap * torch.tanh(self.outputs / self._spec.softcap)
            return
        router = self._routers[to]
        self.h = router.normalized(self._x)
        self.ids, logits = router.choose(self._x, self.h)
        self._shares = router.weights(self.ids, logits)
        self._shared_ran = False
        self.damaged = self.damaged | router.damaged(logits)
        self._predicted = None
        if predict and to + 1 < len(self._routers):
            following = self._routers[to + 1]
            self._predicted, _ = following.choose(self._x, following.normalized(self._x))

    def routed(self) -> Routed:
        """Return the last router's choice, in one transfer; waits for the device."""
        parts = [self.ids, self.damaged[:, None]]
        if self._predicted is not None:
            parts.append(self._predicted)
        host = self._device.to_host(torch.cat([part.int() for part in parts], 1)).numpy()
        k = self._spec.top_k
        ids = np.ascontiguousarray(host[:, :k])
        predicted = None if self._predicted is None else np.ascontiguousarray(host[:, k + 1 :])
        return Routed(ids, predicted, np.flatnonzero(host[:, k]).astype(np.int32))

    def run_shared(self, layer: int) -> None:
        """Add the network that a routed layer's experts share, if it has one and has not run yet."""
        shared = self._shared[layer]
        if shared is None or self._shared_ran:
            return
        record, addition = self._sums[layer]
        y = shared(self.h if record.shared_norm is None else self._x)
        if record.adds_to_x(addition):
            self._x = self._x + y
        else:
            self._shared_y = y if record.shared_post is None else self._tools.norm(record.shared_post, y)
        self._shared_ran = True

    def take(self, pairs: Pairs, experts: Sequence[int], y: Tensor) -> None:
        """Take over expert outputs y [n, D]; see `Division.compute`."""
        self.y[self._device.to_device(pairs.of(experts))] = y

    def combine(self, layer: int) -> None:
        """Add the shared network, unless it has run, and then the weighted expert outputs, in router order."""
        self.run_shared(layer)
        parts = self.y[: self.ids.numel()].view(*self._shares.shape, -1) * self._shares[:, :, None]
        record, addition = self._sums[layer]
        if record.adds_to_x(addition):
            for rank in range(parts.shape[1]):
                self._x = self._x + parts[:, rank]
            return
        total = parts[:, 0]
        for rank in range(1, parts.shape[1]):
            total = total + parts[:, rank]
        if record.routed_post is not None:
            total = self._tools.norm(record.routed_post, total)
        if self._shared_y is not None:
            total, self._shared_y = self._shared_y + total, None
        self._x = self._tools.added(addition, self._x, total)

    def results(self) -> tuple[Float32Array, Int32Array]:
        """Return logits [N, V], and damaged rows; waits for the device."""
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


def _spans(batch: Batch) -> list[slice]:
    """Return the rows of each sequence of a batch."""
    ends = [*np.flatnonzero(np.diff(batch.sequences)) + 1, len(batch.sequences)]
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
