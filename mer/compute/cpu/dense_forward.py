"""The dense part of a model on the processor, for places that compute its experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from mer.compute.cpu.forward import Forward
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.program import Program
from mer.compute.messages import Batch, Float32Array, Int32Array, Uint8Array
from mer.compute.places import Pairs
from mer.model.spec import ModelSpec


@attrs.frozen(eq=False)
class Routed:
    """What comes of a layer's router."""

    expert_ids: Int32Array  # [T, K]
    predicted_ids: Int32Array | None  # [T, K] in the next layer
    damaged: Int32Array  # rows whose router logits were not finite so far


class DenseForward:
    """Runs the dense part step by step, hands out h, and takes in the rows y that any places have computed.

    `CPUWorker` does not use it: where all experts are computed here, they are steps of the same program as what comes
    behind them. Logits are the same to the bit.

    Args:
        spec: the model.
        forward: the CPU worker's arithmetic.
        here: runs its programs, and computes experts in the same scratch memory.
    """

    def __init__(self, spec: ModelSpec, forward: Forward, here: CPUPlace) -> None:
        self._spec, self._forward, self._here = spec, forward, here
        self._routed: Routed | None = None

    @property
    def h(self) -> Float32Array:
        """What goes into a layer's experts [T, D], in place, after `advance` to its router."""
        forward, d = self._forward, self._spec.d_model
        s = forward.scratch
        rows = s.memory.floats(s.address["h"], len(forward.batch.tokens), float_stride(d) // FLOAT_BYTES)
        return rows[:, :d]

    def begin(self, batch: Batch) -> None:
        """Take over a batch."""
        self._forward.begin(batch)

    def advance(self, to: int, *, predict: bool = False) -> None:
        """Run everything up to and with a router, or after the last one, to the logits; see `Advance`."""
        forward = self._forward
        self._do(lambda program: forward.advance(program, to, predict=predict))
        if to < self._spec.n_routed:
            self._routed = Routed(forward.routed(), forward.predicted(), forward.damaged())

    def routed(self) -> Routed:
        """Return the last router's choice."""
        assert self._routed is not None
        return self._routed

    def take(self, pairs: Pairs, experts: Sequence[int], y: Float32Array) -> None:
        """Take over expert outputs y [n, D]; see `Division.compute`."""
        at = 0
        for number in experts:
            first, n = pairs.spans.get(number, (0, 0))
            self._here.outputs(first, n)[:] = y[at : at + n]
            at += n

    def run_shared(self, layer: int) -> None:
        """Add the network that a routed layer's experts share, if it has one and has not run yet."""
        self._do(lambda program: self._forward.run_shared(program, layer))

    def combine(self, layer: int) -> None:
        """Add the shared network, unless it has run, and the weighted expert outputs to x."""
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
        self._here.run(program)
