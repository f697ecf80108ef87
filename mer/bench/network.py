"""The arithmetic of the streaming benchmark: expert FFNs by the production kernels, without a model around them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import trio

from mer.bench.datafile import DataFile
from mer.bench.workload import Workload
from mer.compute.cpu.forward import Forward, steps_for
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride
from mer.compute.cpu.prepare import prepare_kernels
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Limits
from mer.compute.cpu.weights import DenseWeights
from mer.compute.cpu.worker import CPUWorker
from mer.compute.kernels.elementwise import combine
from mer.compute.messages import Batch, Begin, Float32Array, Int32Array
from mer.config import Progress
from mer.errors import MerError
from mer.io.ggml import GGMLType
from mer.model.operators import (
    Attention,
    Experts,
    Layer,
    Linear,
    Norm,
    Rope,
    RopeStyle,
    Router,
    Tensor,
    gated_experts,
    vector,
)
from mer.model.spec import ModelSpec
from mer.sched.simulate import Event

_INPUT_SEED = 12_648_430


def _spec(workload: Workload, data: DataFile) -> ModelSpec:
    """Return a model of the workload's experts whose attention, head and vocabulary are as small as can be."""
    geometry = data.plan.geometry
    d_model, one = geometry.d_model, Linear(Tensor("", (1, 1)))
    rope = Rope(dim=2, base=10000.0, scale=1.0, style=RopeStyle.NEOX)
    attention = Attention(
        q=one, k=one, v=one, out=one, n_heads=1, n_kv_heads=1, head_dim=2, rope=rope, q_norm=None, k_norm=None,
        window=None,
    )  # fmt: skip
    norm, embedding = Norm(vector("", d_model), 1e-5), Tensor("", (1, d_model))
    router = Router(Linear(Tensor("", (workload.n_experts, d_model))), workload.widest, normalize=True)
    layers = [
        Layer(norm, attention, norm, Experts(router, gated_experts(layer, workload.n_experts, d_model, geometry.d_ff)))
        for layer in range(workload.n_layers)
    ]
    return ModelSpec(
        architecture="mer-bench-stream",
        name=workload.name,
        context_length=1,
        embedding=embedding,
        layers=tuple(layers),
        norm=norm,
        head=Linear(embedding),
    )


def input_vector(d_model: int) -> Float32Array:
    """Return the vector that every expert is applied to, float32 [D]: uniform in -1..1, the same everywhere."""
    raw = np.random.PCG64(_INPUT_SEED).random_raw(d_model)
    return (np.asarray(raw >> np.uint64(40), np.float64) * 2.0**-23 - 1.0).astype(np.float32)


class StreamForward(Forward):
    """One-token batches whose routing is a workload's: token `at` uses the experts of iteration `at`, in equal shares.

    `Attend` computes nothing, its result names the experts. `RunExperts` and `Combine` are those of every model, and
    `Project` gives the mean of the experts' outputs, [1, D], in place of logits.
    """

    def __init__(self, workload: Workload, data: DataFile, n_threads: int) -> None:
        spec = _spec(workload, data)
        limits = Limits(batch_tokens=1, outputs=1, sequences=1, sequence_blocks=1, kv_blocks=1, threads=n_threads)
        super().__init__(spec, limits, DenseWeights({}), data.experts)
        self._events: tuple[Event, ...] = workload.events
        self._used = 0  # experts of the iteration under way
        s, d_model = self.scratch, spec.d_model
        s.memory.floats(s.address["h"], d_model)[:] = input_vector(d_model)
        self._shares = s.memory.floats(s.address["expert_weights"], spec.top_k)

    def begin(self, batch: Batch) -> None:
        """Take over a batch of one token, whose id is the number of its iteration."""
        self._batch = batch
        self._routed_experts.begin(1)

    def _attend(self, program: Program, layer: int, predict: bool) -> None:
        """Add what experts need of the input, which is always the same; the routing is given."""
        self._routed_experts.prepare_token(program, layer)
        program.barrier()

    def routed(self) -> Int32Array:
        """Return the experts of the batch's iteration, [1, K], and prepare for running them."""
        _, experts = self._events[int(self.batch.tokens[0])]
        ids = np.array(experts, np.int32)
        self._used = len(ids)
        self._shares[: self._used] = 1 / self._used
        self._routed_experts.assign(ids)
        return ids.reshape(1, -1)

    def combine(self, program: Program) -> None:
        """Add the step that adds the experts' outputs up, in the order in which the iteration names them."""
        a, d = self.scratch.address, float_stride(self._spec.d_model)
        program.add(
            combine, a["x"], d, 1, d // FLOAT_BYTES, a["y"], a["expert_weights"], a["places"], self._used
        )  # fmt: skip
        program.barrier()

    def project(self, program: Program) -> None:
        """Add nothing: the sum is what is wanted."""

    def logits(self) -> Float32Array:
        """Return the mean of the experts' outputs, float32 [1, D], and start from zero again."""
        mean = self.scratch.x[:1, : self._spec.d_model].copy()
        self.scratch.x[:] = 0
        return mean


def begin(at: int) -> Begin:
    """Return the operation that starts iteration `at`."""
    one = np.zeros(1, np.int32)
    return Begin(Batch(np.array([at], np.int32), one, one, np.zeros((1, 1), np.int32), one))


@asynccontextmanager
async def open_worker(
    workload: Workload, data: DataFile, n_threads: int, on_progress: Callable[[Progress], None]
) -> AsyncIterator[CPUWorker]:
    """Compile the kernels, start a worker, and stop it when the block is left.

    If cancelled, a job under way is finished first.

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
