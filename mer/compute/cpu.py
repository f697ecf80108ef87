"""The CPU worker: programs of kernel steps, built in the trio thread and run by persistent threads outside the GIL."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

import attrs
import numpy as np
import trio

from mer.compute.forward import Forward
from mer.compute.kernels.runtime import (
    CROWDED_NS,
    FINISHED,
    JOINED,
    LINE_BYTES,
    LINES,
    MAX_THREADS,
    PROGRAMS,
    TEAM,
    control_bytes,
    follow,
    prepare,
    start,
    stop,
)
from mer.compute.kernels.target import FORM
from mer.compute.program import Memory, Program
from mer.compute.worker import (
    Attend,
    Begin,
    Combine,
    Done,
    Job,
    JobCounters,
    Project,
    ReadBlocks,
    RunExperts,
    RunResident,
    Stage,
    Uint8Array,
    WorkerStatistics,
    WriteBlocks,
)
from mer.errors import ComputeError, ConfigError, MerError
from mer.threads import start_thread

_INLINE_TOKENS = 16  # a larger batch is taken over in a thread of trio's, so that the event loop goes on meanwhile


logger = logging.getLogger(__name__)
_left: list[object] = []  # what threads that cannot be ended work with
_PATIENCE_S = 0.2  # for such a thread


class Team:
    """Threads that run programs together.

    Raises:
        ConfigError: there are more threads than a program can have.
    """

    def __init__(self, n_threads: int) -> None:
        if n_threads > MAX_THREADS:
            raise ConfigError(f"{n_threads} compute threads; at most {MAX_THREADS} can run a program together")
        self.n_threads = n_threads
        self._control = Memory(control_bytes(n_threads))
        self._threads: list[threading.Thread] = []
        self._finished = -1  # eventfd
        self._running = False
        self.failure = ""  # why a thread has ended by itself: programs would never finish

    def open(self) -> None:
        """Start the threads.

        Raises:
            ConfigError: the system refuses a thread or a descriptor.
        """
        control = self._control.address
        try:
            self._finished = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"the system refuses a descriptor for the compute threads ({error.strerror}); raise the limit on open "
                "files (ulimit -n)"
            ) from error
        prepare(control, self.n_threads)
        self._control.view(control + FINISHED, 8).view("q")[0] = self._finished
        try:
            for number in range(self.n_threads):
                self._threads.append(start_thread(self._follow, control, number, name=f"mer-cpu-{number}"))
        except RuntimeError as error:
            started = len(self._threads)
            self.close()
            raise ConfigError(
                f"the system refuses compute thread {started + 1} of {self.n_threads} ({error}); "
                "use fewer threads or raise the limit on processes (ulimit -u)"
            ) from error

    def _follow(self, control: int, number: int) -> None:
        """Run programs until stopped; whoever waits hears of a thread that ends before."""
        try:
            follow(control, number, self.n_threads)
        except Exception as error:
            logger.exception("a compute thread has died")
            self.failure = self.failure or f"compute thread {number} died: {type(error).__name__}: {error}"
            os.eventfd_write(self._finished, 1)

    def start(self, program: Program, n_threads: int | None = None) -> None:
        """Let the threads run a program; it must stay as it is until `wait` or `block`, one of which must follow.

        Args:
            program: the program, of at least one row.
            n_threads: how many of the threads take part; by default all.

        Raises:
            ComputeError: a thread has died.
        """
        self._check()
        self._running = True
        start(self._control.address, program.address, program.length, n_threads or self.n_threads)

    def active(self) -> tuple[int, str]:
        """Return how many threads took part in the last program, and why so many."""
        read = self._word
        team, programs = read(TEAM), read(PROGRAMS)
        if programs == 0:
            return 0, "nothing has been computed yet"
        joined = sum(read(LINES + LINE_BYTES * number + JOINED) == programs for number in range(self.n_threads))
        if joined < team and read(CROWDED_NS) > time.monotonic_ns():
            return joined, "others have the cores"
        if joined < team:
            return joined, "the last job ended before the others began"
        if team < self.n_threads:
            return joined, f"a batch this small has no work for all {self.n_threads}"
        return joined, "all of them"

    def _word(self, offset: int) -> int:
        return int(self._control.view(self._control.address + offset, 8).view(np.int64)[0])

    async def wait(self) -> None:
        """Wait until the program has finished; if cancelled, it goes on.

        Raises:
            ComputeError: a thread has died, so that it never will.
        """
        await trio.lowlevel.wait_readable(self._finished)
        self.block()

    def block(self) -> None:
        """Block until the program that was started last has finished, if there is one that has not."""
        if self._running:
            os.read(self._finished, 8)
            self._running = False
            self._check()

    def _check(self) -> None:
        if self.failure:
            raise ComputeError(self.failure)

    def close(self) -> None:
        """Stop the threads once a program that is running has finished. Closing twice is allowed."""
        if self._finished < 0:
            return
        with contextlib.suppress(ComputeError):
            self.block()
        stop(self._control.address)
        for thread in self._threads:
            thread.join(_PATIENCE_S if self.failure else None)
        if any(thread.is_alive() for thread in self._threads):  # at a barrier that the dead one does not come to
            _left.append(self)
            self._finished = -1
            return
        self._threads = []
        os.close(self._finished)
        self._finished = -1


class CPUWorker:
    """Runs jobs on `n_threads` threads.

    Use it as an async-free context: `start_threads`, then `run` in a nursery, then `close`. A job that has begun is
    finished even if `run` is cancelled; `close` waits for it, at most the time of one job.

    Args:
        forward: the model's arithmetic; the worker's own from here on.
        n_threads: threads that compute.
    """

    def __init__(self, forward: Forward, n_threads: int) -> None:
        self._forward: Forward | None = forward  # None once closed, as weights, KV and scratch are its
        self.staged_pairs = forward.staged_pairs  # see `ComputeWorker`
        self.resident_rows = forward.resident_rows  # see `ComputeWorker`
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
            _left.append((self._forward, self._program))
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
                    done = self._done(job, begun)
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
                case Combine():
                    forward.combine(program)
                case Attend(layer, predict):
                    forward.attend(program, layer, predict=predict)
                case Begin(batch):
                    if len(batch.tokens) > _INLINE_TOKENS:
                        await trio.to_thread.run_sync(forward.begin, batch)
                    else:
                        forward.begin(batch)
                    self._counters.tokens += len(batch.tokens)
                case Project():
                    forward.project(program)
                case WriteBlocks(blocks, data):
                    await trio.to_thread.run_sync(self._write_blocks, blocks, data)
                case ReadBlocks():
                    pass
        if program.length:
            self._team.start(program, forward.threads)

    def _write_blocks(self, blocks: tuple[int, ...], data: tuple[Uint8Array, ...]) -> None:
        for block, content in zip(blocks, data, strict=True):
            self._open_forward().write_block(block, content)

    def _open_forward(self) -> Forward:
        if self._forward is None:
            raise RuntimeError("the worker is closed")
        return self._forward

    def _done(self, job: Job, begun: float) -> Done:
        """Collect what the job's operations ask for, once its program has finished."""
        forward = self._open_forward()
        ids = predicted = routes = logits = damaged = None
        kv: tuple[Uint8Array, ...] | None = None
        through, waited_s = True, 0.0
        for operation in job.operations:
            match operation:
                case Attend():
                    ids, predicted, damaged = forward.routed(), forward.predicted(), forward.damaged()
                case RunResident(reads=reads):
                    waited_s = 0.0 if reads is None else reads.waited_s
                    routes, through = forward.routes()
                    layers = (routes if through else routes[:-1]).reshape(-1, routes[0].size).tolist()
                    self._counters.expert_runs += sum(len(set(experts)) for experts in layers)
                case Project() if through:
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
