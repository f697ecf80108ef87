"""Cancellation of a task at every one of its steps in turn, with a look at what it left each time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import attrs
import trio

from mer.testing.deterministic import run_seeded

MOST_STEPS = 1000


class _CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when a task, or with None any tasks together, have made a number of steps."""

    def __init__(self, task: trio.lowlevel.Task | None, scope: trio.CancelScope, step: int) -> None:
        self._task = task
        self._scope = scope
        self._step = step
        self._made = 0
        self.fired = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self._task is None or task is self._task:
            self._made += 1
            if self._made == self._step:
                self.fired = True
                self._scope.cancel()


@attrs.define(eq=False)
class Subject:
    """Runs the code under test in one round, and cancels it at this round's step."""

    step: int  # 0: cancelled before it begins
    any_task: bool = False  # steps of all tasks are counted, not of the body's alone
    fired: bool = False  # whether the code made that many steps, so that it was cancelled
    _ran: bool = attrs.field(default=False, init=False)

    async def run(self, body: Callable[[], Awaitable[object]]) -> bool:
        """Run `body` in a separate task and return whether it came to its end instead of being cancelled."""
        assert not self._ran, "one subject to a round"
        self._ran = True
        finished = False

        async def task() -> None:
            nonlocal finished
            with trio.CancelScope() as scope:
                counted = None if self.any_task else trio.lowlevel.current_task()
                instrument = _CancelAtStep(counted, scope, self.step)
                if self.step == 0:
                    self.fired = True
                    scope.cancel()
                trio.lowlevel.add_instrument(instrument)
                try:
                    await body()
                    finished = True
                finally:
                    trio.lowlevel.remove_instrument(instrument)
                    self.fired = self.fired or instrument.fired

        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
        return finished


Scenario: TypeAlias = Callable[[Subject], Awaitable[None]]


def cancel_at_every_step(scenario: Scenario, *, any_task: bool = False, seed: int = 0) -> int:
    """Run `scenario` once for every step of the body it gives its subject, and once more uncancelled.

    A body that waits makes few steps, while others work for it. With `any_task` it is cancelled after every step that
    any task makes during it, so at every point at which somebody else's cancellation can strike.

    Each round is a separate `trio.run` on an autojumping clock, and all have the same order of tasks up to the
    cancellation. So a scenario builds a fresh world, runs its body with `await subject.run(body)`, and asserts that
    nothing was lost. Tasks that wait for ever fail the round, see `run_seeded`.

    Args:
        scenario: one round.
        any_task: count the steps of all tasks.
        seed: of the order of tasks.

    Returns:
        The number of rounds in which the body was cancelled.
    """
    for step in range(MOST_STEPS):
        subject = Subject(step, any_task)
        try:
            run_seeded(scenario, subject, seed=seed)
        except BaseException as error:
            error.add_note(f"cancelled at step {step}")
            raise
        if not subject.fired:
            return step
    raise AssertionError(f"the body makes more than {MOST_STEPS} steps")
