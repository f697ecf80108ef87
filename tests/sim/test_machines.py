"""The state-machine harness: what it finds, how small, and what it raises."""

from __future__ import annotations

import unittest
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest
import trio
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from mer.testing.deterministic import run_seeded
from mer.testing.machines import MACHINE_SETTINGS, StartedTask, TrioStateMachine, machine_test, run_machine

FEW = settings(
    MACHINE_SETTINGS, max_examples=30, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink]
)
NO_SHRINK = settings(FEW, phases=[Phase.generate])


class Counter:
    """Something to test: `up` needs two steps, and `atomic` says whether another task can come between them."""

    def __init__(self, *, atomic: bool) -> None:
        self.value, self._atomic = 0, atomic

    async def up(self) -> int:
        value = self.value
        if not self._atomic:
            await trio.lowlevel.checkpoint()
        self.value = value + 1
        await trio.sleep(1)
        return self.value


class CounterMachine(TrioStateMachine):
    """As many up as were started."""

    atomic = True
    last_steps: list[str]

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter(atomic=self.atomic)
        self.tasks: list[StartedTask[int]] = []
        type(self).last_steps = []

    @rule()
    def start_one(self) -> None:
        self.last_steps.append("start")
        self.tasks.append(self.start(self.counter.up))

    @rule()
    def wait(self) -> None:
        self.last_steps.append("wait")
        self.sleep(1.5)
        assert all(task.done and task.result is not None for task in self.tasks)

    @rule()
    def look(self) -> None:
        self.last_steps.append("look")
        self.settle()
        assert self.counter.value == len(self.tasks)


class RacyMachine(CounterMachine):
    atomic = False


test_counter = machine_test(CounterMachine, FEW)


def test_a_race_is_found_and_shrunk_to_its_smallest() -> None:
    with pytest.raises(AssertionError):
        run_machine(RacyMachine, FEW)
    assert RacyMachine.last_steps == ["start", "start", "look"]


class CrashMachine(TrioStateMachine):
    """Starts tasks that raise."""

    @rule(message=st.sampled_from(["one", "two"]))
    def crash(self, message: str) -> None:
        async def fail() -> None:
            raise OSError(message)

        self.start(fail)

    @rule()
    def wait(self) -> None:
        self.settle()


class ExpectedMachine(CrashMachine):
    @rule()
    def crash_as_expected(self) -> None:
        async def fail() -> None:
            await trio.lowlevel.checkpoint()
            raise KeyError("as expected")

        task = self.start(fail, expected=KeyError)
        self.settle()
        assert task.done
        assert not task.finished
        assert isinstance(task.error, KeyError)

    @rule(message=st.just(""))
    def crash(self, message: str) -> None:
        """Do not."""


def test_an_error_of_a_task_is_raised_as_itself() -> None:
    with pytest.raises(OSError, match="one") as caught:
        run_machine(CrashMachine, FEW)
    assert caught.value.__context__ is None


test_expected = machine_test(ExpectedMachine, FEW)


class DeadlockMachine(TrioStateMachine):
    @rule()
    def wait_for_nobody(self) -> None:
        self.await_(trio.Event().wait())


def test_a_deadlock_is_a_timeout() -> None:
    with pytest.raises(trio.TooSlowError):
        run_machine(DeadlockMachine, FEW)


class OrderMachine(TrioStateMachine):
    """Fails in one of the two orders of two tasks."""

    @rule()
    def two(self) -> None:
        order: list[int] = []

        async def note(number: int) -> None:
            order.append(number)

        for number in (1, 2):
            self.start(note, number)
        self.settle()
        assert tuple(order) == self.fine

    @rule()
    def none(self) -> None:
        """Be no part of the smallest example."""

    fine = (1, 2)


class OtherOrderMachine(OrderMachine):
    fine = (2, 1)


@pytest.mark.parametrize("machine", [OrderMachine, OtherOrderMachine])
def test_the_order_of_tasks_is_drawn(machine: type[OrderMachine]) -> None:
    with pytest.raises(AssertionError):
        run_machine(machine, FEW)


class EnterMachine(TrioStateMachine):
    """What was entered is open during the example and closed after it, and tasks that were started are cancelled."""

    opened: ClassVar[list[int]] = []
    left: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.value = self.enter(self._open(1))
        self.other = self.enter(self._open(2))
        self.forever = self.start(trio.sleep_forever)

    @asynccontextmanager
    async def _open(self, number: int) -> AsyncIterator[int]:
        async with trio.open_nursery() as nursery:
            self.opened.append(number)
            nursery.start_soon(trio.sleep_forever)
            try:
                yield number
            finally:
                self.opened.remove(number)
                self.left.append(number)

    @rule()
    def use(self) -> None:
        self.sleep(1)
        assert (self.value, self.other) == (1, 2)

    @invariant()
    def open_(self) -> None:
        self.settle()
        assert self.opened == [1, 2]
        assert not self.forever.done

    @rule()
    def cancel(self) -> None:
        task = self.start(trio.sleep, 5)
        task.cancel()
        self.settle()
        assert task.cancelled
        assert task.done
        assert not task.finished


def test_entered_managers_are_left() -> None:
    run_machine(EnterMachine, FEW)
    assert EnterMachine.opened == []
    assert sorted(set(EnterMachine.left)) == [1, 2]


def test_unittest_runs_a_machine() -> None:
    case = RacyMachine.TestCase
    assert case is RacyMachine.TestCase
    assert case is not CounterMachine.TestCase
    case.settings = NO_SHRINK
    result = unittest.TestResult()
    case("runTest").run(result)
    assert len(result.failures) == 1


def test_a_machine_needs_trio() -> None:
    with pytest.raises(RuntimeError, match="machine_test"):
        CounterMachine()


def test_a_seed_is_an_order_of_tasks() -> None:
    async def order(n: int) -> tuple[int, ...]:
        order: list[int] = []

        async def note(number: int) -> None:
            await trio.sleep(1)
            order.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(n):
                nursery.start_soon(note, number)
        return tuple(order)

    orders = [run_seeded(order, 4, seed=seed) for seed in range(20)]
    assert orders == [run_seeded(order, 4, seed=seed) for seed in range(20)]
    assert len(set(orders)) > 5
