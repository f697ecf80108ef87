"""The CPU worker: persistent threads that run programs of kernel steps outside the GIL."""

from __future__ import annotations

import queue
import threading
import time

import attrs
import trio

from mer.compute.forward import Forward
from mer.compute.kernels.runtime import CONTROL_BYTES, follow, lead, stop
from mer.compute.kernels.target import FORM
from mer.compute.program import Memory, Program
from mer.compute.worker import (
    Attend,
    Begin,
    Combine,
    Done,
    Job,
    Project,
    ReadBlocks,
    RunExperts,
    Stage,
    Uint8Array,
    WorkerStatistics,
    WriteBlocks,
)
from mer.errors import ComputeError, ConfigError, MerError
from mer.threads import start_thread


@attrs.define
class _Counters:
    jobs: int = 0
    tokens: int = 0
    expert_runs: int = 0
    compute_s: float = 0.0


class CPUWorker:
    """Runs jobs on `n_threads` threads: a leader that builds programs, and followers that only run them.

    Use it as an async-free context: `start_threads`, then `run` in a nursery, then `close`. A job that has begun is
    finished even if `run` is cancelled; `close` waits for it, at most the time of one job.

    Args:
        forward: the model's arithmetic; the worker's own from here on.
        n_threads: threads that compute, the leader included.
    """

    def __init__(self, forward: Forward, n_threads: int) -> None:
        self._forward = forward
        self._n_threads = n_threads
        self._program = Program()
        self._control = Memory(CONTROL_BYTES)
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []  # followers
        self._leader: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._finished: trio.Event | None = None
        self._done = Done()
        self._counters = _Counters()
        self.jobs, self._jobs = trio.open_memory_channel[Job](1)
        self._results, self.results = trio.open_memory_channel[Done](1)

    @property
    def staged_pairs(self) -> int:
        """See `ComputeWorker`."""
        return self._forward.staged_pairs

    def start_threads(self) -> None:
        """Start the threads, in the trio thread.

        Raises:
            ConfigError: the system refuses a thread.
        """
        self._token = trio.lowlevel.current_trio_token()
        control = self._control.address
        try:
            for number in range(1, self._n_threads):
                arguments = (control, number, self._n_threads)
                self._threads.append(start_thread(follow, *arguments, name=f"mer-cpu-{number}"))
            self._leader = start_thread(self._lead, name="mer-cpu-0")
        except RuntimeError as error:
            started = len(self._threads)
            self.close()
            raise ConfigError(
                f"the system refuses compute thread {started + 1} of {self._n_threads} ({error}); "
                "use fewer threads or raise the limit on processes (ulimit -u)"
            ) from error

    def close(self) -> None:
        """Stop the threads once a job that is running has finished. Closing twice is allowed."""
        self._inbox.put(None)
        if self._leader is not None:
            self._leader.join()
        stop(self._control.address)  # without their leader the followers are idle
        for thread in self._threads:
            thread.join()
        self._threads = []

    async def run(self) -> None:
        """Serve jobs in order until the job channel is closed or the task is cancelled."""
        with self._results:
            async for job in self._jobs:
                self._finished = trio.Event()
                self._inbox.put(job)
                await self._finished.wait()
                await self._results.send(self._done)

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the counters."""
        return WorkerStatistics(
            name="cpu", kernels=FORM.value, n_threads=self._n_threads, **attrs.asdict(self._counters)
        )

    def _lead(self) -> None:
        """Body of the leader's thread."""
        while (job := self._inbox.get()) is not None:
            begun = time.perf_counter()
            try:
                done = self._run_job(job)
            except MerError as error:
                done = Done(error=error)
            except Exception as error:
                failure = ComputeError(f"a compute job failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                done = Done(error=failure)
            done = attrs.evolve(done, compute_s=time.perf_counter() - begun)
            try:
                assert self._token is not None
                self._token.run_sync_soon(self._deliver, done)
            except trio.RunFinishedError:
                return

    def _deliver(self, done: Done) -> None:
        """Hand a result to `run`, in the trio thread."""
        self._counters.jobs += 1
        self._counters.compute_s += done.compute_s
        self._done = done
        assert self._finished is not None
        self._finished.set()

    def _run_job(self, job: Job) -> Done:
        """Build and run the job's program; in the leader's thread."""
        forward, program = self._forward, self._program
        program.clear()
        attended = projected = False
        kv: tuple[Uint8Array, ...] | None = None
        for operation in job.operations:
            match operation:
                case Begin(batch):
                    forward.begin(batch)
                    self._counters.tokens += len(batch.tokens)
                case Attend(layer, predict):
                    forward.attend(program, layer, predict=predict)
                    attended = True
                case RunExperts(layer, experts):
                    forward.run_experts(program, layer, experts)
                    self._counters.expert_runs += sum(e.stage is not Stage.INNER for e in experts)
                case Combine():
                    forward.combine(program)
                case Project():
                    forward.project(program)
                    projected = True
                case ReadBlocks(blocks):
                    kv = tuple(forward.read_block(block) for block in blocks)
                case WriteBlocks(blocks, data):
                    for block, content in zip(blocks, data, strict=True):
                        forward.write_block(block, content)
        if program.length:
            lead(self._control.address, program.rows.ctypes.data, program.length, self._n_threads)
        damaged = forward.damaged() if attended or projected else None
        return Done(
            expert_ids=forward.routed() if attended else None,
            predicted_ids=forward.predicted() if attended else None,
            logits=forward.logits() if projected else None,
            damaged=damaged,
            kv=kv,
        )
