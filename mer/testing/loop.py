"""Time for which each task holds the event loop, and the functions that run there."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import attrs
import trio


@attrs.frozen
class Hold:
    """One step of a task: from where it went on to where it waited again, nobody else could run."""

    seconds: float
    task: str  # its name


class LoopWatch(trio.abc.Instrument):
    """Notes how long each step of any task held the event loop; made by `watch_loop`.

    Attributes:
        on_loop: how often each watched function was called in the thread of the event loop, by name.
        elsewhere: how often in other threads.
        longest: the longest step; its task is "" if there was none.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.on_loop: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()
        self.longest = Hold(0.0, "")
        self._clock = clock
        self._begun_s: float | None = None
        self._seconds = array("d")
        self._thread = threading.get_ident()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `trio.abc.Instrument`."""
        self._begun_s = self._clock()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """See `trio.abc.Instrument`."""
        if self._begun_s is None:  # the step in which the watch began
            return
        seconds, self._begun_s = self._clock() - self._begun_s, None
        self._seconds.append(seconds)
        if seconds > self.longest.seconds:
            self.longest = Hold(seconds, task.name)

    @property
    def steps(self) -> int:
        """How many steps were noted."""
        return len(self._seconds)

    def percentile_s(self, percent: float) -> float:
        """Return the time that so many percent of the steps did not exceed; 0 if there was none."""
        if not self._seconds:
            return 0.0
        return sorted(self._seconds)[max(0, math.ceil(len(self._seconds) * percent / 100) - 1)]

    def called(self, name: str) -> None:
        """Take note of a call of a watched function, in whatever thread."""
        calls = self.on_loop if threading.get_ident() == self._thread else self.elsewhere
        calls[name] += 1


@contextmanager
def watch_loop(*functions: tuple[Any, str], clock: Callable[[], float] = time.perf_counter) -> Iterator[LoopWatch]:
    """Watch the event loop of the running trio during the block, and in which threads functions are called.

    How long a step takes depends on the machine and on who else uses it: tests should rather assert that what can take
    long has not been called on the loop. The step in which the block begins and the one in which it ends are not noted.

    Args:
        functions: a class or a module, and the name of a function or method that it defines; called "Class.name" in
            the counts, or "module.name". They are put back when the block is left.
        clock: seconds.

    Raises:
        AttributeError: there is no such function; then nothing is watched.
    """
    watch = LoopWatch(clock)
    found = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name in functions]
    for owner, name, original in found:
        if original is _MISSING:
            raise AttributeError(f"{owner.__name__} has no function {name!r} of its own")
    for owner, name, original in found:
        setattr(owner, name, _counted(original, f"{owner.__name__.rpartition('.')[2]}.{name}", watch))
    trio.lowlevel.add_instrument(watch)
    try:
        yield watch
    finally:
        trio.lowlevel.remove_instrument(watch)
        for owner, name, original in found:
            setattr(owner, name, original)


_MISSING = object()


def _counted(original: Any, name: str, watch: LoopWatch) -> Any:
    """Return a function, class method or static method that does the same and is counted."""
    if isinstance(original, classmethod | staticmethod):
        return type(original)(_counted(original.__func__, name, watch))

    @wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        watch.called(name)
        return original(*args, **kwargs)

    return counted
