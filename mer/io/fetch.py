"""State of one fetch: its reads, their tries, and its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs
import trio

from mer.errors import ReadError
from mer.io.extents import ExpertKey
from mer.io.pool import Priority
from mer.io.reader import ReadOperation


class FetchListener(Protocol):
    """The part that asked for a fetch; neither call may raise."""

    def inner_landed(self, fetch: Fetch) -> None:
        """Take note that the matrices of the inner stage have landed while the last one has not."""

    def landed(self, fetch: Fetch) -> None:
        """Take note that a fetch has landed or failed.

        Its slot is READY, or FREE or QUARANTINED when `fetch.error` is set.
        """


@attrs.define(eq=False)
class Fetch:
    """The state of one fetch; its methods are the transitions, which the `Fetcher` drives.

    A fetch is in flight, all its parts missing at first, until it lands, fails or is abandoned. After that it keeps its
    slot while its reads are in flight or a job holds it; see `needs_slot`.

    Attributes:
        layer: of the expert.
        expert: its number in the layer.
        slot: where it goes; the fetch's own until it is done.
        addresses: where the bytes of each part begin in memory, one matrix each; valid once the part has landed.
        priority: of its reads.
        inner_landed: whether all parts but the last, which is the outer stage's, are in memory.
        done: whether it is over: landed, failed or abandoned.
        begun_s: when it was started.
        error: why it failed, or None.
    """

    layer: int
    expert: int
    slot: int
    addresses: tuple[int, ...]
    priority: Priority
    _listener: FetchListener | None
    begun_s: float = attrs.field(factory=trio.current_time, init=False)
    inner_landed: bool = attrs.field(default=False, init=False)
    done: bool = attrs.field(default=False, init=False)
    error: ReadError | None = attrs.field(default=None, init=False)
    _reads: list[ReadOperation] = attrs.field(factory=list, init=False)  # latest of each part, while it needs them
    _tries: list[int] = attrs.field(init=False)  # of each part
    _missing: set[int] = attrs.field(init=False)  # parts that have not landed
    _reading: set[int] = attrs.field(factory=set, init=False)  # parts whose latest read is in flight
    _probes: set[int] = attrs.field(factory=set, init=False)  # files that this fetch finds out about
    _holds: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._tries = [0] * len(self.addresses)
        self._missing = set(range(len(self.addresses)))

    @property
    def key(self) -> ExpertKey:
        """(layer, expert)"""
        return self.layer, self.expert

    @property
    def missing(self) -> frozenset[int]:
        """The numbers of the parts that have not landed."""
        return frozenset(self._missing)

    # --- reads ---

    def plan(self, reads: Iterable[ReadOperation]) -> None:
        """Take the reads of the parts in their order, none of them started."""
        self._reads[:] = reads

    def read(self, part: int) -> ReadOperation:
        """Return the latest read of a part."""
        return self._reads[part]

    def replace_read(self, part: int, read: ReadOperation) -> None:
        """Take another read for a part whose latest one has failed, or which a job has begun."""
        self._reads[part] = read

    @property
    def files(self) -> set[int]:
        """Numbers of the files that it reads."""
        return {read.file for read in self._reads}

    @property
    def reads_in_flight(self) -> list[ReadOperation]:
        """Its reads that the reader has not ended."""
        return [self._reads[part] for part in self._reading]

    def tries(self, part: int) -> int:
        """Return how often a part has been read."""
        return self._tries[part]

    def reads_begun(self, parts: Sequence[int]) -> None:
        """Note that the reader has the latest reads of some parts."""
        for part in parts:
            self._tries[part] += 1
            self._reading.add(part)

    def read_ended(self, part: int) -> None:
        """Note that the latest read of a part has landed, failed or been cancelled."""
        self._reading.discard(part)

    # --- files that have failed before ---

    def begin_probe(self, file: int) -> None:
        """Note that this fetch finds out whether a file can be read again."""
        self._probes.add(file)

    def end_probe(self, file: int) -> bool:
        """Note that this is found out; return whether this fetch was to do so."""
        was_probe = file in self._probes
        self._probes.discard(file)
        return was_probe

    @property
    def probes(self) -> frozenset[int]:
        """Numbers of the files that it finds out about."""
        return frozenset(self._probes)

    # --- who wants it ---

    def hand_over(self, listener: FetchListener) -> None:
        """Replace the listener: the new one is called for what lands from here on."""
        self._listener = listener

    def raise_priority(self, priority: Priority) -> bool:
        """Raise the priority and return whether it was lower; the reads in flight are the caller's to promote.

        Raises:
            ValueError: the priority is lower than the fetch's.
        """
        if priority > self.priority:
            raise ValueError(f"a fetch of priority {self.priority.name} cannot be lowered to {priority.name}")
        was_lower = priority != self.priority
        self.priority = priority
        return was_lower

    def hold(self) -> None:
        """Keep its slot for a job until `let_go`, however the fetch ends; holds are counted.

        Raises:
            RuntimeError: the matrices of the inner stage have not landed.
        """
        if not self.inner_landed:
            raise RuntimeError(f"the inner matrices of expert {self.expert} of layer {self.layer} have not landed")
        self._holds += 1

    def let_go(self) -> None:
        """Undo one `hold`.

        Raises:
            RuntimeError: nobody holds it.
        """
        if not self._holds:
            raise RuntimeError(f"nobody holds the fetch of expert {self.expert} of layer {self.layer}")
        self._holds -= 1

    # --- its end ---

    def part_landed(self, part: int) -> bool:
        """Note that a part is in memory, tell the listener if only the last is missing; return whether none is.

        The fetch is done then. `tell_end` tells the listener.
        """
        self._missing.discard(part)
        if not self._missing:
            self.inner_landed = self.done = True
            self._reads.clear()  # they refer to the slot's memory, and back to the fetch
        elif not self.inner_landed and self._missing == {len(self.addresses) - 1}:
            self.inner_landed = True
            if self._listener is not None:
                self._listener.inner_landed(self)
        return not self._missing

    def end(self, error: ReadError | None) -> None:
        """Note that it has failed, or is abandoned if there is no error."""
        self.error = error
        self.done = True

    def tell_end(self) -> None:
        """Tell the listener that it has landed or failed; the slot must be in its new state."""
        if self._listener is not None:
            self._listener.landed(self)

    @property
    def needs_slot(self) -> bool:
        """Whether the slot must not be given to another expert: it has landed there, is read into, or is worked on."""
        return not self.done or not self._missing or bool(self._reading) or self._holds > 0

    def drop_reads(self) -> None:
        """Drop the reads of a fetch that no longer needs its slot."""
        self._reads.clear()
