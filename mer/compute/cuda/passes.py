"""A whole token of every sequence in one go, while all experts are on the device: on a GPU one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch

from mer.compute.cuda.device import Device
from mer.compute.cuda.forward import DeviceForward
from mer.compute.cuda.inputs import Group, Inputs, blocks_needed, padded_tables
from mer.compute.messages import Batch, Float32Array, Int32Array

Tensor = torch.Tensor
_KEPT = 16  # graphs


@attrs.define(eq=False)
class _Pass:
    """One size of batches: where its inputs are put, and how it is run."""

    arrays: dict[str, Tensor]
    inputs: Inputs
    replay: Callable[[], None] | None = None
    results: tuple[Tensor, Tensor, Tensor] | None = None


class TokenPasses:
    """Runs batches with one row of each sequence from the embeddings to the logits, without a word from the host.

    Sizes are (rows, KV blocks of the longest sequence, rounded up to a power of two); on a GPU each is captured as a
    CUDA graph when it first comes, and the least recently used of more than 16 is dropped. On torch's `cpu` device the
    same operations run on the same inputs.

    Args:
        device: computes.
        forward: the dense part, which is on the device.
        layers: computes the experts of a layer that the forward's router has chosen, and adds their outputs.
        n_layers: routed layers of the model.
    """

    def __init__(self, device: Device, forward: DeviceForward, layers: Callable[[int], None], n_layers: int) -> None:
        self._device, self._forward, self._layers, self._n_layers = device, forward, layers, n_layers
        self._passes: dict[tuple[int, int], _Pass] = {}
        self.n_captured = 0

    @staticmethod
    def takes(batch: Batch) -> bool:
        """Return whether a batch has one row of each of its sequences, and wants logits for all."""
        n = len(batch.tokens)
        return len(batch.tables) == n and len(batch.outputs) == n and bool((np.diff(batch.outputs) == 1).all())

    def run(self, batch: Batch) -> tuple[Int32Array, Float32Array, Int32Array]:
        """Return the routes [L, T, K], the logits [T, V], and the damaged rows."""
        device, n = self._device, len(batch.tokens)
        needed = blocks_needed(int(batch.positions.max()))
        width = 1 << (needed - 1).bit_length()
        arrays = self._forward.host_inputs(batch)
        arrays["table"] = padded_tables(batch, list(range(n)), width)
        arrays["positions"] = batch.positions.astype(np.int64)[:, None]
        self._forward.begin_blocks(batch)
        it = self._passes.pop((n, width), None)
        if it is None:
            it = self._make({name: device.to_device(array) for name, array in arrays.items()})
        else:
            for name, array in arrays.items():
                it.arrays[name].copy_(device.to_device(array))
        self._passes[n, width] = it
        if len(self._passes) > _KEPT:
            del self._passes[next(iter(self._passes))]
        if it.replay is None:
            it.results = self._compute(it.inputs)
        else:
            it.replay()
        assert it.results is not None
        routes, logits, damaged = (device.to_host(result).numpy() for result in it.results)
        return routes, logits, np.flatnonzero(damaged).astype(np.int32)

    def _make(self, arrays: dict[str, Tensor]) -> _Pass:
        named = {name: tensor for name, tensor in arrays.items() if name not in ("table", "positions")}
        group = Group(slice(None), arrays["table"], arrays["positions"])
        it = _Pass(arrays, Inputs.of(named, (group,)))
        if self._device.is_cuda:
            self._compute(it.inputs)  # compiles kernels, which a capture cannot; what it writes is written again
            graph, captured = self._device.capture(lambda: self._compute(it.inputs))
            it.replay, it.results = graph.replay, captured
            self.n_captured += 1
        return it

    def _compute(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        forward = self._forward
        forward.start(inputs)
        routes: list[Any] = []
        for layer in range(self._n_layers):
            forward.advance(layer)
            routes.append(forward.ids)
            self._layers(layer)
        forward.advance(self._n_layers)
        return torch.stack(routes).int(), forward.outputs, forward.damaged
