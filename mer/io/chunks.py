"""Queue that a reader's threads take chunks from: pure, without threads, files or a clock."""

from __future__ import annotations

import bisect
from math import inf
from operator import attrgetter
from typing import Final

import attrs

from mer.errors import ConfigError, ReadError
from mer.io.arena import PAGE_BYTES
from mer.io.copies import Copy
from mer.io.pool import Priority
from mer.io.reader import ReadOperation

DEFAULT_THREADS: Final = 4  # reads at once
DEFAULT_CHUNK_BYTES: Final = 2 * 1024 * 1024
_ALL_HANG: Final = "every thread hangs in a read"


@attrs.define(eq=False)
class Work:
    """The queue's record of one operation."""

    operation: ReadOperation
    path: str
    number: int  # in the order of the starts
    started_s: float
    wanted_s: float  # when it was started or last promoted
    unread: int = 0  # first byte that was never given to a thread
    queued: bool = True  # whether it is in its line
    again: list[Chunk] = attrs.Factory(list)  # failed on a copy, to be read from another
    reading: list[Chunk] = attrs.Factory(list)  # begun, thread not yet back
    error: ReadError | None = None
    cancelled: bool = False  # by its caller: chunks that fail are not read again
    incomplete: bool = False  # chunks were dropped because of that


@attrs.define(eq=False)
class Chunk:
    """A part of an operation that one thread reads from one copy."""

    work: Work
    begin: int  # in the operation's memory
    end: int
    copy: int = 0
    begun_s: float = 0.0
    tried: int = 0  # copies on which it failed, as bits
    error: ReadError | None = None  # of the first of them
    speculative: bool = False  # counts against the limit on prefetches
    probe: bool = False  # tries a copy that was left out
    written_off: bool = False


_number = attrgetter("number")


