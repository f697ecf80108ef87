"""A reader made of threads, past the page cache where the filesystem allows it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from itertools import count
from math import inf
from typing import Any, ClassVar

import trio

from mer.errors import ConfigError, ReadError
from mer.io.chunks import Chunk, Work
from mer.io.file_reader import FileReader
from mer.io.metering import ReaderStatistics
from mer.io.pool import Priority
from mer.io.reader import ReadOperation, check_promotion
from mer.threads import start_thread

logger = logging.getLogger(__name__)


class ThreadReader(FileReader):
    """Reads with persistent threads, as many for each drive as it is to see reads at once; see `FileReader`.

    Threads are daemons: one whose read hangs in the kernel ends when that returns, if ever.
    """

    engine: ClassVar[str] = "threads"

    def __init__(self, paths: Sequence[str | os.PathLike[str]], **settings: Any) -> None:
        super().__init__(paths, **settings)
        self._make_locks()
        self._alive = 0  # threads
        self._thread_number = count()

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # guards the queue and what has ended
        self._idle = [threading.Condition(self._lock) for _ in self._queue.copies]  # where each drive's threads wait

    def disown(self) -> None:
        """Leave everything as it is in a forked child; see `FileReader.disown`."""
        super().disown()
        self._make_locks()  # a thread that is not here may have held the old one

    def close(self) -> None:
        """Refuse further reads and let the threads end; returns at once. Closing twice is allowed."""
        if self._open:
            self._open = False
            with self._lock:
                told = self._note(self._queue.close())
                self._wake()
            self._tell(told)

    def start(self, *operations: ReadOperation) -> None:
        """Begin reads; see `Reader.start`."""
        if self._disowned:
            return
        self._check(operations)
        now_s, n_chunks, told = time.monotonic(), 0, False
        with self._lock:
            for operation in operations:
                self._meter.start(now_s)
                told = self._note(self._queue.add(operation, self._paths[operation.file], now_s)) or told
                n_chunks += -(-operation.length // self.chunk_bytes)
            for idle in self._idle:
                idle.notify(n_chunks)
        self._tell(told)

    def promote(self, operation: ReadOperation, priority: Priority) -> None:
        """Raise an operation's priority; see `Reader.promote`."""
        check_promotion(operation, priority)
        with self._lock:
            self._queue.promote(operation, priority, time.monotonic())
            self._wake()

    def cancel(self, operation: ReadOperation) -> None:
        """Leave what was not begun unread; see `Reader.cancel`."""
        with self._lock:
            told = self._note(self._queue.cancel(operation))
        self._tell(told)

    def write_off(self, operation: ReadOperation) -> None:
        """Replace the threads that hang in an operation; see `Reader.write_off`."""
        with self._lock:
            ended, bereft = self._queue.write_off(operation, time.monotonic())
            told = self._note(ended)
        for copy in bereft:
            try:
                self._start_thread(copy)
            except RuntimeError as error:
                logger.warning("no thread to replace one that hangs in a read: %s", error)
                with self._lock:
                    told = self._note(self._queue.lose_thread(copy)) or told
        with self._lock:
            told = self._note(self._queue.end_hopeless()) or told
            self._wake()
        self._tell(told)

    def stalled_s(self, operation: ReadOperation) -> float:
        """Return how long the oldest read of an operation has been in flight; see `Reader.stalled_s`."""
        with self._lock:
            return self._queue.stalled_s(operation, time.monotonic())

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        with self._lock:
            return self._statistics()

    def _get_ready(self) -> None:
        wanted = [number for number, copy in enumerate(self._queue.copies) for _ in range(copy.n_threads)]
        for number, copy in enumerate(wanted, 1):
            try:
                self._start_thread(copy)
            except RuntimeError as error:
                self.close()
                if number == 1:
                    self._close_files()
                raise ConfigError(
                    f"the system refuses thread {number} of {len(wanted)} for reading ({error}); "
                    "use fewer threads or raise the limit on processes (ulimit -u)"
                ) from error

    def _start_thread(self, copy: int) -> None:
        """Start a thread; raises RuntimeError if the system refuses it."""
        with self._lock:
            self._alive += 1
        try:
            start_thread(self._work, copy, name=f"mer-io-{next(self._thread_number)}")
        except RuntimeError:
            with self._lock:
                self._alive -= 1
            raise

    def _work(self, copy: int) -> None:
        """Read chunks until told to end; runs in each of the threads."""
        try:
            self._read_chunks(copy)
        except Exception as error:
            logger.exception("a thread that reads has died")
            assert self._token is not None
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._fail, error)
        finally:
            with self._lock:
                self._alive -= 1
                last = self._alive == 0
            if last:  # before that a read might still use them
                self._close_files()

    def _read_chunks(self, copy: int) -> None:
        while (chunk := self._take(copy)) is not None:
            if not self._finish(chunk, self._read(chunk)):
                break
            del chunk  # an idle thread keeps no memory alive

    def _take(self, copy: int) -> Chunk | None:
        """Wait for a chunk to read; None when the thread is to end."""
        idle = self._idle[copy]
        with self._lock:
            while self._open:
                found = self._queue.take(copy, time.monotonic())
                if isinstance(found, Chunk):
                    return found
                idle.wait(None if found == inf else found)
        return None

    def _read(self, chunk: Chunk) -> ReadError | None:
        """Read a chunk and return why that failed, if it did."""
        operation = chunk.work.operation
        file = self._drives[chunk.copy][operation.file]
        start = operation.start + chunk.begin
        needed = min(operation.needed, chunk.end) - chunk.begin
        try:
            file.read_into(operation.buffer.data[chunk.begin : chunk.end], start, needed)
        except ReadError as failure:
            return failure
        except Exception as failure:  # whatever happens, the operation must land
            return ReadError(file.path, start, needed, repr(failure))
        return None

    def _finish(self, chunk: Chunk, error: ReadError | None) -> bool:
        """Account for a chunk and return whether its thread is to go on."""
        with self._lock:
            opens_way = error is not None or chunk.speculative or chunk.probe
            told = self._note(self._queue.finish(chunk, error, time.monotonic()))
            if opens_way and len(self._drives) > 1:
                self._wake()  # for what this thread's copy cannot read
            end = chunk.written_off and self._queue.dismiss(chunk.copy)
        self._tell(told)
        return not end

    def _wake(self) -> None:
        """Let all idle threads look for chunks, under the lock."""
        for idle in self._idle:
            idle.notify_all()

    def _land(self) -> None:
        with self._lock:
            ended: list[Work] = self._ended
            self._ended, self._told = [], False
        self._finish_all(ended)
