"""The CPU worker's channels, errors and ends, on arithmetic that does as it is told."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import trio

from mer.compute.cpu import team
from mer.compute.cpu import worker as worker_module
from mer.compute.cpu.forward import Forward
from mer.compute.cpu.program import Memory, Program
from mer.compute.cpu.team import Team
from mer.compute.cpu.worker import CPUWorker
from mer.compute.kernels.runtime import follow
from mer.compute.kernels.step import Step
from mer.compute.kernels.target import FORM
from mer.compute.messages import Advance, Batch, Begin, Combine, ComputeWorker, Done, Job
from mer.errors import ComputeError, ConfigError, NumericsError
from tests._lib.steps import row_of
from tests.compute.kernels.test_runtime import count, hold_first

_STEP = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class Callback:
    """A step that calls a function of Python, on whichever of the worker's threads comes to it first."""

    def __init__(self, act: Callable[[], None]) -> None:
        calls = itertools.count()
        self._function = _STEP(lambda _row, _thread, _n_threads: act() if next(calls) == 0 else None)
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value


class Script:
    """Stands in for `Forward`: calls `build` with each layer that is attended, and `act` when its program runs."""

    staged_pairs = 3
    resident_rows = 0
    n_routed = 100
    shared_layers: frozenset[int] = frozenset()
    threads = 2
    n_logits = 3

    def __init__(
        self, act: Callable[[int], None] = lambda layer: None, build: Callable[[int], None] = lambda layer: None
    ) -> None:
        self._act, self._build = act, build
        self._steps: list[Callback] = []
        self.layers: list[int] = []
        self.begun_in: list[threading.Thread] = []
        self.copied_in: list[threading.Thread] = []

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self.begun_in.append(threading.current_thread())

    def advance(self, program: Program, layer: int, *, predict: bool = False) -> None:
        if layer == self.n_routed:
            return
        self._build(layer)

        def act() -> None:
            self._act(layer)
            self.layers.append(layer)

        self._steps.append(Callback(act))
        program.add((cast(Step, self._steps[-1]),))

    def damaged(self) -> Any:
        return np.zeros(0, np.int32)

    def routed(self) -> Any:
        return np.array([[self.layers[-1]]], np.int32)

    def predicted(self) -> None:
        pass

    def combine(self, _program: Program, _layer: int) -> None:
        pass

    def project(self, _program: Program) -> None:
        pass

    def logits(self) -> Any:
        self.copied_in.append(threading.current_thread())
        return np.zeros((1, 3), np.float32)


def some_batch(n: int = 1) -> Batch:
    zeros = np.zeros(n, np.int32)
    return Batch(zeros, zeros, zeros, np.zeros((1, 1), np.int32), zeros[:1])


@asynccontextmanager
async def working(script: Script, n_threads: int = 2) -> AsyncIterator[CPUWorker]:
    """Run a worker; it and its threads have ended afterwards."""
    worker = CPUWorker(cast(Forward, script), n_threads)
    assert isinstance(worker, ComputeWorker)
    worker.start_threads()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("mer-cpu-")]
    assert sorted(thread.name for thread in threads) == [f"mer-cpu-{number}" for number in range(n_threads)]
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            yield worker
            nursery.cancel_scope.cancel()
    finally:
        worker.close()
        assert not any(thread.is_alive() for thread in threads)


def test_a_team_says_how_many_threads_took_part_and_why() -> None:
    room = Memory(64)
    program, both = Program(), Program()
    program.add(row_of(count, room.address, 1))
    both.add(row_of(hold_first, room.address + 8, 2))  # takes two threads
    team = Team(3)
    assert team.active() == (0, "nothing has been computed yet")
    team.open()
    try:
        for n_threads, run, want in (
            (1, program, (1, "a batch this small has no work for all 3")),
            (2, both, (2, "a batch this small has no work for all 3")),
        ):
            team.start(run, n_threads)
            team.block()
            assert team.active() == want
        team.start(program)
        team.block()
        joined, why = team.active()
        assert (joined == 3) == (why == "all of them")
    finally:
        team.close()