class ChunkQueue:
    """Cuts operations into chunks and gives them to threads, by priority and then in the order of the starts.

    Several copies of the files may be read from. A thread belongs to one copy and takes its next chunk when it is
    ready, so that each copy's share follows its rate. At the end of the queue a slow copy leaves the last chunks to the
    others if, by the measured rates, they will have read all of them before it has read one. A chunk that fails on one
    copy is given to the others before its operation fails. A copy that fails three times in a row is left out for 2 s,
    then for twice as long each time, up to a minute; after that one chunk tries it.

    The caller makes one call at a time, under a lock if there are threads. Times are in seconds on any one clock that
    does not go back.

    Args:
        n_copies: number of identical copies of the files.
        n_threads: threads of each.
        chunk_bytes: the largest chunk.
        prefetch_threads: threads that may read chunks of prefetches at once, of all copies together.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        *,
        n_copies: int = 1,
        n_threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        prefetch_threads: int = 1,
    ) -> None:
        if n_threads < 1:
            raise ConfigError(f"a reader needs at least 1 thread, not {n_threads}")
        if prefetch_threads < 1:
            raise ConfigError(f"prefetches need at least 1 thread, not {prefetch_threads}")
        if chunk_bytes < PAGE_BYTES or chunk_bytes % PAGE_BYTES:
            raise ConfigError(
                f"chunks of {chunk_bytes} bytes are not a multiple of {PAGE_BYTES}; try {DEFAULT_CHUNK_BYTES}"
            )
        self.written_off = 0  # operations whose reads hung
        self.copies = tuple(Copy(n_threads, alone=n_copies == 1) for _ in range(n_copies))
        self._chunk_bytes = chunk_bytes
        self._prefetch_threads = prefetch_threads
        self._lines: tuple[list[Work], ...] = tuple([] for _ in Priority)
        self._works: dict[ReadOperation, Work] = {}  # not yet ended, in the order of the starts
        self._speculative = 0  # chunks of prefetches being read
        self._number = 0
        # of each copy, the chunks that it leaves to the others: where they begin, since when
        self._left: list[dict[Work, tuple[int, float]]] = [{} for _ in range(n_copies)]

    @property
    def operations(self) -> tuple[ReadOperation, ...]:
        """The operations that have not ended, in the order of the starts."""
        return tuple(self._works)

    def queued_bytes(self) -> tuple[int, ...]:
        """Return how many bytes of each priority no thread has begun to read."""
        return tuple(
            sum(
                work.operation.length - work.unread + sum(chunk.end - chunk.begin for chunk in work.again)
                for work in line
            )
            for line in self._lines
        )

    def add(self, operation: ReadOperation, path: str, now_s: float) -> list[Work]:
        """Put an operation in line; return the operations that have ended: all in line if no thread is left to read."""
        self._line_up(operation, path, now_s)
        return [] if any(copy.working for copy in self.copies) else self._give_up_all(_ALL_HANG)

    def add_begun(self, operation: ReadOperation, path: str, now_s: float) -> Chunk:
        """Add an operation of one chunk that is in flight on the first copy already; return the chunk."""
        chunk = self._cut(self._line_up(operation, path, now_s))
        assert chunk.end == operation.length
        return self._begin(chunk, 0, now_s)

    def _line_up(self, operation: ReadOperation, path: str, now_s: float) -> Work:
        work = Work(operation, path, self._number, now_s, now_s)
        self._number += 1
        self._works[operation] = work
        self._lines[operation.priority].append(work)
        return work

    def promote(self, operation: ReadOperation, priority: Priority, now_s: float) -> None:
        """Move an operation that has not ended to a higher priority, among those started before and after it."""
        work = self._works.get(operation)
        if work is None or priority == operation.priority:
            return
        queued = work.queued
        if queued:
            self._leave_line(work)
        operation.priority = priority
        work.wanted_s = now_s
        for chunk in work.reading:
            self._drop_speculation(chunk)
        if queued:
            self._enter_line(work)

    def cancel(self, operation: ReadOperation) -> list[Work]:
        """Drop the chunks of an operation that were not begun; return the operations that have ended."""
        work = self._works.get(operation)
        if work is None:
            return []
        work.cancelled = True
        if not work.queued:
            return []
        work.incomplete = True
        return self._give_up(work, self._failure(work, "cancelled before all of it was read"))

    def write_off(self, operation: ReadOperation, now_s: float) -> tuple[list[Work], list[int]]:
        """Cancel an operation and no longer count on the threads that read it.

        Returns:
            The operations that have ended, and the copies that are to get a new thread each, counted already.
        """
        work = self._works.get(operation)
        if work is None:
            return [], []
        ended = self.cancel(operation)
        bereft = []
        hanging = [chunk for chunk in work.reading if not chunk.written_off]
        self.written_off += bool(hanging)
        for chunk in hanging:
            chunk.written_off = True
            self._drop_speculation(chunk)
            copy = self.copies[chunk.copy]
            copy.leave_alone(now_s)
            if copy.threads < 2 * copy.n_threads:
                copy.threads += 1
                bereft.append(chunk.copy)
        return ended, bereft

    def lose_thread(self, copy: int) -> list[Work]:
        """Note that a thread counted on will never run; return the operations that end as no thread is left."""
        self.copies[copy].threads -= 1
        return self.end_hopeless()

    def end_hopeless(self) -> list[Work]:
        """After a `write_off`, fail the operations that no thread is left to read; return those that have ended."""
        if not any(copy.working for copy in self.copies):
            return self._give_up_all(_ALL_HANG)
        ended = []
        for line in self._lines:
            for work in list(line):
                lost = next((chunk for chunk in work.again if not self._untried(chunk)), None)
                if lost is not None:
                    assert lost.error is not None
                    ended += self._give_up(work, lost.error)
        return ended

    def close(self) -> list[Work]:
        """Drop all chunks that were not begun; return the operations that have ended."""
        return self._give_up_all("the reader was closed before the read began")

    def stalled_s(self, operation: ReadOperation, now_s: float) -> float:
        """Return how long ago the oldest chunk in flight was begun; 0 without any."""
        work = self._works.get(operation)
        if work is None or not work.reading:
            return 0.0
        return now_s - min(chunk.begun_s for chunk in work.reading)

    def take(self, copy: int, now_s: float) -> Chunk | float:
        """Give a thread of a copy its next chunk, or the time after which it should ask again.

        A thread that gets no chunk must also be woken when the queue has changed; with inf, only then.
        """
        ask_again_s = inf
        for priority, line in enumerate(self._lines):
            if priority == Priority.PREFETCH and self._speculative >= self._prefetch_threads:
                break
            for work in line:
                found = self._find(work, copy, now_s)
                if isinstance(found, Chunk):
                    return self._begin(found, copy, now_s)
                ask_again_s = min(ask_again_s, found)
        return ask_again_s

    def finish(self, chunk: Chunk, error: ReadError | None, now_s: float) -> list[Work]:
        """Note how a chunk that was taken has ended; return the operations that have ended with it."""
        work, copy = chunk.work, self.copies[chunk.copy]
        work.reading.remove(chunk)
        self._drop_speculation(chunk)
        if chunk.written_off:
            copy.come_back()
        elif error is not None:
            copy.fail(now_s, probe=chunk.probe)
        else:
            copy.succeed(chunk.end - chunk.begin, chunk.begun_s, now_s)
        if error is not None and work.error is None:
            chunk.tried |= 1 << chunk.copy
            chunk.error = chunk.error or error
            if work.cancelled or not self._untried(chunk):
                return self._give_up(work, chunk.error)
            chunk.probe = False
            work.again.append(chunk)
            if not work.queued:
                self._enter_line(work)
        return self._end(work)

    def dismiss(self, copy: int) -> bool:
        """Return whether a thread that was written off and has come back should end, and if so count it out."""
        this = self.copies[copy]
        if this.working <= this.n_threads:
            return False
        this.threads -= 1
        return True

    def _find(self, work: Work, copy: int, now_s: float) -> Chunk | float:
        """Return the chunk of an operation that a copy may read now, or after which time it may."""
        if len(self.copies) == 1:
            return self._cut(work)
        ask_again_s = inf
        for chunk in work.again:
            wait_s = self._wait_s(copy, chunk.tried, now_s)
            if wait_s == 0:
                return chunk
            ask_again_s = min(ask_again_s, wait_s)
        if work.unread < work.operation.length:
            wait_s = self._wait_s(copy, 0, now_s) or self._patience_s(work, copy, now_s)
            if wait_s == 0:
                return self._cut(work)
            ask_again_s = min(ask_again_s, wait_s)
        return ask_again_s

    def _cut(self, work: Work) -> Chunk:
        return Chunk(work, work.unread, min(work.unread + self._chunk_bytes, work.operation.length))

    def _begin(self, chunk: Chunk, copy: int, now_s: float) -> Chunk:
        work, this = chunk.work, self.copies[copy]
        if chunk.tried:
            work.again.remove(chunk)
        else:
            work.unread = chunk.end
        if work.unread == work.operation.length and not work.again:
            self._leave_line(work)
        chunk.copy = copy
        chunk.begun_s = now_s
        chunk.probe = this.breaker.allows(now_s) and this.breaker.begin()
        if work.operation.priority == Priority.PREFETCH:
            chunk.speculative = True
            self._speculative += 1
        work.reading.append(chunk)
        this.begin(now_s)
        self._left[copy].clear()
        return chunk

    def _wait_s(self, copy: int, tried: int, now_s: float) -> float:
        """Return the time after which a copy may read a chunk that failed on others: 0 for now, inf for never."""
        if tried >> copy & 1:
            return inf
        this = self.copies[copy]
        if this.breaker.allows(now_s):
            return 0.0
        for number, other in enumerate(self.copies):
            if number != copy and not tried >> number & 1 and other.in_force:
                return this.breaker.next_try_s(now_s) or inf
        return 0.0  # better a copy that is left out than none

    def _patience_s(self, work: Work, copy: int, now_s: float) -> float:
        """Return how long a slow copy should leave the next chunk to the others: 0 if it should take it.

        It should not if the others would have read the whole queue before this copy had read one chunk. It waits no
        longer for them than its own read would take: they may hang.
        """
        # A copy could remember only the last operation that it left. But with two in line its patience would begin anew
        # each time it asks, so that it never read and asked without end: so `_left` keeps a time for each.
        this = self.copies[copy]
        mine = this.s_per_byte(now_s)
        if mine is None:
            return 0.0
        rate, fastest = 0.0, inf  # of the others: bytes per second together, seconds per byte of the fastest thread
        for other in self.copies:
            theirs = None if other is this or not other.in_force else other.s_per_byte(now_s)
            if theirs is not None:
                rate += other.working / theirs
                fastest = min(fastest, theirs)
        chunk_bytes = min(self._chunk_bytes, work.operation.length - work.unread)
        mine_s = chunk_bytes * mine
        if rate == 0 or max(chunk_bytes * fastest, sum(self.queued_bytes()) / rate) >= mine_s:
            return 0.0
        begin, since_s = self._left[copy].get(work, (-1, 0.0))
        if begin != work.unread:
            since_s = now_s
            self._left[copy][work] = work.unread, now_s
        return max(0.0, since_s + mine_s - now_s)

    def _untried(self, chunk: Chunk) -> bool:
        """Return whether there is a copy, with threads to read it, on which a chunk has not failed."""
        return any(not chunk.tried >> number & 1 and copy.working for number, copy in enumerate(self.copies))

    def _drop_speculation(self, chunk: Chunk) -> None:
        if chunk.speculative:
            chunk.speculative = False
            self._speculative -= 1

    def _enter_line(self, work: Work) -> None:
        bisect.insort(self._lines[work.operation.priority], work, key=_number)
        work.queued = True

    def _leave_line(self, work: Work) -> None:
        self._lines[work.operation.priority].remove(work)
        work.queued = False
        for left in self._left:
            left.pop(work, None)

    def _failure(self, work: Work, reason: str) -> ReadError:
        return ReadError(work.path, work.operation.start, work.operation.needed, reason)

    def _give_up(self, work: Work, error: ReadError) -> list[Work]:
        """Drop the chunks of an operation that have not begun; return it if it has ended."""
        work.error = error
        work.again.clear()
        if work.queued:
            self._leave_line(work)
        return self._end(work)

    def _give_up_all(self, reason: str) -> list[Work]:
        queued = [work for line in self._lines for work in line]
        return [ended for work in queued for ended in self._give_up(work, self._failure(work, reason))]

    def _end(self, work: Work) -> list[Work]:
        if work.queued or work.reading:
            return []
        del self._works[work.operation]
        return [work]
