"""A simulated disk: a Reader on trio's clock whose bytes are a hash of their position."""

from __future__ import annotations

import errno
import heapq
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import attrs
import numpy as np
import trio
from numpy.typing import NDArray

from mer.errors import EngineClosed, ReadError
from mer.io.files import IoMode
from mer.io.metering import ReaderStatistics, ReadMeter
from mer.io.reader import ReadOperation, check_operation

ALIGNMENT = 4096


def content(seed: int, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return the bytes of a simulated file: the output of splitmix64 over the numbers of its 8-byte words."""
    first, last = offset // 8, -(-(offset + n_bytes) // 8)
    with np.errstate(over="ignore"):
        z = np.arange(first, last, dtype=np.uint64) + np.uint64(file << 40) + np.uint64(seed << 48)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z.view(np.uint8)[offset - first * 8 :][:n_bytes]


@attrs.frozen(kw_only=True)
class DiskProfile:
    """How fast the disk is and how often it fails; every draw comes from the disk's seed."""

    latency_s: float = 100e-6  # of an operation on an idle disk
    jitter: float = 1.0  # mean of an exponential factor on top: operations overtake each other
    bytes_per_s: float = 2e9  # shared by all operations
    stall_rate: float = 0.0  # how many operations take 500 times the latency
    error_rate: float = 0.0  # how many operations end with EIO


@attrs.define(eq=False)
class _BadRange:
    """A byte range that cannot be read."""

    file: int
    start: int
    end: int
    errno: int
    times_left: int | None  # None: for ever


@attrs.define(order=True)
class _InFlight:
    """One operation and when it ends."""

    due_s: float
    number: int
    started_s: float = attrs.field(order=False)
    operation: ReadOperation = attrs.field(order=False)


class SimDisk:
    """A Reader of simulated files, deterministic for a seed; to be made with `open_sim_disk`.

    An operation's memory is scribbled over when it starts and gets its bytes when it ends, so reading too early,
    and giving the memory away too soon, both show as wrong bytes. Two operations in flight that share memory
    are an AssertionError.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int = 0, profile: DiskProfile | None = None) -> None:
        self.sizes = list(sizes)  # bytes of each file; may be lowered to truncate one
        self.seed = seed
        self.profile = profile or DiskProfile()
        self.log: list[
            tuple[int, int, int]
        ] = []  # (file, start, length) of every operation, in the order of the starts
        self._random = random.Random(seed)
        self._heap: list[_InFlight] = []
        self._busy_until_s = 0.0
        self._bad: list[_BadRange] = []
        self._frozen = False
        self._closed = False
        self._changed = trio.Event()
        self._meter = ReadMeter()

    @property
    def modes(self) -> tuple[IoMode, ...]:
        """How each file is read: as if directly."""
        return tuple(IoMode(True, ALIGNMENT, "simulated") for _ in self.sizes)

    @property
    def in_flight(self) -> tuple[ReadOperation, ...]:
        """The operations started and not yet ended, in the order of the starts."""
        return tuple(item.operation for item in sorted(self._heap, key=lambda item: item.number))

    def content(self, file: int, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        """Return what a read must give."""
        return content(self.seed, file, offset, n_bytes)

    def start(self, operation: ReadOperation) -> None:
        """Begin a read; see `Reader.start`."""
        if self._closed:
            raise EngineClosed("the disk is closed")
        check_operation(operation, ALIGNMENT)
        for other in self.in_flight:
            assert not np.may_share_memory(operation.buffer, other.buffer), "two reads in flight share memory"
        operation.buffer[:] = ~self.content(operation.file, operation.start, operation.length)
        now_s = trio.current_time()
        self._busy_until_s = max(now_s, self._busy_until_s) + operation.length / self.profile.bytes_per_s
        latency_s = self.profile.latency_s * (1 + self.profile.jitter * self._random.expovariate(1))
        if self._random.random() < self.profile.stall_rate:
            latency_s *= 500
        heapq.heappush(self._heap, _InFlight(self._busy_until_s + latency_s, len(self.log), now_s, operation))
        self.log.append((operation.file, operation.start, operation.length))
        self._meter.start(now_s)
        self._changed.set()

    def statistics(self) -> ReaderStatistics:
        """Return a snapshot of what was read so far."""
        return self._meter.statistics(trio.current_time())

    def fail(self, file: int, start: int, end: int, *, number: int = errno.EIO, times: int | None = None) -> None:
        """Let reads that touch a byte range end with an error, for ever or so many times."""
        self._bad.append(_BadRange(file, start, end, number, times))

    def freeze(self) -> None:
        """Let no operation end until `thaw`."""
        self._frozen = True

    def thaw(self) -> None:
        """Undo `freeze`."""
        self._frozen = False
        self._changed.set()

    def close(self) -> None:
        """Refuse further reads; those in flight go on."""
        self._closed = True

    async def run(self) -> None:
        """End the operations when they are due, until cancelled."""
        while True:
            while not self._frozen and self._heap and self._heap[0].due_s <= trio.current_time():
                self._end(heapq.heappop(self._heap))
            self._changed = trio.Event()
            due_s = self._heap[0].due_s if self._heap and not self._frozen else float("inf")
            with trio.move_on_at(due_s):
                await self._changed.wait()

    def _end(self, item: _InFlight) -> None:
        operation = item.operation
        operation.error = self._error(operation)
        if operation.error is None:
            length = min(operation.length, self.sizes[operation.file] - operation.start)
            operation.buffer[:length] = self.content(operation.file, operation.start, length)
        now_s = trio.current_time()
        self._meter.end(operation.length, item.started_s, now_s, failed=operation.error is not None)
        operation.on_landed(operation)

    def _error(self, operation: ReadOperation) -> ReadError | None:
        path, start, end = f"sim-{operation.file}", operation.start, operation.start + operation.needed
        if end > self.sizes[operation.file]:
            return ReadError(path, start, operation.needed, f"file truncated: it ends at {self.sizes[operation.file]}")
        for bad in self._bad:
            if bad.file == operation.file and bad.start < end and start < bad.end and bad.times_left != 0:
                if bad.times_left is not None:
                    bad.times_left -= 1
                return ReadError(path, start, operation.needed, os.strerror(bad.errno), bad.errno)
        if self._random.random() < self.profile.error_rate:
            return ReadError(path, start, operation.needed, os.strerror(errno.EIO), errno.EIO)
        return None


@asynccontextmanager
async def open_sim_disk(
    sizes: Sequence[int], *, seed: int = 0, profile: DiskProfile | None = None
) -> AsyncIterator[SimDisk]:
    """Run a simulated disk with files of these sizes during the block; what is in flight at its end never ends."""
    async with trio.open_nursery() as nursery:
        disk = SimDisk(sizes, seed=seed, profile=profile)
        nursery.start_soon(disk.run)
        yield disk
        disk.close()
        nursery.cancel_scope.cancel()
