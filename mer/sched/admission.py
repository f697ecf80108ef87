"""The queue in front of the scheduler: bounded, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType

import attrs
import trio

from mer.errors import EngineClosed
from mer.sched.sequence import Sequence


@attrs.define(eq=False)
class _Submitter:
    """A task that waits for a place in the queue."""

    sequence: Sequence
    decided: trio.Event = attrs.field(factory=trio.Event, init=False)
    queued: bool = attrs.field(default=False, init=False)


class Place:
    """A place that is kept in the queue for a sequence that is still being made; made by `AdmissionQueue.reserve`.

    It is a context manager: a place that no sequence has entered when the block ends, however it ends, is given back.
    Synchronous all through, so that no cancellation can lose a place.
    """

    def __init__(self, queue: AdmissionQueue) -> None:
        self._queue = queue
        self._kept = True

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._kept:
            self._kept = False
            self._queue._give_back()

    def enter(self, sequence: Sequence) -> None:
        """Queue the sequence that the place was kept for, after those that are queued by now.

        Raises:
            EngineClosed: the queue is closed.
        """
        assert self._kept, "one sequence to a place"
        if self._queue._closed:
            raise EngineClosed("the engine is closed")
        self._kept = False
        self._queue._n_kept -= 1
        self._queue._enter(sequence)


class AdmissionQueue:
    """Sequences that wait to be run, and the tasks that wait for a place among them.

    A place that becomes free is handed to the task that has waited longest, at once, so that newcomers do not overtake:
    tasks wait only while all places are taken or kept. For the same reason nobody gets a `Place` while a task waits.

    Args:
        n_places: sequences that may be queued.
    """

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._queue: deque[Sequence] = deque()
        self._line: deque[_Submitter] = deque()
        self._closed = False
        self._entered = 0
        self._n_kept = 0  # places reserved

    def __len__(self) -> int:
        """Return how many sequences are queued."""
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        """Yield the queued sequences in order."""
        return iter(self._queue)

    @property
    def entered(self) -> int:
        """How many sequences have ever been queued."""
        return self._entered

    @property
    def n_kept(self) -> int:
        """How many places are kept for sequences to come."""
        return self._n_kept

    @property
    def first(self) -> Sequence | None:
        """The sequence that is next."""
        return self._queue[0] if self._queue else None

    async def put(self, sequence: Sequence) -> None:
        """Queue a sequence, waiting in line while there is no place.

        If cancelled, the task leaves the line; a place that it was handed after the cancellation and before its turn
        to run stays taken, so that the caller marks the sequence as cancelled.

        Raises:
            EngineClosed: the queue is closed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._closed:
            raise EngineClosed("the engine is closed")
        if self._has_room:
            self._enter(sequence)
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        submitter = _Submitter(sequence)
        self._line.append(submitter)
        try:
            await submitter.decided.wait()
        except BaseException:
            if not submitter.decided.is_set():
                self._line.remove(submitter)
            raise
        if not submitter.queued:
            raise EngineClosed("the engine is closed")

    def reserve(self) -> Place:
        """Keep a place for a sequence to come, without waiting.

        The sequence could be made first and then be refused; but making one may take long, and a refused caller should
        know before.

        Raises:
            trio.WouldBlock: there is no place, so that `put` would wait.
            EngineClosed: the queue is closed.
        """
        if self._closed:
            raise EngineClosed("the engine is closed")
        if not self._has_room:
            raise trio.WouldBlock
        self._n_kept += 1
        return Place(self)

    def take(self) -> Sequence:
        """Remove the first sequence."""
        sequence = self._queue.popleft()
        self._serve_line()
        return sequence

    def remove_cancelled(self) -> list[Sequence]:
        """Remove the sequences that nobody wants any more, and return them."""
        removed = [sequence for sequence in self._queue if sequence.cancelled]
        for sequence in removed:
            self._queue.remove(sequence)
        self._serve_line()
        return removed

    def close(self) -> list[Sequence]:
        """Let every `put` raise EngineClosed, those that wait included, and return the sequences that were queued."""
        self._closed = True
        left = list(self._queue)
        self._queue.clear()
        while self._line:
            self._line.popleft().decided.set()
        return left

    @property
    def _has_room(self) -> bool:
        return len(self._queue) + self._n_kept < self._n_places

    def _give_back(self) -> None:
        self._n_kept -= 1
        self._serve_line()

    def _enter(self, sequence: Sequence) -> None:
        self._queue.append(sequence)
        self._entered += 1

    def _serve_line(self) -> None:
        """Hand free places to the tasks that have waited longest."""
        while self._line and self._has_room:
            submitter = self._line.popleft()
            self._enter(submitter.sequence)
            submitter.queued = True
            submitter.decided.set()