@pytest.mark.parametrize("n_threads", [1, 3])
async def test_results_come_in_the_order_of_the_jobs(n_threads: int) -> None:
    script = Script()
    async with working(script, n_threads) as worker, trio.open_nursery() as nursery:

        async def send() -> None:
            for layer in range(50):
                await worker.jobs.send(Job((Begin(some_batch(2)), Advance(layer))))

        nursery.start_soon(send)
        for layer in range(50):
            done = await worker.results.receive()
            assert done.error is None
            assert done.expert_ids is not None
            assert done.expert_ids.tolist() == [[layer]]
            assert done.logits is None
            assert done.compute_s >= 0
    statistics = worker.statistics()
    assert (statistics.jobs, statistics.tokens, statistics.n_threads) == (50, 100, n_threads)
    assert (statistics.name, statistics.kernels) == ("cpu", FORM.value)
    assert statistics.compute_s > 0


async def test_a_job_answers_what_its_operations_ask_for() -> None:
    async with working(Script()) as worker:
        await worker.jobs.send(Job((Begin(some_batch()),)))
        done = await worker.results.receive()
        assert (done.expert_ids, done.logits, done.damaged) == (None, None, None)
        await worker.jobs.send(Job((Combine(0), Advance(100))))
        done = await worker.results.receive()
        assert done.expert_ids is None
        assert done.logits is not None
        assert done.logits.shape == (1, 3)
        assert done.damaged is not None


async def test_many_logits_are_copied_outside_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    async with working(script) as worker:
        for most in (3, 2):
            monkeypatch.setattr(worker_module, "_INLINE_LOGITS", most)
            await worker.jobs.send(Job((Begin(some_batch()), Advance(100))))
            done = await worker.results.receive()
            assert done.logits is not None
            assert done.logits.shape == (1, 3)
    assert [thread is threading.main_thread() for thread in script.copied_in] == [True, False]


async def test_an_error_comes_back_with_its_job_and_the_worker_goes_on() -> None:
    def act(layer: int) -> None:
        if layer == 1:
            raise NumericsError("row 3 is not finite")
        if layer == 2:
            raise ZeroDivisionError("by zero")
        if layer == 3:
            raise MemoryError

    async with working(Script(build=act)) as worker:
        results: list[Done] = []
        for layer in range(5):
            await worker.jobs.send(Job((Begin(some_batch()), Advance(layer))))
            results.append(await worker.results.receive())
    errors = [done.error for done in results]
    assert errors[0] is None
    assert isinstance(errors[1], NumericsError)
    assert str(errors[1]) == "row 3 is not finite"
    assert isinstance(errors[2], ComputeError)
    assert str(errors[2]) == "a compute job failed: ZeroDivisionError: by zero"
    assert isinstance(errors[2].__cause__, ZeroDivisionError)
    assert isinstance(errors[3], ComputeError)
    assert isinstance(errors[3].__cause__, MemoryError)
    assert errors[4] is None
    assert all(done.expert_ids is None for done in results[1:4])


@pytest.mark.parametrize(("n_tokens", "inline"), [(1, True), (16, True), (17, False), (500, False)])
async def test_a_large_batch_is_taken_over_outside_the_trio_thread(n_tokens: int, inline: bool) -> None:
    script = Script()
    async with working(script) as worker:
        await worker.jobs.send(Job((Begin(some_batch(n_tokens)), Advance(0))))
        assert (await worker.results.receive()).error is None
    assert (script.begun_in[0] is threading.current_thread()) == inline


async def test_the_event_loop_goes_on_while_a_job_runs() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def act(_layer: int) -> None:
        begun.set()
        assert go_on.wait(60)

    async with working(Script(act)) as worker:
        await worker.jobs.send(Job((Begin(some_batch()), Advance(3))))
        await trio.to_thread.run_sync(begun.wait)
        with pytest.raises(trio.WouldBlock):
            worker.results.receive_nowait()
        go_on.set()
        done = await worker.results.receive()
        assert done.expert_ids is not None
        assert done.expert_ids.tolist() == [[3]]


