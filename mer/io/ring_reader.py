"""A reader that hands its reads to the kernel through io_uring and needs no threads."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Sequence
from itertools import count
from typing import Any, ClassVar

import attrs
import trio

from mer.errors import ConfigError, ReadError
from mer.io.chunks import Chunk
from mer.io.file_reader import FileReader
from mer.io.files import PartialRead
from mer.io.metering import ReaderStatistics
from mer.io.pool import Priority
from mer.io.reader import ReadOperation, check_promotion
from mer.io.ring import Ring, RingAddresses

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class _Reading:
    """A chunk that the kernel reads."""

    chunk: Chunk
    partial: PartialRead | None = None  # once less has come than was asked for
    in_place: bool = False  # the kernel has no thread for it: it is begun in ours


class RingUnavailable(ConfigError):
    """Files cannot be read with io_uring.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; read with threads")
        self.reason = reason


class RingReader(FileReader):
    """Reads with io_uring, from files that allow direct reads; see `FileReader`.

    The trio thread itself hands a read to the kernel as soon as its operation starts, and an eventfd tells it of the
    end: no thread is woken, and none waits for the interpreter. After an operation is written off, its hanging read no
    longer counts: another may take its place.

    Raises:
        RingUnavailable: on entering, the system has no io_uring or refuses it, or a file must be read through the page
            cache, which would block the event loop.
    """

    engine: ClassVar[str] = "io_uring"
    default_depth: ClassVar[int] = 8  # more than threads: each takes its next read only after a pass of the event loop

    def __init__(self, paths: Sequence[str | os.PathLike[str]], **settings: Any) -> None:
        super().__init__(paths, **settings)
        self._ring: Ring | None = None
        self._reading: dict[int, _Reading] = {}  # by token
        self._busy = [0 for _ in self._queue.copies]  # reads in flight of each drive, those that hang included
        self._tokens = count()
        self._waiting = trio.CancelScope()  # for something to complete
        self._wait_s = math.inf  # how long at most, before the queue is asked again
        self._lent = False  # whether a job has the ring

    def close(self) -> None:
        """Refuse further reads and give up those that have not begun; returns at once. Closing twice is allowed."""
        if self._open:
            self._open = False
            self._tell(self._note(self._queue.close()))
            self._waiting.cancel()

    def start(self, *operations: ReadOperation) -> None:
        """Begin reads; see `Reader.start`."""
        if self._disowned:
            return
        self._check(operations)
        now_s = time.monotonic()
        for operation in operations:
            self._meter.start(now_s)
            self._tell(self._note(self._queue.add(operation, self._paths[operation.file], now_s)))
        self._fill(now_s)

    def promote(self, operation: ReadOperation, priority: Priority) -> None:
        """Raise an operation's priority; see `Reader.promote`."""
        check_promotion(operation, priority)
        now_s = time.monotonic()
        self._queue.promote(operation, priority, now_s)
        self._fill(now_s)

    def cancel(self, operation: ReadOperation) -> None:
        """Leave what was not begun unread; see `Reader.cancel`."""
        self._tell(self._note(self._queue.cancel(operation)))

    def write_off(self, operation: ReadOperation) -> None:
        """Let others take the place of reads that hang; see `Reader.write_off`."""
        now_s = time.monotonic()
        ended, _ = self._queue.write_off(operation, now_s)
        self._tell(self._note(ended + self._queue.end_hopeless()))
        self._fill(now_s)

    def stalled_s(self, operation: ReadOperation) -> float:
        """Return how long the oldest read of an operation has been in flight; see `Reader.stalled_s`."""
        return self._queue.stalled_s(operation, time.monotonic())

    def lend(self) -> bool:
        """Leave the ring to a job; see `Lender.lend`. Not if there are mirrors either, which share reads."""
        if not self._open or self._lent or self._reading or self._queue.operations or self.mirrored:
            return False
        assert self._ring is not None
        self._lent = True
        self._ring.lend()
        return True

    def ring_addresses(self) -> RingAddresses:
        """Return where the ring is; known once the reader is open."""
        assert self._ring is not None
        return self._ring.addresses()

    @property
    def mirrored(self) -> bool:
        """Whether there are mirrors."""
        return len(self._drives) > 1

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors of the files."""
        return tuple(file.fileno() for file in self._drives[0])

    def take_back(self) -> None:
        """Take over the ring again; see `Lender.take_back`."""
        if self._disowned:
            return
        assert self._ring is not None
        self._lent = False
        self._ring.resume()
        self._fill(time.monotonic())

    def adopt(self, operation: ReadOperation, token: int, result: int | None, begun_s: float) -> ReadOperation:
        """Go on with a read that a job has begun; see `Lender.adopt`."""
        assert self._ring is not None
        self._meter.start(begun_s)
        self._reading[token] = _Reading(self._queue.add_begun(operation, self._paths[operation.file], begun_s))
        self._busy[0] += 1
        self._ring.adopt(token, result)
        return operation

    def account(self, lengths: Sequence[int], begun_s: float, ended_s: Sequence[float]) -> None:
        """Count reads that a job has made; see `Lender.account`."""
        copy = self._queue.copies[0]
        for _ in lengths:
            self._meter.start(begun_s)
            copy.begin(begun_s)
        for length, end_s in zip(lengths, ended_s, strict=True):
            self._meter.land(length, Priority.DEMAND, begun_s, begun_s, end_s)
            copy.succeed(length, begun_s, end_s)

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        return self._statistics()

    def _get_ready(self) -> None:
        try:
            for files in self._drives:
                for file in files:
                    if not file.mode.direct:
                        raise RingUnavailable(
                            f"io_uring needs direct reads, and {file.path} does not allow them: {file.mode.reason}"
                        )
            depth = sum(2 * copy.n_threads for copy in self._queue.copies)  # each read once replaced
            try:
                self._ring = Ring(depth)
            except OSError as error:
                raise RingUnavailable(f"the system refuses io_uring ({error.strerror})") from error
        except BaseException:
            self._open = False
            self._close_files()
            raise
        trio.lowlevel.spawn_system_task(self._serve, self._ring, name="mer-io")

    async def _serve(self, ring: Ring) -> None:
        """Wait for reads to complete, until the reader is closed and the last one has, or the event loop ends."""
        try:
            while self._open or self._reading:
                with self._waiting:
                    await trio.lowlevel.wait_readable(ring.fileno())
                self._waiting, self._wait_s = trio.CancelScope(), math.inf
                self._collect(ring)
        except Exception as error:  # an error of a system task would end the whole run
            logger.exception("the task that reads has died")
            self._fail(error)
        finally:
            self._open = False
            ring.close()
            self._close_files()

    def _collect(self, ring: Ring) -> None:
        """Account for what has completed and hand over what comes next."""
        if self._disowned:
            return
        ring.reset()
        if self._lent:
            return  # what has completed is the job's
        now_s = time.monotonic()
        for token, result in ring.completed():
            reading = self._reading.pop(token)
            self._busy[reading.chunk.copy] -= 1
            self._completed(ring, reading, result, now_s)
        if self._open:
            self._fill(now_s)
        else:
            ring.submit()  # the rest of chunks that have begun
        self._land()

    def _completed(self, ring: Ring, reading: _Reading, result: int, now_s: float) -> None:
        chunk = reading.chunk
        operation = chunk.work.operation
        start = operation.start + chunk.begin
        needed = min(operation.needed, chunk.end) - chunk.begin
        error = None
        if result == -errno.ECANCELED and not reading.in_place:  # what a thread of the kernel that it lacks would do
            reading.in_place = True
            self._prepare(ring, reading)
            return
        if result < needed or reading.partial is not None:
            file = self._drives[chunk.copy][operation.file]
            partial = reading.partial or PartialRead(file, start, needed)
            try:
                if result < 0:
                    partial.refused(-result)
                else:
                    partial.add(result)
                if not partial.complete:
                    reading.partial = partial
                    self._prepare(ring, reading)
                    return
            except ReadError as failure:
                error = failure
        self._note(self._queue.finish(chunk, error, now_s))
        if chunk.written_off:
            self._queue.dismiss(chunk.copy)

    def _fill(self, now_s: float) -> None:
        """Hand reads to the kernel until each drive sees as many as it is to."""
        assert self._ring is not None
        if self._lent or self._disowned:
            return
        ask_again_s = math.inf
        for number, copy in enumerate(self._queue.copies):
            while self._busy[number] < copy.threads:
                found = self._queue.take(number, now_s)
                if not isinstance(found, Chunk):
                    ask_again_s = min(ask_again_s, found)
                    break
                self._prepare(self._ring, _Reading(found))
        self._ring.submit()
        if self._wait_s != ask_again_s:
            self._wait_s = ask_again_s
            self._waiting.deadline = trio.current_time() + ask_again_s

    def _prepare(self, ring: Ring, reading: _Reading) -> None:
        """Prepare the next read of a chunk."""
        chunk = reading.chunk
        operation = chunk.work.operation
        file = self._drives[chunk.copy][operation.file]
        begin = chunk.begin + (reading.partial.begin if reading.partial is not None else 0)
        token = next(self._tokens)
        self._reading[token] = reading
        self._busy[chunk.copy] += 1
        address, offset = operation.address + begin, operation.start + begin
        ring.read(
            file.fileno(), address, chunk.end - begin, offset, token, aside=operation.untouched and not reading.in_place
        )

    def _land(self) -> None:
        ended, self._ended, self._told = self._ended, [], False
        self._finish_all(ended)
