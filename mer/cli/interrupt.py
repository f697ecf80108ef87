"""ctrl-C: the first stops what is running, the second leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import trio

from mer.cli.exits import Exit

SHOW_CURSOR = "\x1b[?25h\n"


def leave_now() -> None:
    """End the process without waiting for threads, reads or buffers."""
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            os.write(2, SHOW_CURSOR.encode())  # progress bars hide it
    os._exit(Exit.INTERRUPTED)


class Interrupt:
    """Owns SIGINT while it is entered, so that neither trio nor the interpreter raises KeyboardInterrupt.

    Inside `stopping()` the first ctrl-C cancels the innermost block and the next one leaves at once; outside, the first
    leaves at once. It must be entered in the main thread.
    """

    def __init__(self) -> None:
        self.pressed = False  # since the innermost running block began, or in the last one
        self.scopes: list[trio.CancelScope] = []  # of the running blocks
        self._token: trio.lowlevel.TrioToken | None = None
        self._previous: Any = None

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def stopping(self) -> Stopping:
        """Return a block whose inside the first ctrl-C cancels; `pressed` tells afterwards."""
        return Stopping(self)

    def begin(self, scope: trio.CancelScope) -> None:
        """Make `scope` the one that ctrl-C cancels."""
        self._token = trio.lowlevel.current_trio_token()
        self.pressed = False
        self.scopes.append(scope)

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Make the first ctrl-C leave at once inside the block, which may block the event loop."""
        before, self.pressed = self.pressed, True
        try:
            yield
        finally:
            self.pressed = before

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed or not self.scopes or self._token is None:
            leave_now()
        else:
            self.pressed = True
            self._token.run_sync_soon(self.scopes[-1].cancel)


class Stopping:
    """A block that the first ctrl-C cancels, and that then ends without an exception."""

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._scope = trio.CancelScope()

    def __enter__(self) -> None:
        self._scope.__enter__()
        self._interrupt.begin(self._scope)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._interrupt.scopes.pop()
        return bool(self._scope.__exit__(kind, error, traceback))
