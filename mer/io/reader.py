"""Reads of model files into memory the caller provides: the Reader protocol, and a reader made of threads."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol

import attrs
import numpy as np
import trio
from numpy.typing import NDArray

from mer.errors import ConfigError, EngineClosed, ReadError
from mer.io.arena import PAGE_BYTES, map_anonymous
from mer.io.extents import aligned_hull
from mer.io.files import IoMode, ModelFile
from mer.io.metering import ReaderStatistics, ReadMeter
from mer.threads import start_thread

DEFAULT_THREADS: Final = 4
DEFAULT_CHUNK_BYTES: Final = 2 * 1024 * 1024


@attrs.define(eq=False, kw_only=True)
class ReadOperation:
    """One read of an aligned byte range of a file into memory.

    From `Reader.start` until `on_landed` is called the operation owns the memory, whatever becomes of the task that
    wanted the
    bytes: the kernel may write into it at any time.
    """

    file: int  # index into the paths the reader was made of
    start: int  # offset in that file, a multiple of its alignment
    length: int  # bytes, a multiple of the alignment; may reach beyond the end of the file
    needed: int  # how many bytes must arrive, 1 to length
    buffer: NDArray[np.uint8]  # shape (length,), contiguous, writable, its address a multiple of the alignment
    on_landed: Callable[[ReadOperation], None]  # called once, in the trio thread, after the last byte or the failure
    error: ReadError | None = None  # why it failed; known once it has landed


class Reader(Protocol):
    """Reads byte ranges of model files; every reader passes one set of tests."""

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read."""

    def start(self, operation: ReadOperation) -> None:
        """Begin a read; to be called in the trio thread.

        Never blocks, and never calls `on_landed` before it has returned. Operations begin in the order of their
        starts and may end in any order. A failed one ends with its `error` set. There is no limit on the operations
        in flight: the memory they read into bounds them.

        Raises:
            EngineClosed: the reader is closed.
            ValueError: the operation is not aligned, or its numbers do not fit together.
        """

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""


@attrs.define(eq=False)
class PendingExtent:
    """A byte range on its way into memory of its own; whoever stops waiting for it need not do anything."""

    _operation: ReadOperation
    _lead: int
    _landed: trio.Event

    async def wait(self) -> NDArray[np.uint8]:
        """Wait until the bytes are there; the read goes on if the wait is cancelled.

        Returns:
            The writable bytes, shape (n_bytes,). They keep their aligned hull in memory, up to two pages more. Their
            address is a multiple of the largest power of two up to a page that divides the offset.

        Raises:
            ReadError: the bytes cannot be read.
        """
        await self._landed.wait()
        if self._operation.error is not None:
            raise self._operation.error
        return self._operation.buffer[self._lead : self._operation.needed]


def start_extent(reader: Reader, file: int, offset: int, n_bytes: int) -> PendingExtent:
    """Start reading any byte range, at least one byte, of a file; for what is read once, such as dense weights.

    Raises:
        NotEnoughMemory: the operating system refuses the memory.
        EngineClosed: the reader is closed.
    """
    start, length, lead = aligned_hull(offset, n_bytes, reader.modes[file].alignment)
    memory = np.frombuffer(map_anonymous(length), dtype=np.uint8)
    landed = trio.Event()
    operation = ReadOperation(
        file=file, start=start, length=length, needed=lead + n_bytes, buffer=memory, on_landed=lambda _: landed.set()
    )
    reader.start(operation)
    return PendingExtent(operation, lead, landed)


