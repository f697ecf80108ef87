"""State machines of hypothesis whose rules wait: each example is one run of trio on a simulated clock.

class PoolMachine(TrioStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(3)

    @rule(n=st.integers(1, 3))
    def lease(self, n: int) -> None:
        self.start(self.pool.lease, n)
        self.settle()

test_pool = machine_test(PoolMachine)
"""

from __future__ import annotations

import functools
import unittest
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any, ClassVar, Generic, TypeVar, TypeVarTuple

import attrs
import greenback
import trio
from hypothesis import HealthCheck, Phase
from hypothesis import settings as Settings
from hypothesis import strategies as st
from hypothesis.errors import StopTest, UnsatisfiedAssumption
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test
from trio.testing import wait_all_tasks_blocked

from mer.testing.deterministic import run_seeded
from mer.testing.hangs import fail_after

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_nursery: ContextVar[trio.Nursery] = ContextVar("nursery")


@attrs.define(eq=False)
class StartedTask(Generic[T]):
    """A task of a machine, and what became of it."""

    name: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, repr=False)
    result: T | None = None  # what it returned
    error: Exception | None = None  # what it raised, of the kinds that were expected
    finished: bool = False  # returned
    cancelled: bool = False  # stopped by its scope

    @property
    def done(self) -> bool:
        """Whether it has returned, was cancelled or has raised an expected error."""
        return self.finished or self.cancelled or self.error is not None

    def cancel(self) -> None:
        """Cancel it; it stops at its next checkpoint, see `TrioStateMachine.settle`."""
        self.scope.cancel()


class TrioStateMachine(RuleBasedStateMachine):
    """A RuleBasedStateMachine whose rules and invariants may wait with `await_` and start tasks with `start`.

    Rules stay plain functions. Each example runs in a separate `trio.run`, whose clock jumps ahead when nothing can
    run, and whose order of tasks is part of the example: hypothesis draws it, shrinks it and replays it. A task that
    raises what nobody expected fails the example. So does a wait that takes longer than `patience_s`: a deadlock shows
    as trio.TooSlowError, which says who waits for what. What still runs after `teardown` is cancelled.

    A machine is run by `run_machine`, by the test function `machine_test` makes of it, or by its `TestCase`.
    """

    patience_s: ClassVar[float] = 3600.0
    """How long, on the simulated clock, one `await_` may take."""

    def __init__(self) -> None:
        super().__init__()
        try:
            self.nursery = _nursery.get()
        except LookupError:
            raise RuntimeError(
                f"{type(self).__name__} needs trio: run it with run_machine, machine_test or its TestCase"
            ) from None

    def await_(self, awaitable: Awaitable[T]) -> T:
        """Wait for something and return what it gives.

        Raises:
            trio.TooSlowError: it took longer than `patience_s`; see `fail_after`.
        """
        with fail_after(self.patience_s):
            return greenback.await_(awaitable)

    def settle(self) -> None:
        """Let every task run until it waits for time, for another task or for ever; no time passes."""
        self.await_(wait_all_tasks_blocked())

    def sleep(self, seconds: float) -> None:
        """Let time pass on the simulated clock."""
        self.await_(trio.sleep(seconds))  # noqa: ASYNC105

    def start(
        self,
        async_fn: Callable[[*Ts], Awaitable[T]],
        *args: *Ts,
        expected: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> StartedTask[T]:
        """Start a task; it has not run yet when this returns.

        Tasks started without a `settle` between run in an order that is drawn.

        Args:
            async_fn: what to run.
            args: its arguments.
            expected: kinds of exceptions that are kept in the task's `error`; any other one fails the example.
        """
        task: StartedTask[T] = StartedTask(getattr(async_fn, "__qualname__", repr(async_fn)))

        async def run() -> None:
            with task.scope:
                try:
                    task.result = await async_fn(*args)
                except expected as error:
                    task.error = error
                else:
                    task.finished = True
            task.cancelled = task.scope.cancelled_caught

        self.nursery.start_soon(run, name=task.name)
        return task

    def enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter an asynchronous context manager that is left, cancelled, when the example ends, and return its value.

        It is entered in a separate task, so that the scopes and nurseries of several may overlap.
        """

        async def run(*, task_status: trio.TaskStatus[T]) -> None:
            async with manager as value:
                task_status.started(value)
                await trio.sleep_forever()

        entered: T = self.await_(self.nursery.start(run))
        return entered

    @classmethod
    @functools.cache
    def _to_test_case(cls) -> Any:
        """Return what `TestCase` gives: a unittest.TestCase with a class attribute `settings`."""

        class MachineTestCase(unittest.TestCase):
            settings = MACHINE_SETTINGS

            def runTest(self) -> None:
                run_machine(cls, type(self).settings)

        MachineTestCase.__name__ = MachineTestCase.__qualname__ = f"{cls.__name__}.TestCase"
        MachineTestCase.__module__ = cls.__module__
        return MachineTestCase


MACHINE_SETTINGS = Settings(
    deadline=None,
    suppress_health_check=list(set(HealthCheck) - {HealthCheck.nested_given}),
    phases=tuple(phase for phase in Phase if phase is not Phase.explain),
)
"""What machines are run with by default, and good for all tests of simulated engines: neither a deadline nor an
explanation of failures, which traces every line and makes shrinking take seven times as long. Hypofuzz leaves alone
what may be nested."""


def machine_test(machine: type[TrioStateMachine], settings: Settings | None = None) -> Callable[[], None]:
    """Return a test function that runs a machine; pytest collects it, and hypofuzz finds it.

    Args:
        machine: its class.
        settings: of hypothesis; by default the profile's, with neither deadline nor most health checks.
    """
    test = get_state_machine_test(machine, settings=MACHINE_SETTINGS if settings is None else settings)
    hypothesis: Any = vars(test)["hypothesis"]
    hypothesis.inner_test = _in_trio(hypothesis.inner_test)
    test.__name__ = test.__qualname__ = f"test_{machine.__name__}"
    test.__module__ = machine.__module__
    test.__doc__ = machine.__doc__
    return test


def run_machine(machine: type[TrioStateMachine], settings: Settings | None = None) -> None:
    """Run a machine as a test; see `machine_test`.

    Raises:
        BaseException: what a rule, an invariant or a task raised in the smallest example that was found. Of several
            at once, out of their groups, it is the first AssertionError, or the first.
    """
    machine_test(machine, settings)()


def _in_trio(inner: Callable[..., None]) -> Callable[..., None]:
    """Return the body of a state machine's test, run in trio."""

    @functools.wraps(inner)
    def run(data: st.DataObject) -> None:
        async def main() -> None:
            await greenback.ensure_portal()
            async with trio.open_nursery() as nursery:
                _nursery.set(nursery)
                inner(data)
                nursery.cancel_scope.cancel()

        failure = None
        try:
            run_seeded(main, seed=data.draw(st.integers(0, 2**16 - 1), label="order of tasks"))
        except BaseException as error:  # noqa: ASYNC103
            failure = min(_leaves(error), key=_rank)
        if failure is not None:  # outside of the except block: a failure with another context is another failure, and
            raise failure  # hypothesis would shrink it for ever

    return run


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the exceptions in a group of groups, in order."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _rank(error: BaseException) -> int:
    """Return which of several exceptions is told: hypothesis' own, then what was asserted, then what came of it."""
    if isinstance(error, KeyboardInterrupt | StopTest):
        return 0
    return 3 if isinstance(error, UnsatisfiedAssumption) else 2 - isinstance(error, AssertionError)
