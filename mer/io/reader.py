"""Reads of model files into memory the caller provides: the Reader protocol, and what every reader is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import numpy as np
import trio
from numpy.typing import NDArray

from mer.errors import ReadError
from mer.io.arena import map_anonymous
from mer.io.extents import aligned_hull
from mer.io.files import IoMode
from mer.io.metering import ReaderStatistics
from mer.io.patient import delay_s
from mer.io.pool import Priority


@attrs.define(eq=False, kw_only=True)
class ReadOperation:
    """One read of an aligned byte range of a file into memory.

    From `Reader.start` until `on_landed` is called the operation owns the memory, whatever becomes of the task that
    wanted the bytes: the kernel may write into it at any time.
    """

    file: int  # index into the paths the reader was made of
    start: int  # offset in that file, a multiple of its alignment
    length: int  # bytes, a multiple of the alignment; may reach beyond the end of the file
    needed: int  # how many bytes must arrive, 1 to length
    buffer: NDArray[np.uint8]  # shape (length,), contiguous, writable, its address a multiple of the alignment
    on_landed: Callable[[ReadOperation], None]  # called once, in the trio thread, after the last byte or the failure
    priority: Priority = Priority.DEMAND  # raised by `Reader.promote`
    untouched: bool = False  # the memory has no pages yet; the thread that hands the read to the kernel waits for them
    error: ReadError | None = None  # why it failed; known once it has landed
    cancelled: bool = False  # whether `error` says no more than that it was cancelled or written off half-way
    address: int = attrs.field()  # of the buffer

    @address.default
    def _address_of_buffer(self) -> int:
        return int(self.buffer.__array_interface__["data"][0])


class Reader(Protocol):
    """Reads byte ranges of model files; every reader passes one set of tests.

    Operations are read in chunks. A chunk is begun by priority, and among operations of one priority in the order of
    their starts; few chunks of prefetches are read at any time, so that a demand read need not wait for one of them.
    All methods are synchronous, never block, are called in the trio thread, and never call `on_landed` before they
    have returned.
    """

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The files."""

    def start(self, *operations: ReadOperation) -> None:
        """Begin reads, in this order.

        Operations may end in any order. A failed one ends with its `error` set. There is no limit on the operations
        in flight: the memory they read into bounds them.

        Raises:
            EngineClosed: the reader is closed.
            ValueError: an operation is not aligned, or its numbers do not fit together; none has begun.
        """

    def promote(self, operation: ReadOperation, priority: Priority) -> None:
        """Read the chunks of an operation that have not begun as if it had been started with this priority.

        Nothing is read twice. Changes nothing if the operation has landed or is about to.

        Raises:
            ValueError: the priority is lower than the operation's.
        """

    def cancel(self, operation: ReadOperation) -> None:
        """Leave the chunks of an operation that have not begun unread.

        It lands when those that have begun are read: with `cancelled` and an error, unless nothing is missing.
        Changes nothing if it has landed or is about to.
        """

    def write_off(self, operation: ReadOperation) -> None:
        """Cancel an operation whose reads hang in the kernel, and replace the threads that they keep.

        The operation lands when its last read returns, if ever; its memory stays its own until then. A replaced
        thread ends when its read returns. There are at most as many replacements at any time as there are threads; when
        all of those hang too, every other operation lands with an error until a read returns.
        """

    def stalled_s(self, operation: ReadOperation) -> float:
        """Return for how many seconds the oldest of the operation's chunks now being read has been read.

        It is 0 while none is: an operation that waits for others is not stalled.
        """

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""


def check_operation(operation: ReadOperation, alignment: int) -> None:
    """Refuse an operation that does not keep to the Reader protocol.

    Raises:
        ValueError: it is not aligned, or its numbers do not fit together.
    """
    buffer = operation.buffer
    if operation.start < 0 or not 1 <= operation.needed <= operation.length:
        raise ValueError(f"cannot read {operation.needed} of {operation.length} bytes at {operation.start}")
    if buffer.dtype != np.uint8 or buffer.shape != (operation.length,) or not buffer.flags.c_contiguous:
        raise ValueError(f"the buffer is {buffer.dtype}{buffer.shape}, not {operation.length} contiguous bytes")
    if not buffer.flags.writeable:
        raise ValueError("the buffer cannot be written to")
    if operation.start % alignment or operation.length % alignment or operation.address % alignment:
        raise ValueError(
            f"offset {operation.start}, length {operation.length} and address {operation.address:#x} "
            f"must be multiples of {alignment}"
        )


def check_promotion(operation: ReadOperation, priority: Priority) -> None:
    """Refuse to lower an operation's priority.

    Raises:
        ValueError: the priority is lower than the operation's.
    """
    if priority > operation.priority:
        raise ValueError(f"a read of priority {operation.priority.name} cannot be lowered to {priority.name}")


class PendingExtent:
    """A byte range on its way into separate memory; a task that stops waiting for it need do nothing else."""

    def __init__(self, reader: Reader, operation: ReadOperation, lead: int) -> None:
        self._reader = reader
        self._operation = operation
        self._lead = lead
        self._start()

    async def wait(self) -> NDArray[np.uint8]:
        """Wait until the bytes are there; the read goes on if the wait is cancelled.

        A read that fails with a transient error is tried again, as long as somebody waits; see `mer.io.patient`. To be
        called by one task at a time.

        Returns:
            The writable bytes, shape (n_bytes,). They keep their aligned hull in memory, up to two pages more. Their
            address is a multiple of the largest power of two up to a page that divides the offset.

        Raises:
            ReadError: the bytes cannot be read.
            EngineClosed: the reader was closed when the read was to be tried again.
        """
        tries = 1
        while True:
            await self._landed.wait()
            error = self._operation.error
            if error is None:
                return self._operation.buffer[self._lead : self._operation.needed]
            wait_s = delay_s(error, tries)
            if wait_s is None:
                raise error.after(tries) from error
            await trio.sleep(wait_s)
            self._start()
            tries += 1

    def _start(self) -> None:
        self._landed = landed = trio.Event()
        self._operation = attrs.evolve(self._operation, on_landed=lambda _: landed.set(), error=None, cancelled=False)
        self._reader.start(self._operation)


def start_extent(reader: Reader, file: int, offset: int, n_bytes: int) -> PendingExtent:
    """Start reading any byte range, at least one byte, of a file; for what is read once, such as dense weights.

    Raises:
        NotEnoughMemory: the operating system refuses the memory.
        EngineClosed: the reader is closed.
    """
    start, length, lead = aligned_hull(offset, n_bytes, reader.modes[file].alignment)
    memory = np.frombuffer(map_anonymous(length), dtype=np.uint8)
    operation = ReadOperation(
        file=file,
        start=start,
        length=length,
        needed=lead + n_bytes,
        buffer=memory,
        on_landed=lambda _: None,
        untouched=True,
    )
    return PendingExtent(reader, operation, lead)
