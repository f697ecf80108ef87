"""A simulated disk: a Reader on trio's clock whose bytes are a hash of their position."""

from __future__ import annotations

import errno
import functools
import heapq
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from math import inf

import attrs
import numpy as np
import trio
from numpy.typing import NDArray

from mer.errors import EngineClosed, ReadError
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, Chunk, ChunkQueue, Work
from mer.io.file_reader import land
from mer.io.files import IoMode
from mer.io.metering import ReaderStatistics, ReadMeter
from mer.io.pool import Priority
from mer.io.reader import ReadOperation, check_operation, check_promotion
from mer.io.ring import RingAddresses

ALIGNMENT = 4096
_LEAST_WAIT_S = 1e-6  # sums of times are not exact: without it a look may come too early, and again at once, for ever


_BLOCK_BYTES = 1 << 16


def content(seed: int, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of a simulated file, read-only: what splitmix64 makes of the numbers of its 8-byte words."""
    first, last = offset // _BLOCK_BYTES, (offset + n_bytes - 1) // _BLOCK_BYTES
    blocks = [_block(seed, file, number) for number in range(first, last + 1)]
    found = blocks[0] if len(blocks) == 1 else np.concatenate(blocks) if blocks else np.zeros(0, np.uint8)
    return found[offset - first * _BLOCK_BYTES :][:n_bytes]


@functools.lru_cache(256)
def _block(seed: int, file: int, number: int) -> NDArray[np.uint8]:
    """Return one block of a file; most reads are of bytes that were read before."""
    n_words = _BLOCK_BYTES // 8
    with np.errstate(over="ignore"):
        z = np.arange(number * n_words, (number + 1) * n_words, dtype=np.uint64)
        z += np.uint64(file << 40) + np.uint64(seed << 48)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    block = z.view(np.uint8)
    block.flags.writeable = False
    return block


@attrs.frozen(kw_only=True)
class DiskProfile:
    """Speed and failures of a drive; every draw comes from the disk's seed.

    All rates are probabilities of one read of the drive, that is, of one chunk of an operation.
    """

    latency_s: float = 100e-6  # of a read on an idle drive
    jitter: float = 1.0  # mean of an exponential factor on top: reads overtake each other
    bytes_per_s: float = 2e9  # shared by all reads
    stall_rate: float = 0.0  # reads that take 500 times the latency
    error_rate: float = 0.0  # reads that end with one of the errors below
    error_numbers: tuple[int, ...] = (errno.EIO,)
    hang_rate: float = 0.0  # reads that never return, unless `SimDisk.let_return` is called
    flip_rate: float = 0.0  # reads that bring one wrong bit


@attrs.define(eq=False)
class _Fault:
    """A byte range that misbehaves."""

    file: int
    start: int
    end: int
    copy: int | None  # None: every copy
    errno: int | None  # None: reads hang
    times_left: int | None  # None: for ever


@attrs.define(order=True)
class _Read:
    """A chunk that is being read, and when that ends."""

    due_s: float
    number: int
    begun_s: float = attrs.field(order=False)
    chunk: Chunk = attrs.field(order=False)


class SimDisk:
    """A Reader of simulated files, deterministic for a seed; to be made with `open_sim_disk`.

    It is the production queue of chunks with simulated threads and drives: priorities, promotion, cancellation, several
    copies and threads that are written off behave as in `ThreadReader`, on trio's clock, which a MockClock lets jump.

    An operation's memory is scribbled over when it starts and gets its bytes when they are read, so reading too early,
    and giving the memory away too soon, both show as wrong bytes. Two operations in flight that share memory
    are an AssertionError.

    Attributes:
        sizes: bytes of each file; may be lowered to truncate one.
        seed: of the content and of every draw.
        profile: of the original; may be replaced at any time.
        depth: reads that each drive sees at once.
        mirrors: profiles of the further copies; may be replaced at any time.
        log: (file, start, length) of every operation, in the order of the starts.
        chunk_log: (copy, file, start, length) of every read of a drive, in the order in which they began.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        seed: int = 0,
        profile: DiskProfile | None = None,
        mirrors: Sequence[DiskProfile] = (),
        n_threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        prefetch_threads: int = 1,
    ) -> None:
        self.sizes = list(sizes)
        self.seed = seed
        self.profile = profile or DiskProfile()
        self.mirrors = list(mirrors)
        self.log: list[tuple[int, int, int]] = []
        self.chunk_log: list[tuple[int, int, int, int]] = []
        self._queue = ChunkQueue(
            n_copies=1 + len(mirrors), n_threads=n_threads, chunk_bytes=chunk_bytes, prefetch_threads=prefetch_threads
        )
        self._idle = [n_threads for _ in self._queue.copies]  # threads of each copy
        self._random = random.Random(seed)
        self._heap: list[_Read] = []
        self._hanging: list[_Read] = []
        self._busy_until_s = [0.0 for _ in self._queue.copies]
        self._look_again_s = inf  # when an idle thread may find something, though nothing has changed
        self._ended: list[Work] = []  # about to land
        self._faults: list[_Fault] = []
        self._frozen = False
        self._closed = False
        self._lent = False
        self.depth, self.chunk_bytes = n_threads, chunk_bytes
        self._job_reads: dict[int, ReadOperation] = {}  # by token
        self._adopted: list[ReadOperation] = []  # that have landed, and are to be told of once more
        self._changed = trio.Event()
        self._meter = ReadMeter()

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read: as if directly."""
        return tuple(IoMode(True, ALIGNMENT, "simulated") for _ in self.sizes)

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the files."""
        return tuple(f"sim-{number}" for number in range(len(self.sizes)))

    @property
    def in_flight(self) -> tuple[ReadOperation, ...]:
        """The operations started and not yet landed, in the order of the starts but for those about to land."""
        return (*(work.operation for work in self._ended), *self._queue.operations)

    def content(self, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Return what a read must give."""
        return content(self.seed, file, offset, n_bytes)

    # --- the Reader protocol ---

    def start(self, *operations: ReadOperation) -> None:
        """Begin reads; see `Reader.start`."""
        if self._closed:
            raise EngineClosed("the disk is closed")
        for operation in operations:
            check_operation(operation, ALIGNMENT)
        now_s = trio.current_time()
        for operation in operations:
            for other in self.in_flight:
                assert not np.may_share_memory(operation.buffer, other.buffer), "two reads in flight share memory"
            operation.buffer[:] = ~self.content(operation.file, operation.start, operation.length)
            self.log.append((operation.file, operation.start, operation.length))
            self._meter.start(now_s)
            self._ended += self._queue.add(operation, self.paths[operation.file], now_s)
        self._begin_reads(now_s)

    def promote(self, operation: ReadOperation, priority: Priority) -> None:
        """Raise an operation's priority; see `Reader.promote`."""
        check_promotion(operation, priority)
        now_s = trio.current_time()
        self._queue.promote(operation, priority, now_s)
        self._begin_reads(now_s)

    def cancel(self, operation: ReadOperation) -> None:
        """Leave what was not begun unread; see `Reader.cancel`."""
        self._ended += self._queue.cancel(operation)
        self._begin_reads(trio.current_time())

    def write_off(self, operation: ReadOperation) -> None:
        """Replace the threads that hang in an operation; see `Reader.write_off`."""
        now_s = trio.current_time()
        ended, bereft = self._queue.write_off(operation, now_s)
        for copy in bereft:
            self._idle[copy] += 1
        self._ended += ended + self._queue.end_hopeless()
        self._begin_reads(now_s)

    def stalled_s(self, operation: ReadOperation) -> float:
        """Return how long the oldest read of an operation has been in flight; see `Reader.stalled_s`."""
        return self._queue.stalled_s(operation, trio.current_time())

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        now_s = trio.current_time()
        copies = tuple(
            copy.statistics(tuple(f"{path}.{number}" if number else path for path in self.paths), self.modes, now_s)
            for number, copy in enumerate(self._queue.copies)
        )
        return self._meter.statistics(
            now_s,
            engine="simulated",
            queued_bytes=self._queue.queued_bytes(),
            written_off=self._queue.written_off,
            copies=copies,
        )

    # --- the Lender protocol ---

    @property
    def mirrored(self) -> bool:
        """Whether further drives have copies of the files."""
        return bool(self.mirrors)

    def lend(self) -> bool:
        """Leave the disk to a job; see `Lender.lend`."""
        if self._closed or self._lent or self.in_flight or self._adopted or self.mirrors:
            return False
        self._lent = True
        return True

    def ring_addresses(self) -> RingAddresses:
        """Return addresses at which nothing is: there is `start_for_job` instead."""
        return RingAddresses(fileno=-1, sq_tail=0, sq_mask=0, sqes=0, cq_head=0, cq_tail=0, cq_mask=0, cqes=0)

    def filenos(self) -> tuple[int, ...]:
        """Return the numbers of the files."""
        return tuple(range(len(self.sizes)))

    def start_for_job(self, operation: ReadOperation, token: int) -> None:
        """Begin a read for a job that was lent the disk."""
        assert self._lent
        self._job_reads[token] = operation
        self.start(operation)

    def take_back(self) -> None:
        """End the loan; see `Lender.take_back`."""
        assert self._lent
        self._lent = False

    def adopt(self, operation: ReadOperation, token: int, result: int | None, begun_s: float) -> ReadOperation:
        """Go on with a read that a job has begun; see `Lender.adopt`."""
        begun = self._job_reads[token]
        begun.on_landed = operation.on_landed
        if result is not None:
            self._adopted.append(begun)
            self._changed.set()
        return begun

    def account(self, lengths: Sequence[int], begun_s: float, ended_s: Sequence[float]) -> None:
        """Do nothing: reads of jobs are counted as all others are."""

    # --- faults ---

    def fail(
        self,
        file: int,
        start: int,
        end: int,
        *,
        number: int = errno.EIO,
        times: int | None = None,
        copy: int | None = None,
    ) -> None:
        """Let reads that touch a byte range end with an error, for ever or so many times, on one copy or on all."""
        self._faults.append(_Fault(file, start, end, copy, number, times))

    def hang(self, file: int, start: int, end: int, *, times: int | None = None, copy: int | None = None) -> None:
        """Let reads that touch a byte range never return, unless `let_return` is called."""
        self._faults.append(_Fault(file, start, end, copy, None, times))

    def heal(self) -> None:
        """Forget every `fail` and `hang`; reads that hang go on doing so."""
        self._faults.clear()

    def let_return(self) -> None:
        """Let all reads that hang end now, with the right bytes."""
        now_s = trio.current_time()
        for read in self._hanging:
            read.due_s = now_s
            heapq.heappush(self._heap, read)
        self._hanging.clear()
        self._changed.set()

    @property
    def hanging(self) -> tuple[tuple[int, int, int, int, float], ...]:
        """The reads that hang: (copy, file, start, length, when it began)."""
        return tuple((*self.chunk_log[read.number], read.begun_s) for read in self._hanging)

    @property
    def frozen(self) -> bool:
        """Whether `freeze` lets no read end."""
        return self._frozen

    def freeze(self) -> None:
        """Let no read end until `thaw`."""
        self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._frozen = False
        self._changed.set()

    # --- life ---

    def close(self) -> None:
        """Refuse further reads and give up those that have not begun; those being read go on."""
        if not self._closed:
            self._closed = True
            self._ended += self._queue.close()
            self._changed.set()

    async def run(self) -> None:
        """End the reads when they are due, until cancelled."""
        while True:
            now_s = trio.current_time()
            while not self._frozen and self._heap and self._heap[0].due_s <= now_s:
                self._end_read(heapq.heappop(self._heap), now_s)
                self._begin_reads(now_s)
            if self._look_again_s <= now_s:
                self._begin_reads(now_s)
            ended, self._ended = self._ended, []
            for work in ended:
                land(work, self._meter, now_s)
            adopted, self._adopted = self._adopted, []
            for operation in adopted:
                operation.on_landed(operation)
            if self._ended or self._adopted:  # by what those who were told did
                continue
            self._changed = trio.Event()
            due_s = self._heap[0].due_s if self._heap and not self._frozen else inf
            with trio.move_on_at(min(due_s, self._look_again_s)):
                await self._changed.wait()

    def _begin_reads(self, now_s: float) -> None:
        """Give the idle threads of every copy what they are to read."""
        self._look_again_s = inf
        for copy in range(len(self._queue.copies)):
            while self._idle[copy]:
                found = self._queue.take(copy, now_s)
                if not isinstance(found, Chunk):
                    self._look_again_s = min(self._look_again_s, now_s + max(found, _LEAST_WAIT_S))
                    break
                self._idle[copy] -= 1
                self._begin_read(found, now_s)
        self._changed.set()

    def _begin_read(self, chunk: Chunk, now_s: float) -> None:
        profile = self._profile(chunk)
        busy_until_s = max(now_s, self._busy_until_s[chunk.copy]) + (chunk.end - chunk.begin) / profile.bytes_per_s
        self._busy_until_s[chunk.copy] = busy_until_s
        latency_s = profile.latency_s * (1 + profile.jitter * self._random.expovariate(1))
        if self._random.random() < profile.stall_rate:
            latency_s *= 500
        read = _Read(busy_until_s + latency_s, len(self.chunk_log), now_s, chunk)
        operation = chunk.work.operation
        self.chunk_log.append((chunk.copy, operation.file, operation.start + chunk.begin, chunk.end - chunk.begin))
        if self._random.random() < profile.hang_rate or self._fault(chunk, hangs=True) is not None:
            self._hanging.append(read)
        else:
            heapq.heappush(self._heap, read)

    def _end_read(self, read: _Read, now_s: float) -> None:
        chunk = read.chunk
        operation = chunk.work.operation
        error = self._error(chunk)
        if error is None:
            start = operation.start + chunk.begin
            length = min(operation.start + chunk.end, self.sizes[operation.file]) - start
            if length > 0:
                arrived = operation.buffer[chunk.begin : chunk.begin + length]
                arrived[:] = self.content(operation.file, start, length)
                if self._random.random() < self._profile(chunk).flip_rate:
                    arrived[self._random.randrange(length)] ^= 1 << self._random.randrange(8)
        self._ended += self._queue.finish(chunk, error, now_s)
        if not (chunk.written_off and self._queue.dismiss(chunk.copy)):
            self._idle[chunk.copy] += 1

    def _profile(self, chunk: Chunk) -> DiskProfile:
        return self.mirrors[chunk.copy - 1] if chunk.copy else self.profile

    def _fault(self, chunk: Chunk, *, hangs: bool) -> _Fault | None:
        """Return the fault of one kind that a read meets, counted; None if there is none."""
        operation = chunk.work.operation
        start, end = operation.start + chunk.begin, operation.start + min(chunk.end, operation.needed)
        for fault in self._faults:
            if (
                fault.file == operation.file
                and fault.start < end
                and start < fault.end
                and fault.copy in (None, chunk.copy)
                and (fault.errno is None) == hangs
                and fault.times_left != 0
            ):
                if fault.times_left is not None:
                    fault.times_left -= 1
                return fault
        return None

    def _error(self, chunk: Chunk) -> ReadError | None:
        operation = chunk.work.operation
        path, start = self.paths[operation.file], operation.start + chunk.begin
        needed = min(operation.needed, chunk.end) - chunk.begin
        if start + needed > self.sizes[operation.file]:
            return ReadError(path, start, needed, f"file truncated: it ends at {self.sizes[operation.file]}")
        fault = self._fault(chunk, hangs=False)
        number = fault.errno if fault is not None else None
        profile = self._profile(chunk)
        if number is None and self._random.random() < profile.error_rate:
            number = self._random.choice(profile.error_numbers)
        return None if number is None else ReadError(path, start, needed, os.strerror(number), number)


@asynccontextmanager
async def open_sim_disk(
    sizes: Sequence[int],
    *,
    seed: int = 0,
    profile: DiskProfile | None = None,
    mirrors: Sequence[DiskProfile] = (),
    n_threads: int = DEFAULT_THREADS,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    prefetch_threads: int = 1,
) -> AsyncIterator[SimDisk]:
    """Run a simulated disk with files of these sizes during the block; what is in flight at its end never ends.

    Args:
        sizes: bytes of each file.
        seed: of the content and of every draw.
        profile: how fast it is and how often it fails.
        mirrors: profiles of further drives with identical copies of the files.
        n_threads: reads that each drive sees at once.
        chunk_bytes: the largest of them.
        prefetch_threads: how many of them may be for prefetches.
    """
    async with trio.open_nursery() as nursery:
        disk = SimDisk(
            sizes,
            seed=seed,
            profile=profile,
            mirrors=mirrors,
            n_threads=n_threads,
            chunk_bytes=chunk_bytes,
            prefetch_threads=prefetch_threads,
        )
        nursery.start_soon(disk.run)
        yield disk
        disk.close()
        nursery.cancel_scope.cancel()
