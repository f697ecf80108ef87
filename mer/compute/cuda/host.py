"""The processor's part beside a device: experts that are only in memory, and attention where VRAM has no room."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mer.compute.cpu.experts import RoutedExperts, expert_areas
from mer.compute.cpu.forward import Forward, matrix_types
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Limits, Scratch
from mer.compute.cpu.team import Team
from mer.compute.cuda.device import Device
from mer.compute.cuda.experts import Pairs
from mer.compute.cuda.forward import Routed
from mer.compute.messages import Batch, Float32Array, Int32Array, LoadedExpert, Uint8Array
from mer.io.extents import ExpertMap
from mer.model.spec import ModelSpec

Tensor = torch.Tensor


class HostExperts:
    """Experts computed by the CPU worker's kernels, from the slots in memory.

    To be used from the worker's thread, except for `open` and `close`. Fresh experts are re-arranged in their slots.

    Args:
        spec: the model.
        limits: the largest batch, the threads and the planes of activations.
        experts: types and shapes of the routed experts.
        forward: the dense part, if the processor computes it too: then both work in one scratch memory.
    """

    def __init__(self, spec: ModelSpec, limits: Limits, experts: ExpertMap, forward: Forward | None = None) -> None:
        self._spec = spec
        if forward is None:
            areas = expert_areas(experts, spec.top_k, limits)
            self.scratch = Scratch(areas, matrix_types((), experts), limits.planes)
            routed = RoutedExperts(experts, spec.top_k, limits, self.scratch)
            self._routed: RoutedExperts | None = routed
            self._run = routed.run
        else:
            self.scratch, self._routed, self._run = forward.scratch, None, forward.run_experts
        self._team = Team(limits.threads)
        self._began_s = 0.0

    def open(self) -> None:
        """Start the threads.

        Raises:
            ConfigError: the system refuses one.
        """
        self._team.open()

    def close(self) -> None:
        """Stop the threads once they have finished what they are at. Closing twice is allowed."""
        self._team.close()

    def run(self, program: Program) -> None:
        """Run a program of the dense part, and block until it has finished."""
        if program.length:
            self._team.start(program)
            self._team.block()

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Tensor, ids: Int32Array) -> Program:
        """Start to compute experts of a layer for the rows of h [T, D], a tensor in memory, routed to them by ids.

        The program must stay until `finish`.
        """
        s, program = self.scratch, Program()
        if self._routed is not None:
            d = self._spec.d_model
            rows = s.memory.floats(s.address["h"], len(h), float_stride(d) // FLOAT_BYTES)
            rows[:, :d] = h.numpy()
            self._routed.begin(len(ids))
            self._routed.assign(ids.ravel())
            self._routed.prepare_token(program, layer)
            program.barrier()
        self._run(program, layer, experts)
        self._began_s = time.perf_counter()
        self._team.start(program)
        return program

    def finish(self) -> float:
        """Block until what `start` began has finished, and return the seconds that it took."""
        self._team.block()
        return time.perf_counter() - self._began_s

    def outputs(self, first: int, n: int) -> Float32Array:
        """Return the outputs [n, D] of the pairs from `first` on, which are sorted by expert."""
        s, stride = self.scratch, float_stride(self._spec.d_model)
        rows = s.memory.floats(s.address["y"] + first * stride, n, stride // FLOAT_BYTES)
        return rows[:, : self._spec.d_model]


class HostForward:
    """The dense part of a model on the processor, beside experts on the device; the twin of `DeviceForward`.

    Args:
        spec: the model.
        forward: the CPU worker's arithmetic.
        host: runs its programs.
        device: where h goes to and y comes from.
    """

    def __init__(self, spec: ModelSpec, forward: Forward, host: HostExperts, device: Device) -> None:
        self._spec, self._forward, self._host, self._device = spec, forward, host, device
        self.h = device.zeros(0)
        self._routed: Routed | None = None

    def begin(self, batch: Batch) -> None:
        """Take over a batch."""
        self._forward.begin(batch)

    def advance(self, to: int, *, predict: bool = False) -> None:
        """Run everything up to and with a router, or after the last one, to the logits; see `Advance`."""
        forward = self._forward
        self._do(lambda program: forward.advance(program, to, predict=predict))
        if to == self._spec.n_routed:
            return
        self._routed = Routed(forward.routed(), forward.predicted(), forward.damaged())
        s, d = forward.scratch, self._spec.d_model
        rows = s.memory.floats(s.address["h"], len(forward.batch.tokens), float_stride(d) // FLOAT_BYTES)
        self.h = self._device.to_device(np.ascontiguousarray(rows[:, :d]))

    def routed(self) -> Routed:
        """Return the last router's choice."""
        assert self._routed is not None
        return self._routed

    def take(self, y: Tensor, pairs: Pairs, numbers: Sequence[int]) -> None:
        """Take over the outputs y [T * K, D] of the experts that the device has computed."""
        rows = self._device.to_host(y).numpy()
        for number in numbers:
            first, n = pairs.spans.get(number, (0, 0))
            self._host.outputs(first, n)[:] = rows[pairs.order[first : first + n]]

    def run_shared(self, layer: int) -> None:
        """Add the network that a routed layer's experts share, if it has one and has not run yet."""
        self._do(lambda program: self._forward.run_shared(program, layer))

    def combine(self, layer: int, y: Tensor) -> None:
        """Add the shared network, unless it has run, and the weighted expert outputs, which are in memory, to x."""
        self._do(lambda program: self._forward.combine(program, layer))

    def results(self) -> tuple[Float32Array, Int32Array]:
        """Return logits [N, V], and damaged rows."""
        return self._forward.logits(), self._forward.damaged()

    def read_block(self, block: int) -> Uint8Array:
        """Return the KV of a block of all layers."""
        return self._forward.read_block(block)

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put KV that `read_block` once gave into a block."""
        self._forward.write_block(block, kv)

    def _do(self, add: Callable[[Program], None]) -> None:
        program = Program()
        add(program)
        self._host.run(program)
