"""Writing a routing trace while an engine runs."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

import attrs
import trio

from mer.sched.trace import BLOCK_BYTES, MAX_BLOCK_BYTES, TraceWriter

InThread: TypeAlias = Callable[[Callable[[], None]], Awaitable[None]]
"""Runs a function where it may block; checks for cancellation before, and then waits for the end of it."""

_LATE_BLOCKS: Final = MAX_BLOCK_BYTES // BLOCK_BYTES
logger = logging.getLogger(__name__)


@attrs.frozen(kw_only=True)
class TraceStatistics:
    """A snapshot of a trace that is being written."""

    path: str
    events: int  # recorded, written or not yet
    bytes_written: int
    error: str | None  # why the trace has ended early


class TraceRecorder:
    """Takes events from the scheduler and writes them in a thread, a block at a time.

    A trace that cannot be written any more ends there, with a warning in the log and in the statistics; generations go
    on. It also ends there when more than 16 blocks of 64 KiB wait for the disk.

    Args:
        writer: an open trace; the recorder closes it.
        in_thread: where blocks are written.
    """

    def __init__(self, writer: TraceWriter, *, in_thread: InThread = trio.to_thread.run_sync) -> None:
        self._writer = writer
        self._in_thread = in_thread
        self._blocks: deque[bytes] = deque()  # to be written, in order
        self._waiting = trio.Event()
        self._events = 0
        self._bytes_written = 0
        self._error: str | None = None

    def routed(self, layer: int, n_tokens: int, experts: Sequence[int]) -> None:
        """Record one layer's union of experts over a batch; see `TraceWriter.add`."""
        if self._error is not None:
            return
        self._events += 1
        if self._writer.add(layer, n_tokens, experts) >= BLOCK_BYTES:
            self._blocks.append(self._writer.take())
            self._waiting.set()
            if len(self._blocks) > _LATE_BLOCKS:
                self._end("the disk does not keep up with it")

    async def run(self) -> None:
        """Write blocks until cancelled; what is left then is `close`'s."""
        while self._error is None:
            await self._waiting.wait()
            self._waiting = trio.Event()
            while self._blocks and self._error is None:
                await self._in_thread(self._write_next)

    def close(self) -> None:
        """Write what is left and close the file; to be called after `run` has ended, and once."""
        if self._error is None:
            self._blocks.append(self._writer.take())
        while self._blocks and self._error is None:
            self._write_next()
        self._writer.close(flush=False)

    def _write_next(self) -> None:
        """Write the first block. It leaves the line only then: a cancelled `run` loses none."""
        block = self._blocks[0]
        try:
            self._writer.write(block)
        except OSError as error:
            self._end(str(error))
            return
        self._bytes_written += len(block)
        self._blocks.popleft()

    def _end(self, reason: str) -> None:
        self._error = reason
        logger.warning("%s: the trace ends early: %s", self._writer.path, reason)

    def statistics(self) -> TraceStatistics:
        """Return a snapshot."""
        return TraceStatistics(
            path=str(self._writer.path),
            events=self._events,
            bytes_written=self._bytes_written,
            error=self._error,
        )
