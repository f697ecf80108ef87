"""Hangs as failures: blocks that take too long and runs in which nothing can happen say who waits for what."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import trio

from mer.testing.waits import report


class _Expiry(trio.abc.Instrument):
    """Takes the report when a scope's deadline has passed and nothing has been cancelled yet."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self.text: str | None = None

    def after_io_wait(self, timeout: float) -> None:
        if self.text is None and trio.current_time() >= self._deadline_s:
            self.text = report()


@contextmanager
def fail_after(seconds: float) -> Iterator[None]:
    """Bound the time of a block as `trio.fail_after` does, with an error that says who waits for what.

    Raises:
        trio.TooSlowError: the block took longer; it lists the reads, fetches, slots and sequences of open simulated
            engines, and all tasks, as they were when time was up, and how to let a simulated fault go on.
    """
    with trio.move_on_after(seconds) as scope:
        instrument = _Expiry(scope.deadline)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(instrument)
    if scope.cancelled_caught:
        raise trio.TooSlowError(f"somebody waits for longer than {seconds:g} s:{instrument.text or report()}")


_LOOKS = 64  # loops of trio between two looks: one of them takes microseconds, and a deadlock spins
_DEADLOCK_S = 0.1  # on the real clock, for what comes from elsewhere


class Deadlock(trio.abc.Instrument):
    """Ends a run in which nothing can happen any more: no task can run, no deadline comes, nothing from outside is due.

    Threads of trio and file descriptors are such things from outside; while a task waits for one, the run goes on.

    Args:
        scope: is cancelled then.
    """

    def __init__(self, scope: trio.CancelScope) -> None:
        self._scope = scope
        self._n_loops = 0
        self._idle_since_s = inf
        self._steps = _Steps()
        self.text: str | None = None  # who waits for what, once it has ended the run

    def before_io_wait(self, timeout: float) -> None:
        self._n_loops += 1
        if self._n_loops % _LOOKS or self.text is not None:
            return
        if not _is_idle():
            self._trust()
        elif self._idle_since_s == inf:
            self._idle_since_s = time.monotonic()
            trio.lowlevel.add_instrument(self._steps)
        elif self._steps.made:
            self._trust()
        elif time.monotonic() - self._idle_since_s >= _DEADLOCK_S:
            self._trust()
            self.text = report()
            self._scope.cancel()

    def _trust(self) -> None:
        """Believe that the run goes on."""
        if self._idle_since_s < inf:
            self._idle_since_s, self._steps.made = inf, False
            trio.lowlevel.remove_instrument(self._steps)


class _Steps(trio.abc.Instrument):
    """Notes whether any task has made a step."""

    made = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.made = True


def _is_idle() -> bool:
    run = trio.lowlevel.current_statistics()
    if run.tasks_runnable or run.seconds_to_next_deadline < inf:
        return False
    outside = getattr(run.io_statistics, "tasks_waiting_read", 1) + getattr(run.io_statistics, "tasks_waiting_write", 0)
    threads = trio.to_thread.current_default_thread_limiter().borrowed_tokens
    return outside <= 1 and not threads  # one reads what wakes trio itself
