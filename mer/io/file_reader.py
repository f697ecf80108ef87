"""Base of the readers of real files: the files and their mirrors, the queue, and the ends of operations."""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import ClassVar, Self

import trio

from mer.errors import ConfigError, EngineClosed
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, ChunkQueue, Work
from mer.io.files import IoMode, ModelFile
from mer.io.identity import FileIdentity
from mer.io.metering import ReaderStatistics, ReadMeter
from mer.io.mirror import verify_mirror
from mer.io.pool import Priority
from mer.io.reader import ReadOperation, check_operation


def land(work: Work, meter: ReadMeter, now_s: float) -> None:
    """End an operation that the queue has ended: count it, and call its `on_landed`."""
    operation = work.operation
    operation.error = work.error
    operation.cancelled = work.incomplete
    if work.error is None:
        meter.land(operation.length, operation.priority, work.started_s, work.wanted_s, now_s)
    else:
        meter.fail(work.started_s, now_s, cancelled=work.incomplete)
    operation.on_landed(operation)


class FileReader(abc.ABC):
    """A reader of model files; see `Reader` for the contract, and `ChunkQueue` for the order of reads.

    Operations are cut into aligned chunks, so that even a single one keeps a drive busy. When a chunk fails for good,
    the chunks of its operation that have not begun are dropped. Mirrors are identical copies of the files on other
    drives; the drives share the reads.

    Used as a context manager in the trio thread: entering opens the files and compares the mirrors with them (a
    blocking matter of some 10 ms for each file of each mirror); leaving closes. Closing never waits for a read: one
    that hangs in the kernel keeps its memory and the files, and nothing else. Operations that have not been read by
    then end with an error, if the event loop still runs.

    Attributes:
        engine: how it gets the kernel to read: "threads" or "io_uring".
        default_depth: reads of each drive that are in flight at once by default.
        depth: the number in force.
        chunk_bytes: the largest read.

    Args:
        paths: the files, numbered by their position.
        mirrors: for each further drive the paths of its copies of all the files, in the same order.
        expected: what each file was when its header was read, if that is to be checked.
        n_threads: reads of each drive that are in flight at once; by default `default_depth`.
        chunk_bytes: the largest read in bytes, a multiple of 4096; below about 1 MiB the disk's full rate is not
            reached.
        prefetch_threads: how many of them may be for prefetches, so that the others are there when demand comes; by
            default half, up to two, which reach a disk's full rate with chunks of this size.
        token: the event loop that `on_landed` is called in; the running one by default.

    Raises:
        ConfigError: there is no file, a number is out of range, or a mirror has not as many files.
    """

    engine: ClassVar[str]
    default_depth: ClassVar[int] = DEFAULT_THREADS

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        mirrors: Sequence[Sequence[str | os.PathLike[str]]] = (),
        expected: Sequence[FileIdentity] | None = None,
        n_threads: int | None = None,
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
        self.chunk_bytes = chunk_bytes
        self._token = token
        self.depth = self.default_depth if n_threads is None else n_threads
        self._queue = ChunkQueue(
            n_copies=1 + len(mirrors),
            n_threads=self.depth,
            chunk_bytes=chunk_bytes,
            prefetch_threads=min(2, max(1, self.depth // 2)) if prefetch_threads is None else prefetch_threads,
        )
        self._drives: tuple[tuple[ModelFile, ...], ...] = ()  # of each copy, its files
        self._ended: list[Work] = []  # operations that the trio thread has yet to end
        self._told = False  # whether it is about to
        self._open = False  # written in the trio thread
        self._disowned = False
        self._failure: str | None = None  # why nothing can be read any more
        self._listeners: list[Callable[[str], None]] = []  # of the failure
        self._meter = ReadMeter()

    def __enter__(self) -> Self:
        """Open the files and get ready to read.

        Raises:
            ReadError: a file cannot be opened or read.
            FileChanged: a file is not the one whose header was read.
            MirrorMismatch: a mirror differs from the files.
            ConfigError: the system refuses what reading needs, or a mirror is one of the files itself.
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
        self._drives = tuple(map(tuple, opened))
        self._open = True
        self._get_ready()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @abc.abstractmethod
    def _get_ready(self) -> None:
        """Start what reads; closes the files if that raises."""

    @abc.abstractmethod
    def close(self) -> None:
        """Refuse further reads and give up those that have not begun; returns at once. Closing twice is allowed."""

    def disown(self) -> None:
        """Leave everything as it is, for good, in a forked child: files, ring and threads are the parent's."""
        self._disowned, self._open = True, False

    @abc.abstractmethod
    def start(self, *operations: ReadOperation) -> None:
        """Begin reads; see `Reader.start`."""

    @abc.abstractmethod
    def promote(self, operation: ReadOperation, priority: Priority) -> None:
        """Raise an operation's priority; see `Reader.promote`."""

    @abc.abstractmethod
    def cancel(self, operation: ReadOperation) -> None:
        """Leave what was not begun unread; see `Reader.cancel`."""

    @abc.abstractmethod
    def write_off(self, operation: ReadOperation) -> None:
        """Count no longer on reads that hang; see `Reader.write_off`."""

    @abc.abstractmethod
    def stalled_s(self, operation: ReadOperation) -> float:
        """Return how long the oldest read of an operation has been in flight; see `Reader.stalled_s`."""

    @abc.abstractmethod
    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read; known once the reader is open."""
        return tuple(file.mode for file in self._drives[0])

    @property
    def paths(self) -> tuple[str, ...]:
        """The files."""
        return self._paths

    def _statistics(self) -> ReaderStatistics:
        now_s = time.monotonic()
        copies = tuple(
            copy.statistics(tuple(str(file.path) for file in files), tuple(file.mode for file in files), now_s)
            for copy, files in zip(self._queue.copies, self._drives, strict=True)
        )
        return self._meter.statistics(
            now_s,
            engine=self.engine,
            queued_bytes=self._queue.queued_bytes(),
            written_off=self._queue.written_off,
            copies=copies,
        )

    def _check(self, operations: Iterable[ReadOperation]) -> None:
        """Refuse operations that cannot be started, see `Reader.start`."""
        if not self._open:
            raise EngineClosed("the reader is closed")
        for operation in operations:
            check_operation(operation, self._drives[0][operation.file].mode.alignment)

    def _note(self, ended: list[Work]) -> bool:
        """Remember what has ended; returns whether the trio thread is to be told."""
        if not ended:
            return False
        self._ended += ended
        told, self._told = self._told, True
        return not told

    def _tell(self, told: bool) -> None:
        """Have the trio thread end the operations that have ended, unless it will anyway."""
        if told:
            assert self._token is not None
            with contextlib.suppress(trio.RunFinishedError):  # no task is left to tell
                self._token.run_sync_soon(self._land)

    @contextlib.contextmanager
    def telling(self, on_failure: Callable[[str], None]) -> Iterator[None]:
        """Call `on_failure` in the trio thread, with the reason, if the reader fails during the block or has before."""
        if self._failure is not None:
            on_failure(self._failure)
        self._listeners.append(on_failure)
        try:
            yield
        finally:
            self._listeners.remove(on_failure)

    def _fail(self, error: BaseException) -> None:
        """Stop reading after an error that is a defect; in the trio thread."""
        self._failure = f"reading has stopped: {type(error).__name__}: {error}"
        for listener in list(self._listeners):
            listener(self._failure)
        self.close()  # or idle threads would wait for ever

    @abc.abstractmethod
    def _land(self) -> None:
        """Call back the operations that have ended, in the trio thread."""

    def _finish_all(self, ended: list[Work]) -> None:
        """End operations, in the trio thread and in no call."""
        now_s = time.monotonic()
        for work in ended:
            land(work, self._meter, now_s)

    def _close_files(self) -> None:
        for files in self._drives:
            for file in files:
                file.close()
