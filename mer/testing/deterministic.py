"""Runs of trio that are a function of a seed: a simulated clock, and a scheduler whose order of tasks is drawn."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import trio
from trio._core import _run
from trio.testing import MockClock

from mer.testing.hangs import Deadlock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@contextmanager
def seeded_schedule(seed: int) -> Iterator[None]:
    """Let trio draw from `seed` in which order tasks run that can run at once, for the runs within the block.

    trio shuffles every batch of runnable tasks. Within the block the batch is sorted by the age of its tasks before,
    and the shuffle is seeded, as trio itself has it under hypothesis. Before and after, everything is as it was.

    What is reproduced is the order of tasks. Code that looks at the wall clock, at `id()`, at the order of a set, or
    that waits for a thread, is as irreproducible as ever.
    """
    module = vars(_run)
    sorts, state = module["_ALLOW_DETERMINISTIC_SCHEDULING"], _run._r.getstate()
    module["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    _run._r.seed(seed)
    try:
        yield
    finally:
        module["_ALLOW_DETERMINISTIC_SCHEDULING"] = sorts
        _run._r.setstate(state)


def run_seeded(async_fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, seed: int = 0) -> T:
    """Run `async_fn(*args)` in a separate `trio.run`, its clock simulated and its order of tasks drawn from `seed`.

    The clock jumps to the next deadline as soon as no task can run, so that hours pass in milliseconds. A run in which
    no deadline comes either is ended. Timers that go on for ever are not a deadlock: bound these with `fail_after`.

    Raises:
        AssertionError: every task waits for another one; it says which for what, and how to let a simulated fault go
            on. Tasks that wait for threads of trio or for file descriptors are waited for.
    """

    async def main() -> T:
        with trio.CancelScope() as scope:
            deadlock = Deadlock(scope)
            trio.lowlevel.add_instrument(deadlock)
            try:
                return await async_fn(*args)
            except Exception as error:
                if deadlock.text is None:
                    raise
                raise AssertionError(f"nothing can go on any more:{deadlock.text}") from error
            finally:
                trio.lowlevel.remove_instrument(deadlock)
        raise AssertionError(f"nothing can go on any more:{deadlock.text}")

    with seeded_schedule(seed):
        return trio.run(main, clock=MockClock(autojump_threshold=0))
