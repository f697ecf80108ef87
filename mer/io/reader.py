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
from types import TracebackType

import attrs
import trio

from mer.errors import ConfigError, EngineClosed, ReadError
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, Chunk, ChunkQueue, Work
from mer.io.files import IoMode, ModelFile
from mer.io.identity import FileIdentity
from mer.io.metering import ReaderStatistics, ReadMeter
from mer.io.mirror import verify_mirror
from mer.io.operation import ReadOperation, check_operation, check_promotion
from mer.io.priority import Priority
from mer.threads import start_thread

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class _Drive:
    """One copy of the files and where its idle threads wait."""

    files: tuple[ModelFile, ...]
    idle: threading.Condition  # of the reader's lock


class ThreadReader:
    """Reads with persistent threads; see `Reader` for what its methods promise, and `ChunkQueue` for what is read when.

    Operations are cut into aligned chunks, so that even a single one uses all threads. A chunk that fails lets the
    chunks of its operation that have not begun go unread. Mirrors are identical copies of the files on other drives:
    each has as many threads of its own, and the drives share what there is to read.

    Used as a context manager in the trio thread: entering opens the files, compares the mirrors with them (a blocking
    matter of some 10 ms for each file of each mirror), and starts the threads; leaving closes. Closing never waits
    for a thread: a read that hangs in the kernel keeps its daemon thread, its memory and the files open, and nothing
    else. Operations that have not been read by then end with an error, if the event loop is still there to hear of it.

    Args:
        paths: the files, numbered by their position.
        mirrors: for each further drive the paths of its copies of all the files, in the same order.
        expected: what each file was when its header was read, if that is to be checked.
        n_threads: threads of each drive, and so of reads that it sees at once.
        chunk_bytes: the largest read in bytes, a multiple of 4096; below about 1 MiB the disk's full rate is not
            reached.
        prefetch_threads: threads that may read prefetches at once, so that the others are there when demand comes; by
            default half of them, which reach a disk's full rate with chunks of this size.
        token: the event loop that `on_landed` is called in; the running one by default.

    Raises:
        ConfigError: there is no file, a number is out of range, or a mirror has not as many files.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        mirrors: Sequence[Sequence[str | os.PathLike[str]]] = (),
        expected: Sequence[FileIdentity] | None = None,
        n_threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        prefetch_threads: int | None = None,
        token: trio.lowlevel.TrioToken | None = None,
    ) -> None:
        if not paths:
            raise ConfigError("a reader needs at least one file")
        for mirror in mirrors:
            if len(mirror) != len(paths):
                raise ConfigError(
                    f"a mirror of {len(mirror)} files cannot stand for {len(paths)}; give a copy of every file"
                )
        self._paths = tuple(os.fspath(path) for path in paths)
        self._mirrors = tuple(tuple(mirror) for mirror in mirrors)
        self._expected = expected
        self._chunk_bytes = chunk_bytes
        self._token = token
        self._queue = ChunkQueue(
            n_copies=1 + len(mirrors),
            n_threads=n_threads,
            chunk_bytes=chunk_bytes,
            prefetch_threads=max(1, n_threads // 2) if prefetch_threads is None else prefetch_threads,
        )
        self._lock = threading.Lock()  # guards the queue and what follows
        self._drives: tuple[_Drive, ...] = ()
        self._alive = 0  # threads
        self._ended: list[Work] = []  # operations whose end the trio thread is about to hear of
        self._told = False  # whether it is
        self._open = False  # written in the trio thread, read by all
        self._thread_number = count()
        self._meter = ReadMeter()

    def __enter__(self) -> ThreadReader:
        """Open the files and start the threads.

        Raises:
            ReadError: a file cannot be opened or read.
            FileChanged: a file is not the one whose header was read.
            MirrorMismatch: a mirror differs from the files.
            ConfigError: the system refuses a thread, or a mirror is one of the files itself.
        """
        if self._drives:
            raise RuntimeError("a reader cannot be opened twice")
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
        opened: list[list[ModelFile]] = []
        try:
            for copy in (self._paths, *self._mirrors):
                opened.append([])
                for number, path in enumerate(copy):
                    expected = self._expected[number] if self._expected is not None and copy is self._paths else None
                    opened[-1].append(ModelFile(path, expected))
            for mirror in opened[1:]:
                for original, duplicate in zip(opened[0], mirror, strict=True):
                    verify_mirror(original, duplicate)
        except BaseException:
            for files in opened:
                for file in files:
                    file.close()
            raise
        self._drives = tuple(_Drive(tuple(files), threading.Condition(self._lock)) for files in opened)
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
            with self._lock:
                told = self._note(self._queue.close())
                self._wake()
            self._tell(told)

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read; known once the reader is open."""
        return tuple(file.mode for file in self._drives[0].files)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files."""
        return self._paths

    def start(self, operation: ReadOperation) -> None:
        """Begin a read; see `Reader.start`."""
        if not self._open:
            raise EngineClosed("the reader is closed")
        check_operation(operation, self._drives[0].files[operation.file].mode.alignment)
        now_s = time.monotonic()
        self._meter.start(now_s)
        with self._lock:
            told = self._note(self._queue.add(operation, self._paths[operation.file], now_s))
            for drive in self._drives:
                drive.idle.notify(-(-operation.length // self._chunk_bytes))
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
        """Return how long the oldest read of an operation has been under way; see `Reader.stalled_s`."""
        with self._lock:
            return self._queue.stalled_s(operation, time.monotonic())

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        now_s = time.monotonic()
        with self._lock:
            queued_bytes, written_off = self._queue.queued_bytes(), self._queue.written_off
            copies = tuple(
                copy.statistics(
                    tuple(str(file.path) for file in drive.files), tuple(file.mode for file in drive.files), now_s
                )
                for copy, drive in zip(self._queue.copies, self._drives, strict=True)
            )
        return self._meter.statistics(now_s, queued_bytes=queued_bytes, written_off=written_off, copies=copies)

    def _start_threads(self) -> None:
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
        while (chunk := self._take(copy)) is not None:
            if not self._finish(chunk, self._read(chunk)):
                break
            del chunk  # an idle thread keeps no memory alive
        with self._lock:
            self._alive -= 1
            last = self._alive == 0
        if last:  # before that a read might still use them
            self._close_files()

    def _take(self, copy: int) -> Chunk | None:
        """Wait for a chunk to read; None when the thread is to end."""
        idle = self._drives[copy].idle
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
        file = self._drives[chunk.copy].files[operation.file]
        start = operation.start + chunk.begin
        needed = min(operation.needed, chunk.end) - chunk.begin
        try:
            file.read_into(operation.buffer.data[chunk.begin : chunk.end], start, needed)
        except ReadError as failure:
            return failure
        except (OSError, MemoryError) as failure:  # whatever happens, the operation must land
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

    def _note(self, ended: list[Work]) -> bool:
        """Remember what has ended, under the lock; returns whether the trio thread is to be told after it."""
        if not ended:
            return False
        self._ended += ended
        told, self._told = self._told, True
        return not told

    def _tell(self, told: bool) -> None:
        """Let the trio thread hear of what has ended, if it will not anyway."""
        if told:
            assert self._token is not None
            with contextlib.suppress(trio.RunFinishedError):  # nobody is left to tell
                self._token.run_sync_soon(self._land)

    def _wake(self) -> None:
        """Let all idle threads look for chunks, under the lock."""
        for drive in self._drives:
            drive.idle.notify_all()

    def _land(self) -> None:
        """End operations, in the trio thread."""
        with self._lock:
            ended, self._ended, self._told = self._ended, [], False
        now_s = time.monotonic()
        for work in ended:
            operation = work.operation
            operation.error = work.error
            operation.cancelled = work.incomplete
            if work.error is None:
                self._meter.land(operation.length, operation.priority, work.started_s, work.wanted_s, now_s)
            else:
                self._meter.fail(work.started_s, now_s, cancelled=work.incomplete)
            operation.on_landed(operation)

    def _close_files(self) -> None:
        for drive in self._drives:
            for file in drive.files:
                file.close()
