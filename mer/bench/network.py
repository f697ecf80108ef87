"""The arithmetic of the streaming benchmark: expert FFNs by the production kernels, without a model around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn

import numpy as np
import trio

from mer.bench.datafile import DataFile, expert_weights
from mer.bench.workload import Workload
from mer.compute.cpu.biases import ExpertBiases
from mer.compute.cpu.experts import RoutedExperts, expert_areas
from mer.compute.cpu.forward import matrix_types, steps_for
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.prepare import prepare_kernels
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits, Scratch
from mer.compute.cpu.worker import CPUWorker
from mer.compute.kernels.elementwise import combine
from mer.compute.messages import Batch, Begin, Float32Array, Int32Array, LoadedExpert
from mer.config import Progress
from mer.errors import ComputeError, MerError
from mer.io.ggml import GGMLType
from mer.sched.simulate import Event

_INPUT_SEED = 12_648_430


def input_vector(d_model: int) -> Float32Array:
    """Return the vector that every expert is applied to, float32 [D]: uniform in -1..1, the same everywhere."""
    raw = np.random.PCG64(_INPUT_SEED).random_raw(d_model)
    return (np.asarray(raw >> np.uint64(40), np.float64) * 2.0**-23 - 1.0).astype(np.float32)


class StreamForward:
    """One-token batches whose routing is a workload's: token `at` uses the experts of iteration `at`, in equal shares.

    `Advance` computes nothing, its result names the experts. `RunExperts` and `Combine` are those of every model, and
    an `Advance` after the last layer gives the mean of the experts' outputs, [1, D], in place of logits.
    """

    resident_rows = 0
    n_logits = 0
    shared_layers: frozenset[int] = frozenset()

    def __init__(self, workload: Workload, data: DataFile, n_threads: int) -> None:
        limits = Limits(batch_tokens=1, outputs=1, sequences=1, sequence_blocks=1, kv_blocks=1, threads=n_threads)
        top_k, d = workload.widest, float_stride(data.plan.geometry.d_model)
        weights = expert_weights(data.plan)
        own = Areas({"x": d, "expert_weights": FLOAT_BYTES * top_k})
        areas = Areas.union([own, expert_areas(data.experts, weights, top_k, limits)])
        self._scratch = s = Scratch(areas, matrix_types((), data.experts), limits.planes)
        self._experts = RoutedExperts(data.experts, weights, ExpertBiases(weights).address, top_k, limits, s)
        self._d_model, self.threads = data.plan.geometry.d_model, n_threads
        self.n_routed, self.staged_pairs = workload.n_layers, self._experts.staged_pairs
        self._events: tuple[Event, ...] = workload.events
        self._at = 0  # the running iteration
        self._used = 0  # its experts
        self._shares = s.floats("expert_weights")
        s.floats("h")[: self._d_model] = input_vector(self._d_model)

    def begin(self, batch: Batch) -> None:
        """Take over a batch of one token, whose id is the number of its iteration."""
        self._at = int(batch.tokens[0])
        self._experts.begin(1)

    def advance(self, program: Program, to: int, *, predict: bool = False) -> None:
        """Add what experts need of the input, which is always the same; the routing is given."""
        if to < self.n_routed:
            self._experts.begin_layer()
            self._experts.prepare_token(program, to)
            program.barrier()

    def routed(self) -> Int32Array:
        """Return the experts of the batch's iteration, [1, K], and prepare for running them."""
        _, experts = self._events[self._at]
        ids = np.array(experts, np.int32)
        self._used = len(ids)
        self._shares[: self._used] = 1 / self._used
        self._experts.assign(ids)
        return ids.reshape(1, -1)

    def predicted(self) -> None:
        """Predict nothing."""

    def damaged(self) -> Int32Array:
        """Return that no row is damaged."""
        return np.zeros(0, np.int32)

    def run_experts(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None:
        """Add the feed-forward networks of loaded experts, or stages of them; see `RoutedExperts.run`."""
        self._experts.run(program, layer, experts)

    def combine(self, program: Program, layer: int) -> None:
        """Add the step that adds the experts' outputs up, in the order in which the iteration names them."""
        a, d = self._scratch.address, float_stride(self._d_model)
        program.add(
            combine.row(
                x=a["x"],  # [1, D]
                stride=d,
                n=1,
                padded_d=d // FLOAT_BYTES,
                y=a["y"],  # [K, D]
                weights=a["expert_weights"],  # [1, K]
                places=a["places"],  # [1, K]
                k=self._used,
            )
        )
        program.barrier()

    def logits(self) -> Float32Array:
        """Return the mean of the experts' outputs, float32 [1, D], and start from zero again."""
        x = self._scratch.floats("x")
        mean = x[None, : self._d_model].copy()
        x[:] = 0
        return mean

    def _refuse(self, *_: object) -> NoReturn:
        raise ComputeError("the streaming benchmark has no KV, no shared experts and no jobs of all layers")

    run_resident = run_shared = routes = read_block = write_block = _refuse


def begin(at: int) -> Begin:
    """Return the operation that starts iteration `at`."""
    one = np.zeros(1, np.int32)
    return Begin(Batch(np.array([at], np.int32), one, one, np.zeros((1, 1), np.int32), one))


@asynccontextmanager
async def open_worker(
    workload: Workload, data: DataFile, n_threads: int, on_progress: Callable[[Progress], None]
) -> AsyncIterator[CPUWorker]:
    """Compile the kernels, start a worker, and stop it when the block is left.

    If cancelled, the running job is finished first.

    Args:
        workload: whose experts are run.
        data: where their weights lie.
        n_threads: threads that compute.
        on_progress: called as kernels are loaded and compiled.

    Raises:
        ConfigError: the system refuses a thread.
        MerError: what the block raises, unwrapped.
    """
    steps = steps_for({GGMLType(data.plan.geometry.type)}, 1, "f32")
    await prepare_kernels(steps, on_progress)
    worker = CPUWorker(StreamForward(workload, data, n_threads), n_threads)
    worker.start_threads()
    failure: MerError | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            try:
                yield worker
            except MerError as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        worker.close()
    if failure is not None:
        raise failure
