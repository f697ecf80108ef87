"""Home of an engine: the trio run and the process that opened it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any

import trio
from trio._core._run import GLOBAL_RUN_CONTEXT  # trio has no public way to the descriptors of a run

from mer.errors import ForeignCall

_CHILDS_WAY = "open an engine in the child, or start it with multiprocessing's start method 'spawn'"


class Home:
    """The trio run and the process of an engine; to be made in a task of the run.

    Raises:
        ForeignCall: there is no trio run here.
    """

    def __init__(self) -> None:
        try:
            self._token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            raise ForeignCall(
                "an engine is opened in a task of trio.run; asyncio and plain threads have no trio run"
            ) from None
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this is a child process that was forked since."""
        return os.getpid() != self._pid

    def check_task(self) -> None:
        """Refuse a call that does not come from a task of the run.

        Raises:
            ForeignCall: it comes from somewhere else; nothing was touched.
        """
        self.check()
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            raise self._elsewhere("outside the tasks of its trio run") from None

    def check(self) -> None:
        """Refuse a call that does not come from the run, be it from a task or not.

        Raises:
            ForeignCall: it comes from somewhere else; nothing was touched.
        """
        if self.forked:
            raise ForeignCall(
                f"process {os.getpid()} was forked from process {self._pid}, which opened the engine and kept its "
                f"threads, reads and memory; {_CHILDS_WAY}"
            )
        try:
            token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            raise self._elsewhere("where no trio run is") from None
        if token is not self._token:
            raise self._elsewhere("from another trio run")

    def _elsewhere(self, where: str) -> ForeignCall:
        return ForeignCall(
            f"the engine was called {where}; call it in a task of the run that opened it, from another thread with "
            "trio.from_thread.run(..., trio_token=...)"
        )


class OwnProcessStack(ExitStack):
    """An ExitStack that a forked child leaves without calling anything: what is on it is the parent's."""

    _left: list[ExitStack] = []  # never released: a generator would still clean up  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> bool:
        if os.getpid() != self._pid:
            self._left.append(self.pop_all())
        return bool(super().__exit__(kind, error, traceback))


_in_children: list[Callable[[], None]] = []  # what forked children begin with


def _begin_child() -> None:
    for function in _in_children:
        function()


os.register_at_fork(after_in_child=_begin_child)


@contextmanager
def apart_from_children(in_child: Callable[[], None]) -> Iterator[None]:
    """Keep what happens in forked children from this trio run, as long as the block runs.

    A child inherits the epoll that tells the run of descriptors, and the sockets that wake it. The child's copy of
    the run would take events that the parent waits for, and change what it waits for: the child gets others.

    Args:
        in_child: called in each child before `os.fork` returns there; may touch only what is the child's own.
    """
    runner: Any = GLOBAL_RUN_CONTEXT.runner

    def separate() -> None:
        with suppress(AttributeError, OSError):  # another trio, or one that has ended: it is as without this
            _separate(runner)
        in_child()

    _in_children.append(separate)
    try:
        yield
    finally:
        _in_children.remove(separate)


def _separate(runner: Any) -> None:
    """Give a run a new epoll and new wake-up sockets, under the numbers of those it has."""
    manager = runner.io_manager
    force, entry = manager._force_wakeup, runner.entry_queue.wakeup
    numbers = [(pair.wakeup_sock.fileno(), pair.write_sock.fileno()) for pair in (force, entry)]
    with select.epoll() as fresh:
        os.dup2(fresh.fileno(), manager._epoll.fileno(), inheritable=False)
    for pair in numbers:
        for end, number in zip(socket.socketpair(), pair, strict=True):
            end.setblocking(False)
            os.dup2(end.fileno(), number, inheritable=False)
            end.close()
    runner.entry_queue.lock = threading.RLock()  # a thread that is not here may have held the old one
    manager._epoll.register(numbers[0][0], select.EPOLLIN)
    manager._epoll.register(numbers[1][0], select.EPOLLIN | select.EPOLLONESHOT)