async def read_extent(reader: Reader, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Read any byte range of a file, as `start_extent` and `PendingExtent.wait` do; it may be empty.

    If cancelled, the memory goes back to the system as soon as the read has landed.
    """
    if n_bytes == 0:
        await trio.lowlevel.checkpoint()
        return np.empty(0, dtype=np.uint8)
    return await start_extent(reader, file, offset, n_bytes).wait()


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
    if operation.start % alignment or operation.length % alignment or buffer.ctypes.data % alignment:
        raise ValueError(
            f"offset {operation.start}, length {operation.length} and address {buffer.ctypes.data:#x} "
            f"must be multiples of {alignment}"
        )


@attrs.define(eq=False)
class _Pending:
    """What the threads share about one operation; `lock` guards the rest."""

    operation: ReadOperation
    memory: memoryview
    started_s: float
    chunks_left: int
    error: ReadError | None = None
    lock: threading.Lock = attrs.Factory(threading.Lock)


@attrs.frozen
class _Chunk:
    """A part of an operation that one thread reads."""

    pending: _Pending
    begin: int  # in the operation's memory
    end: int


class ThreadReader:
    """Reads with persistent threads, past the page cache where the filesystem allows it.

    Operations are cut into aligned chunks that the threads take in the order of the starts, so that even a single
    operation uses all of them. A chunk that fails lets the chunks of its operation that have not begun go unread.

    Used as a context manager in the trio thread: entering opens the files and starts the threads, leaving closes.
    Closing never waits for a thread: a read that hangs in the kernel keeps its daemon thread, its memory and the
    files open, and nothing else. Operations that have not been read by then end with an error, if the event loop is
    still there to hear of it.

    Args:
        paths: the files, numbered by their position.
        n_threads: number of threads, and so of reads the disk sees at once.
        chunk_bytes: the largest read in bytes, a multiple of 4096; below about 1 MiB the disk's full rate is not
            reached.
        token: the event loop that `on_landed` is called in; the running one by default.

    Raises:
        ConfigError: there is no file, or a number is out of range.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        n_threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        token: trio.lowlevel.TrioToken | None = None,
    ) -> None:
        if not paths:
            raise ConfigError("a reader needs at least one file")
        if n_threads < 1:
            raise ConfigError(f"a reader needs at least 1 thread, not {n_threads}")
        if chunk_bytes < PAGE_BYTES or chunk_bytes % PAGE_BYTES:
            raise ConfigError(
                f"chunks of {chunk_bytes} bytes are not a multiple of {PAGE_BYTES}; try {DEFAULT_CHUNK_BYTES}"
            )
        self._paths = tuple(paths)
        self._n_threads = n_threads
        self._chunk_bytes = chunk_bytes
        self._token = token
        self._files: tuple[ModelFile, ...] = ()
        self._chunks: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._threads_alive = 0  # guarded by the lock below
        self._lock = threading.Lock()
        self._open = False  # written in the trio thread, read by all
        self._meter = ReadMeter()

    def __enter__(self) -> ThreadReader:
        """Open the files and start the threads.

        Raises:
            ReadError: a file cannot be opened.
            ConfigError: the system refuses a thread.
        """
        if self._files:
            raise RuntimeError("a reader cannot be opened twice")
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        files: list[ModelFile] = []
        try:
            for path in self._paths:
                files.append(ModelFile(path))
        except BaseException:
            for file in files:
                file.close()
            raise
        self._files = tuple(files)
        self._open = True
        self._start_threads()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further reads and let the threads end; returns at once. Closing twice is allowed."""
        if self._open:
            self._open = False
            for _ in range(self._n_threads):
                self._chunks.put(None)

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read; known once the reader is open."""
        return tuple(file.mode for file in self._files)

    def start(self, operation: ReadOperation) -> None:
        """Begin a read; see `Reader.start`."""
        if not self._open:
            raise EngineClosed("the reader is closed")
        check_operation(operation, self._files[operation.file].mode.alignment)
        now_s = time.monotonic()
        begins = range(0, operation.length, self._chunk_bytes)
        pending = _Pending(operation, operation.buffer.data, now_s, len(begins))
        self._meter.start(now_s)
        for begin in begins:
            self._chunks.put(_Chunk(pending, begin, min(begin + self._chunk_bytes, operation.length)))

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        return self._meter.statistics(time.monotonic())

    def _start_threads(self) -> None:
        for number in range(self._n_threads):
            with self._lock:
                self._threads_alive += 1
            try:
                start_thread(self._work, name=f"mer-io-{number}")
            except RuntimeError as error:
                self._leave()
                self.close()
                raise ConfigError(
                    f"the system refuses thread {number + 1} of {self._n_threads} for reading ({error}); "
                    "use fewer threads or raise the limit on processes (ulimit -u)"
                ) from error

    def _work(self) -> None:
        """Read chunks until told to end; runs in each of the threads."""
        while (chunk := self._chunks.get()) is not None:
            self._read(chunk)
            del chunk  # an idle thread keeps no memory alive
        self._leave()

    def _leave(self) -> None:
        """Note that a thread has ended; the last one closes the files, as before that a read might still use them."""
        with self._lock:
            self._threads_alive -= 1
            last = self._threads_alive == 0
        if last:
            for file in self._files:
                file.close()

    def _read(self, chunk: _Chunk) -> None:
        pending = chunk.pending
        operation = pending.operation
        error = pending.error
        if error is None:
            file = self._files[operation.file]
            start = operation.start + chunk.begin
            needed = min(operation.needed, chunk.end) - chunk.begin
            try:
                if self._open:
                    file.read_into(pending.memory[chunk.begin : chunk.end], start, needed)
                else:
                    error = ReadError(file.path, start, needed, "the reader was closed before the read began")
            except ReadError as failure:
                error = failure
            except (OSError, MemoryError) as failure:  # whatever happens, the operation must land
                error = ReadError(file.path, start, needed, repr(failure))
        with pending.lock:
            pending.error = pending.error or error
            pending.chunks_left -= 1
            last = pending.chunks_left == 0
        if last:
            assert self._token is not None
            with contextlib.suppress(trio.RunFinishedError):  # nobody is left to tell
                self._token.run_sync_soon(self._landed, pending)

    def _landed(self, pending: _Pending) -> None:
        """End an operation, in the trio thread."""
        operation = pending.operation
        operation.error = pending.error
        self._meter.end(operation.length, pending.started_s, time.monotonic(), failed=pending.error is not None)
        operation.on_landed(operation)
