"""The place where the processor computes experts from memory, beside other places."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.biases import ExpertBiases
from mer.compute.cpu.experts import RoutedExperts, expert_areas
from mer.compute.cpu.forward import Forward, matrix_types
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Limits, Scratch
from mer.compute.cpu.team import Team
from mer.compute.messages import Float32Array, LoadedExpert
from mer.compute.places import Cost, Pairs
from mer.compute.rate import Rate
from mer.io.extents import ExpertMap
from mer.model.spec import ModelSpec

_ROWS_PER_READ = 4  # rows for which an expert takes the processor no longer than reading its weights does


class CPUPlace:
    """Experts computed by the CPU worker's kernels, from the slots in memory: an `ExpertPlace` of NumPy arrays.

    To be used from one thread, except for `open`, `close` and `cost`. Raw experts are re-arranged in their slots.

    Args:
        spec: the model.
        limits: the largest batch, the threads and the planes of activations.
        experts: types and shapes of the routed experts.
        forward: the dense part, if the processor computes it too: then both work in one scratch memory, into which the
            outputs go.
    """

    def __init__(self, spec: ModelSpec, limits: Limits, experts: ExpertMap, forward: Forward | None = None) -> None:
        self._spec, self._experts = spec, experts
        if forward is None:
            areas = expert_areas(experts, spec.expert_weights, spec.top_k, limits)
            self._scratch = Scratch(areas, matrix_types((), experts), limits.planes)
            self._biases = ExpertBiases(spec.expert_weights)
            routed = RoutedExperts(
                experts, spec.expert_weights, self._biases.address, spec.top_k, limits, self._scratch
            )
            self._routed: RoutedExperts | None = routed
            self._run = routed.run
        else:
            self._scratch, self._routed, self._run = forward.scratch, None, forward.run_experts
            self._biases = ExpertBiases(())  # the dense part has them
        self._team = Team(limits.threads)
        self._rate = Rate()
        self._program = Program()
        self._spans: list[tuple[int, int]] = []  # pairs of the experts under way
        self._work = 0.0  # bytes, see `_work_bytes`
        self._began_s = 0.0

    def load_biases(self, floats: Callable[[str], npt.ArrayLike]) -> None:
        """Take over the experts' biases, by the names of their tensors, unless the dense part here has them."""
        self._biases.load(floats)

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

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """See `ExpertPlace`: time in proportion to the weights, and to the rows where these are many."""
        seconds = self._rate.seconds(self._work_bytes(layer, experts, rows))
        return None if seconds is None else Cost(seconds)

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Float32Array, pairs: Pairs) -> None:
        """See `ExpertPlace`; a `Forward` has its own rows h, and has sorted its pairs."""
        s, program = self._scratch, Program()
        if self._routed is not None:
            d = self._spec.d_model
            rows = s.memory.floats(s.address["h"], len(h), float_stride(d) // FLOAT_BYTES)
            rows[:, :d] = h
            self._routed.begin(len(pairs.ids))
            self._routed.assign(pairs.ids.ravel())
            self._routed.prepare_token(program, layer)
            program.barrier()
        self._run(program, layer, experts)
        self._program = program
        self._spans = [pairs.spans.get(it.expert, (0, 0)) for it in experts]
        self._work = sum(self._work_bytes(layer, experts, [pairs.count(it.expert) for it in experts]))
        self._began_s = time.perf_counter()
        self._team.start(program)

    def finish(self, *, timed: bool) -> Float32Array | None:
        """See `ExpertPlace`; it waits in any case, so that it always takes the time."""
        self._team.block()
        self._rate.measured(self._work, time.perf_counter() - self._began_s)
        if self._routed is None:
            return None
        return np.concatenate([self.outputs(first, n) for first, n in self._spans])

    def outputs(self, first: int, n: int) -> Float32Array:
        """Return the outputs [n, D] of the pairs from `first` on, which are sorted by expert, in place."""
        s, stride = self._scratch, float_stride(self._spec.d_model)
        rows = s.memory.floats(s.address["y"] + first * stride, n, stride // FLOAT_BYTES)
        return rows[:, : self._spec.d_model]

    def _work_bytes(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> list[float]:
        """Return what experts cost in bytes of weights read: more rows are more arithmetic."""
        extents = self._experts.experts[layer]
        return [extents[it.expert].n_bytes * max(1.0, n / _ROWS_PER_READ) for it, n in zip(experts, rows, strict=True)]
