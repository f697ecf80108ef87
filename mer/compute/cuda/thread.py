"""One thread that calls functions for a trio task: the only one that gives the device work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

import attrs
import trio

from mer.errors import ConfigError
from mer.threads import start_thread

T = TypeVar("T")


@attrs.define(eq=False)
class _Call:
    function: Callable[[], object]
    token: trio.lowlevel.TrioToken
    over: trio.Event = attrs.field(factory=trio.Event)
    result: object = None
    error: Exception | None = None


class CallThread:
    """A persistent thread; `open` before use, `close` afterwards."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Start the thread.

        Raises:
            ConfigError: the system refuses it.
        """
        try:
            self._thread = start_thread(self._serve, name=self._name)
        except RuntimeError as error:
            hint = "raise the limit on processes (ulimit -u)"
            raise ConfigError(f"the system refuses the thread {self._name} ({error}); {hint}") from error

    def start(self, function: Callable[[], T]) -> Callable[[], Awaitable[T]]:
        """Let the thread call a function, and return what to await for its end; if cancelled, the call goes on."""
        call = _Call(function, trio.lowlevel.current_trio_token())
        self._calls.put(call)

        async def wait() -> T:
            await call.over.wait()
            if call.error is not None:
                raise call.error
            return call.result  # type: ignore[return-value]

        return wait

    def close(self) -> None:
        """Stop the thread once the call that it is in has returned. Closing twice is allowed."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.result = call.function()
            except Exception as error:
                call.error = error
            try:
                call.token.run_sync_soon(call.over.set)
            except trio.RunFinishedError:
                return  # nobody is left to tell
