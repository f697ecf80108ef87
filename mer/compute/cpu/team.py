"""The threads that run programs together."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time

import numpy as np
import trio

from mer.compute.cpu.program import Memory, Program
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
from mer.errors import ComputeError, ConfigError
from mer.threads import start_thread

logger = logging.getLogger(__name__)
left_behind: list[object] = []
"""What threads that cannot be ended work with: it must outlive them."""
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
            left_behind.append(self)
            self._finished = -1
            return
        self._threads = []
        os.close(self._finished)
        self._finished = -1