async def test_run_ends_when_the_job_channel_is_closed() -> None:
    worker = CPUWorker(cast(Forward, Script()), 2)
    worker.start_threads()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await worker.jobs.send(Job((Begin(some_batch()),)))
        await worker.results.receive()
        worker.jobs.close()
    with pytest.raises(trio.EndOfChannel):
        await worker.results.receive()
    worker.close()
    worker.close()  # closing twice is allowed


async def test_cancelling_run_lets_the_job_end_and_close_waits_for_it() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def act(_layer: int) -> None:
        begun.set()
        assert go_on.wait(60)

    script = Script(act)
    worker = CPUWorker(cast(Forward, script), 3)
    worker.start_threads()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await worker.jobs.send(Job((Begin(some_batch()), Advance(0))))
        await trio.to_thread.run_sync(begun.wait)
        nursery.cancel_scope.cancel()
    assert script.layers == []  # the nursery has ended, the job has not
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, worker.close)
        await trio.testing.wait_all_tasks_blocked()
        assert any(thread.name == "mer-cpu-0" for thread in threading.enumerate())
        go_on.set()
    assert script.layers == [0]
    assert not any(thread.name.startswith("mer-cpu-") for thread in threading.enumerate())


def test_a_job_that_outlives_the_event_loop_ends_its_threads() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def act(_layer: int) -> None:
        begun.set()
        assert go_on.wait(60)

    worker = CPUWorker(cast(Forward, Script(act)), 2)

    async def main() -> None:
        worker.start_threads()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            await worker.jobs.send(Job((Begin(some_batch()), Advance(0))))
            await trio.to_thread.run_sync(begun.wait)
            nursery.cancel_scope.cancel()

    trio.run(main)
    go_on.set()
    worker.close()
    assert not any(thread.name.startswith("mer-cpu-") for thread in threading.enumerate())


async def test_a_worker_that_never_ran_can_be_closed() -> None:
    CPUWorker(cast(Forward, Script()), 2).close()
    worker = CPUWorker(cast(Forward, Script()), 2)
    worker.start_threads()
    worker.close()
    assert not any(thread.name.startswith("mer-cpu-") for thread in threading.enumerate())


@pytest.mark.parametrize("refused", [1, 2, 3])
async def test_a_thread_that_the_system_refuses_is_an_error_and_leaves_none_behind(
    refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith("mer-cpu-"):
            started.append(thread)
            if len(started) == refused:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    worker = CPUWorker(cast(Forward, Script()), 3)
    with pytest.raises(ConfigError, match=rf"refuses compute thread {refused} of 3 .*use fewer threads"):
        worker.start_threads()
    assert not any(thread.is_alive() for thread in started)


@pytest.mark.parametrize("when", ["before a job", "in a job"])
async def test_a_thread_that_dies_ends_the_worker_with_its_reason(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The thread's part of the job is never done: nobody may wait for it."""
    release, started = threading.Event(), threading.Event()

    def dying(control: int, number: int, n_threads: int) -> None:
        if number == 1:
            if when == "in a job":
                release.wait()
            else:
                started.wait()
            raise MemoryError("for the test")
        follow(control, number, n_threads)

    monkeypatch.setattr(team, "follow", dying)
    worker = CPUWorker(cast(Forward, Script(act=lambda _layer: release.set())), 2)
    worker.start_threads()
    dying_thread = next(thread for thread in threading.enumerate() if thread.name == "mer-cpu-1")
    started.set()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            job = Job((Begin(some_batch()), Advance(0), Combine(0)))
            await worker.jobs.send(job)
            done = await worker.results.receive()
            if done.error is None:  # the others have done it all; the next one fails
                await trio.to_thread.run_sync(dying_thread.join)
                await worker.jobs.send(job)
                done = await worker.results.receive()
            assert isinstance(done.error, ComputeError)
            assert "compute thread 1 died: MemoryError: for the test" in str(done.error)
            with pytest.raises(trio.EndOfChannel):
                await worker.results.receive()
        assert "compute thread 1 died" in worker.failure
    finally:
        release.set()
        worker.close()
        worker.close()
