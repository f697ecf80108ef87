"""The CPU worker: programs of kernel steps, built in the trio thread and run by persistent threads outside the GIL."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import attrs
import trio

from mer.compute.cpu.program import Program
from mer.compute.cpu.team import Team, left_behind
from mer.compute.kernels.target import FORM
from mer.compute.messages import (
    Advance,
    Batch,
    Begin,
    Combine,
    Done,
    Float32Array,
    Int32Array,
    Int64Array,
    Job,
    JobCounters,
    LoadedExpert,
    ReadBlocks,
    RunExperts,
    RunResident,
    RunShared,
    Stage,
    Uint8Array,
    WorkerStatistics,
    WriteBlocks,
)
from mer.errors import ComputeError, MerError
from mer.io.loan.loan import Loan

_INLINE_TOKENS = 16  # a larger batch is taken over in a thread of trio's, so that the event loop goes on meanwhile
_INLINE_LOGITS = 1 << 19  # more are copied in a thread: 2 MiB take a millisecond where they come from new pages


class Arithmetic(Protocol):
    """What a worker's jobs are made of; see `Forward`, which is a model's."""

    @property
    def staged_pairs(self) -> int: ...
    @property
    def resident_rows(self) -> int: ...
    @property
    def n_routed(self) -> int: ...
    @property
    def n_logits(self) -> int: ...
    @property
    def shared_layers(self) -> frozenset[int]: ...
    @property
    def threads(self) -> int: ...
    def begin(self, batch: Batch) -> None: ...
    def advance(self, program: Program, to: int, *, predict: bool = False) -> None: ...
    def run_experts(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None: ...
    def run_resident(self, program: Program, layer: int, addresses: Int64Array, reads: Loan | None) -> None: ...
    def run_shared(self, program: Program, layer: int) -> None: ...
    def combine(self, program: Program, layer: int) -> None: ...
    def routed(self) -> Int32Array: ...
    def predicted(self) -> Int32Array | None: ...
    def damaged(self) -> Int32Array: ...
    def routes(self) -> tuple[Int32Array, bool]: ...
    def logits(self) -> Float32Array: ...
    def read_block(self, block: int) -> Uint8Array: ...
    def write_block(self, block: int, kv: Uint8Array) -> None: ...


class CPUWorker:
    """Runs jobs on `n_threads` threads.

    Use it as an async-free context: `start_threads`, then `run` in a nursery, then `close`. A job that has begun is
    finished even if `run` is cancelled; `close` waits for it, at most the time of one job.

    Args:
        forward: the model's arithmetic; the worker's own from here on.
        n_threads: threads that compute.
    """

    def __init__(self, forward: Arithmetic, n_threads: int) -> None:
        self._forward: Arithmetic | None = forward  # None once closed, as weights, KV and scratch are its
        self.staged_pairs = forward.staged_pairs  # see `ComputeWorker`
        self.resident_rows = forward.resident_rows  # see `ComputeWorker`
        self.shared_layers = forward.shared_layers  # see `ComputeWorker`
        self._team = Team(n_threads)
        self._program = Program()
        self._counters = JobCounters()
        self.jobs, self._jobs = trio.open_memory_channel[Job](1)
        self._results, self.results = trio.open_memory_channel[Done](1)

    def start_threads(self) -> None:
        """Start the threads.

        Raises:
            ConfigError: the system refuses a thread.
        """
        self._team.open()

    def close(self) -> None:
        """Stop the threads once a job that is running has finished, and let go of weights, KV and scratch.

        Closing twice is allowed.
        """
        self._team.close()
        if self._team.failure:
            left_behind.append((self._forward, self._program))
        self._forward = None
        self._program = Program()

    def disown(self) -> None:
        """Compute nothing more, in a forked child: threads and memory are the parent's."""
        self._forward = None

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more; empty as long as it can."""
        return self._team.failure

    async def run(self) -> None:
        """Serve jobs in order until the job channel is closed, the task is cancelled, or a thread has died."""
        with self._results:
            async for job in self._jobs:
                begun = time.perf_counter()
                try:
                    await self._start(job)
                    job.on_started()
                    if self._program.length:
                        await self._team.wait()
                    done = await self._collect(job, begun)
                except MerError as error:
                    done = Done(error=error, compute_s=time.perf_counter() - begun)
                except Exception as error:
                    failure = ComputeError(f"a compute job failed: {type(error).__name__}: {error}")
                    failure.__cause__ = error
                    done = Done(error=failure, compute_s=time.perf_counter() - begun)
                self._counters.jobs += 1
                self._counters.compute_s += done.compute_s
                try:
                    self._results.send_nowait(done)  # the next pass of the event loop is the receiver's
                except trio.WouldBlock:
                    await self._results.send(done)
                if self._team.failure:
                    return

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the counters."""
        active_threads, active_reason = self._team.active()
        return WorkerStatistics(
            name="cpu",
            kernels=FORM.value,
            n_threads=self._team.n_threads,
            active_threads=active_threads,
            active_reason=active_reason,
            **attrs.asdict(self._counters),
        )

    async def _start(self, job: Job) -> None:
        """Build the job's program and let it run, unless it has no steps."""
        forward, program = self._open_forward(), self._program
        program.clear()
        for operation in job.operations:
            match operation:
                case RunExperts(layer, experts):
                    forward.run_experts(program, layer, experts)
                    self._counters.expert_runs += len(experts) - [e.stage for e in experts].count(Stage.INNER)
                case RunResident(layer, addresses, reads):
                    forward.run_resident(program, layer, addresses, reads)
                case RunShared(layer):
                    forward.run_shared(program, layer)
                case Combine(layer):
                    forward.combine(program, layer)
                case Advance(to, predict):
                    forward.advance(program, to, predict=predict)
                case Begin(batch):
                    if len(batch.tokens) > _INLINE_TOKENS:
                        await trio.to_thread.run_sync(forward.begin, batch)
                    else:
                        forward.begin(batch)
                    self._counters.tokens += len(batch.tokens)
                case WriteBlocks(blocks, data):
                    await trio.to_thread.run_sync(self._write_blocks, blocks, data)
                case ReadBlocks():
                    pass
        if program.length:
            self._team.start(program, forward.threads)

    def _write_blocks(self, blocks: tuple[int, ...], data: tuple[Uint8Array, ...]) -> None:
        for block, content in zip(blocks, data, strict=True):
            self._open_forward().write_block(block, content)

    def _open_forward(self) -> Arithmetic:
        if self._forward is None:
            raise RuntimeError("the worker is closed")
        return self._forward

    async def _collect(self, job: Job, begun: float) -> Done:
        """Return what a job gave, copied in a thread if it is much."""
        forward = self._open_forward()
        last = any(isinstance(it, Advance) and it.to == forward.n_routed for it in job.operations)
        if last and forward.n_logits > _INLINE_LOGITS:
            return await trio.to_thread.run_sync(self._done, job, begun)
        return self._done(job, begun)

    def _done(self, job: Job, begun: float) -> Done:
        """Collect what the job's operations ask for, once its program has finished."""
        forward = self._open_forward()
        ids = predicted = routes = logits = damaged = None
        kv: tuple[Uint8Array, ...] | None = None
        through, waited_s = True, 0.0
        for operation in job.operations:
            match operation:
                case Advance(to) if to < forward.n_routed:
                    ids, predicted, damaged = forward.routed(), forward.predicted(), forward.damaged()
                case RunResident(reads=reads):
                    waited_s = 0.0 if reads is None else reads.waited_s
                    routes, through = forward.routes()
                    layers = (routes if through else routes[:-1]).reshape(-1, routes[0].size).tolist()
                    self._counters.expert_runs += sum(len(set(experts)) for experts in layers)
                case Advance() if through:
                    logits, damaged = forward.logits(), forward.damaged()
                case ReadBlocks(blocks):
                    kv = tuple(forward.read_block(block) for block in blocks)
                case _:
                    pass
        return Done(
            expert_ids=ids,
            predicted_ids=predicted,
            routes=routes,
            logits=logits,
            damaged=damaged,
            kv=kv,
            compute_s=time.perf_counter() - begun - waited_s,
        )
