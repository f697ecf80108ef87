"""What hangs says what it waits for, and how to let it go on."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import Phase, find, given, settings
from hypothesis.stateful import rule

import mer.testing.hangs
from mer.errors import ReadTimeout
from mer.testing import (
    MACHINE_SETTINGS,
    SimModel,
    TrioStateMachine,
    disk_faults,
    fail_after,
    open_sim_engine,
    run_machine,
    run_seeded,
)

PROMPT = (5, 6)
Scenario = Callable[[], Awaitable[None]]


def hang_of(scenario: Scenario) -> str:
    """Return what the failure of a scenario says."""
    with pytest.raises((AssertionError, ExceptionGroup)) as caught:
        run_seeded(scenario)
    error: BaseException = caught.value
    while isinstance(error, ExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, AssertionError)
    return str(error)


async def one_hanging_read(let_return: bool) -> None:
    async with open_sim_engine(n_slots=12) as sim:
        for expert in range(sim.model.n_experts):
            sim.break_expert(0, expert, part=1, number=None, times=1)
        with pytest.raises(ReadTimeout):
            await sim.engine.generate(PROMPT, max_tokens=4, ignore_eos=True)
        if let_return:
            sim.disk.heal()
            sim.disk.let_return()
        await sim.check_quiet()


def test_a_read_that_hangs_is_named() -> None:
    told = hang_of(lambda: one_hanging_read(False))
    assert re.search(r"a read of \d+ bytes at \d+ of sim-[01] hangs since [\d.e-]+ s", told)
    assert re.search(r"for (gate|up|down) of expert \d of layer 0", told)
    assert "sim.disk.let_return() ends it" in told
    assert re.search(r"slot \d+ waits for a read that was given up", told)


def test_and_its_remedy_is_one() -> None:
    run_seeded(one_hanging_read, True)


async def frozen() -> None:
    async with open_sim_engine(n_slots=4, read_deadline_s=1e12) as sim:
        sim.disk.freeze()
        with trio.move_on_after(10):
            await sim.engine.generate(PROMPT, max_tokens=4, ignore_eos=True)
        await sim.check_quiet()


def test_a_frozen_disk_is_named() -> None:
    told = hang_of(frozen)
    assert "sim.disk.thaw()" in told
    assert "hangs since" not in told


async def held_job() -> None:
    async with open_sim_engine(n_slots=4) as sim:
        sim.worker.frozen = trio.Event()
        await sim.engine.generate(PROMPT, max_tokens=4, ignore_eos=True)


def test_a_held_job_and_those_who_wait_for_it_are_named() -> None:
    told = hang_of(held_job)
    assert "nothing can go on any more" in told
    assert "sim.worker.frozen.set()" in told
    assert "the sequence with the prompt (5, 6), 0 of 4 tokens generated, is in prefill" in told
    assert re.search(r"test_hangs\.py:\d+ -> \w+\.py:\d+: await sim\.engine\.generate\(PROMPT", told)


async def nobody_reads() -> None:
    async with (
        open_sim_engine(context=128, kv_blocks=64) as sim,
        sim.engine.stream(PROMPT, max_tokens=100, ignore_eos=True) as events,
    ):
        await events.receive()
        await trio.sleep_forever()


def test_a_caller_that_does_not_read_is_named() -> None:
    told = hang_of(nobody_reads)
    assert re.search(r"\d\d of 100 tokens generated, waits for its caller, who does not read", told)
    assert "await trio.sleep_forever()" in told


async def needs_more_blocks() -> None:
    async with open_sim_engine(max_sequences=1, kv_blocks=2) as sim:
        sim.worker.frozen = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(ask, sim.engine)


async def ask(engine: mer.Engine) -> None:
    await engine.generate(PROMPT, max_tokens=4, ignore_eos=True)


def test_a_sequence_in_line_is_named() -> None:
    assert "waits for a place in a batch; 0 of 2 KV blocks are to be had" in hang_of(needs_more_blocks)


def test_a_deadlock_without_an_engine_names_the_tasks() -> None:
    async def first(event: trio.Event) -> None:
        await event.wait()

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, trio.Event())

    told = hang_of(scenario)
    assert re.search(r"task .*first waits at test_hangs\.py:\d+: await event\.wait\(\)", told)


class _EndsTheThread(trio.abc.Instrument):
    """Lets a thread end after so many loops of trio in which nothing happens."""

    def __init__(self, end: threading.Event) -> None:
        self._n_left, self._end = 5000, end

    def before_io_wait(self, timeout: float) -> None:
        self._n_left -= 1
        if not self._n_left:
            self._end.set()


def test_a_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mer.testing.hangs, "_DEADLOCK_S", 0.0)
    end = threading.Event()

    async def scenario() -> str:
        trio.lowlevel.add_instrument(_EndsTheThread(end))
        await trio.to_thread.run_sync(end.wait)
        return "done"

    assert run_seeded(scenario) == "done"


async def test_a_time_limit_tells_of_the_moment_when_it_ended(autojump_clock: object) -> None:
    async with open_sim_engine(n_slots=4) as sim:
        sim.worker.frozen = trio.Event()
        told = r"longer than 100 s:(?s:.*)the sequence with the prompt \(5, 6\)"
        with pytest.raises(trio.TooSlowError, match=told), fail_after(100):
            await ask(sim.engine)
        sim.worker.frozen.set()
        await sim.check_quiet()


async def test_a_time_limit_that_is_kept_is_not_noticed(autojump_clock: object) -> None:
    with fail_after(100):
        await trio.sleep(99)


class Forgetful(TrioStateMachine):
    """Waits for a task that waits for what nobody sets."""

    @rule()
    def wait(self) -> None:
        done = trio.Event()

        async def forget() -> None:
            await trio.Event().wait()
            done.set()

        self.start(forget)
        self.await_(done.wait())


def test_a_machine_names_what_it_waits_for() -> None:
    with pytest.raises(trio.TooSlowError, match=r"forget waits at test_hangs\.py:\d+: await trio\.Event\(\)\.wait"):
        run_machine(Forgetful, settings(MACHINE_SETTINGS, max_examples=3, database=None))


FEW = settings(MACHINE_SETTINGS, max_examples=300, derandomize=True, database=None)


@given(disk_faults(SimModel()))
@settings(FEW, max_examples=100)
def test_reads_that_never_return_are_left_out_unless_asked_for(faults: tuple[object, ...]) -> None:
    assert all(getattr(fault, "errno", 0) is not None for fault in faults)


@pytest.mark.parametrize("times", [1, None])
def test_reads_that_never_return_are_an_option(times: int | None) -> None:
    found = find(
        disk_faults(SimModel(), hanging=True),
        lambda faults: any(fault.errno is None and fault.times == times for fault in faults),
        settings=FEW,
    )
    assert len(found) == 1


def test_no_explanation_is_traced() -> None:
    assert set(Phase) - set(MACHINE_SETTINGS.phases) == {Phase.explain}
