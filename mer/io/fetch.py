"""Fetches of experts: three aligned reads into one leased slot, at most one fetch in flight per expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import attrs
import trio

from mer.errors import ConfigError, ReadError
from mer.io.arena import Arena
from mer.io.extents import ExpertMap, SlotClasses, aligned_hull
from mer.io.pool import BufferPool, SlotState
from mer.io.reader import Reader, ReadOperation

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""

_DOWN = 2  # index of the down projection: gate and up come before it in the order of parts


@attrs.define(eq=False)
class Fetch:
    """One expert on its way into a slot.

    Attributes:
        layer: of the expert.
        expert: its number in the layer.
        slot: where it goes; the fetch's own until it is done.
        addresses: where the bytes of gate, up and down begin in memory; valid to read after the wait for them.
        error: the first failure among its reads, or None.
    """

    layer: int
    expert: int
    slot: int
    addresses: tuple[int, int, int]
    error: ReadError | None = None
    _abandoned: bool = attrs.field(default=False, init=False)
    _parts_left: set[int] = attrs.field(factory=lambda: set(range(3)), init=False)  # not yet landed
    _gate_up_landed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _all_landed: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def key(self) -> ExpertKey:
        """(layer, expert)"""
        return self.layer, self.expert

    @property
    def done(self) -> bool:
        """Whether all three reads have ended, one way or the other."""
        return self._all_landed.is_set()

    async def wait_gate_up(self) -> None:
        """Wait until the gate and up matrices are in memory; the fetch goes on if the wait is cancelled.

        The slot is still FILLING then. If the down matrix fails later, the slot is released: work on gate and up
        must be over, or must be allowed to read garbage, when `on_done` reports the error.

        Raises:
            ReadError: a read that has ended by then has failed.
            RuntimeError: the fetch was abandoned.
        """
        await self._gate_up_landed.wait()
        self._raise_if_failed()

    async def wait(self) -> None:
        """Wait until all three matrices are in memory; the fetch goes on if the wait is cancelled.

        Raises:
            ReadError: a read has failed.
            RuntimeError: the fetch was abandoned.
        """
        await self._all_landed.wait()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._abandoned:
            raise RuntimeError(f"the fetch of expert {self.expert} of layer {self.layer} was abandoned")
        if self.error is not None:  # a new instance, as several tasks may raise it and each adds its traceback
            cause = self.error
            raise ReadError(cause.path, cause.offset, cause.n_bytes, cause.reason, cause.errno) from cause


@attrs.frozen(kw_only=True)
class FetcherStatistics:
    """A snapshot of a Fetcher.

    `started == landed + failed + abandoned + in_flight`, and the reads likewise.
    """

    started: int  # fetches
    joined: int  # starts of an expert that was already on its way
    landed: int
    failed: int
    abandoned: int
    in_flight: int
    reads_started: int
    reads_landed: int
    reads_failed: int
    reads_in_flight: int  # those of abandoned fetches included
    bytes_read: int  # sum of the aligned hulls of the reads that landed, of abandoned fetches too


@attrs.define
class _Counts:
    """What the Fetcher counts; named as in FetcherStatistics."""

    started: int = 0
    joined: int = 0
    landed: int = 0
    failed: int = 0
    abandoned: int = 0
    reads_started: int = 0
    reads_landed: int = 0
    reads_failed: int = 0
    bytes_read: int = 0


class Fetcher:
    """Brings experts from their files into slots.

    A fetch is three reads and no task: everything happens in synchronous calls and in the reader's callbacks, so
    cancelling a task that waits for a fetch never disturbs it. Any number of fetches started one after another are
    all in flight at once. To be used from the trio thread alone.

    Args:
        pool: the accounting of the slots.
        arena: their memory.
        classes: the sizes of the slots, and which experts go into which.
        expert_map: where every expert lies in the files.
        reader: reads them.
        on_done: told of every fetch that has ended and was not abandoned, after its slot has become READY, or FREE when
            `fetch.error` is set, and before any task that waits for it runs.

    Raises:
        ConfigError: a class has no slot or too small ones, the pool and the arena disagree, or a file needs a coarser
            alignment.
    """

    def __init__(
        self,
        pool: BufferPool,
        arena: Arena,
        classes: SlotClasses,
        expert_map: ExpertMap,
        reader: Reader,
        *,
        on_done: Callable[[Fetch], None] | None = None,
    ) -> None:
        if pool.n_slots != arena.n_slots:
            raise ConfigError(f"the pool has {pool.n_slots} slots and the arena {arena.n_slots}")
        if len(arena.class_bytes) != len(classes.slot_bytes) or any(
            have < needed for have, needed in zip(arena.class_bytes, classes.slot_bytes, strict=True)
        ):
            raise ConfigError(
                f"the experts need slots of {classes.slot_bytes} bytes, the arena has {arena.class_bytes}"
            )
        for number, mode in enumerate(reader.modes):
            if classes.alignment % mode.alignment:
                raise ConfigError(
                    f"file {number} is read at multiples of {mode.alignment} bytes, "
                    f"the slots are laid out for {classes.alignment}"
                )
        self._pool = pool
        self._arena = arena
        self._alignment = classes.alignment
        self._experts = expert_map.experts
        self._reader = reader
        self._on_done = on_done
        self._in_flight: dict[ExpertKey, Fetch] = {}
        self._counts = _Counts()

    def in_flight(self, layer: int, expert: int) -> Fetch | None:
        """Return the fetch that is bringing an expert, or None."""
        return self._in_flight.get((layer, expert))

    def start(self, layer: int, expert: int, slot: int) -> Fetch:
        """Start the reads of an expert into a leased slot (FILLING), gate and up before down, or join those under way.

        The slot is the fetcher's from here on. If the expert is already on its way into another slot, that fetch is
        returned and the slot given here goes back to the pool at once.

        Raises:
            EngineClosed: the reader is closed; the slot stays with the caller.
            RuntimeError: the slot is not FILLING, is too small, or this very fetch is already filling it.
        """
        if (fetch := self._in_flight.get((layer, expert))) is not None:
            if fetch.slot == slot:
                raise RuntimeError(f"slot {slot} is already being filled with expert {expert} of layer {layer}")
            self._pool.release(slot)
            self._counts.joined += 1
            return fetch
        if self._pool.state(slot) is not SlotState.FILLING:
            raise RuntimeError(f"slot {slot} is {self._pool.state(slot).name}; lease it before fetching into it")
        fetch, operations = self._prepare(layer, expert, slot)
        for operation in operations:
            self._reader.start(operation)
        self._in_flight[fetch.key] = fetch
        self._counts.started += 1
        self._counts.reads_started += len(operations)
        return fetch

    def abandon(self, fetch: Fetch) -> None:
        """Give up a fetch that nobody wants any more: its slot is QUARANTINED until its reads land, then FREE.

        The expert counts as not in flight from here on, so it may be fetched again, into another slot. Whoever
        still waits for the fetch gets RuntimeError; `on_done` is not called.

        Raises:
            RuntimeError: the fetch is done, or already abandoned.
        """
        if self._in_flight.get(fetch.key) is not fetch:
            raise RuntimeError(f"the fetch of expert {fetch.expert} of layer {fetch.layer} is not in flight")
        self._pool.quarantine(fetch.slot)
        del self._in_flight[fetch.key]
        fetch._abandoned = True
        fetch._gate_up_landed.set()
        fetch._all_landed.set()
        self._counts.abandoned += 1

    def statistics(self) -> FetcherStatistics:
        """Return a snapshot."""
        counts = self._counts
        return FetcherStatistics(
            **attrs.asdict(counts),
            in_flight=len(self._in_flight),
            reads_in_flight=counts.reads_started - counts.reads_landed - counts.reads_failed,
        )

    def _prepare(self, layer: int, expert: int, slot: int) -> tuple[Fetch, list[ReadOperation]]:
        """Return the fetch and its reads of gate, up and down, none of them started."""
        extents = self._experts[layer][expert]
        parts, layout = extents.parts, extents.layout(self._alignment)
        if layout.n_bytes > self._arena.slot_bytes(slot):  # never write into the next slot
            raise RuntimeError(
                f"expert {expert} of layer {layer} needs {layout.n_bytes} bytes, "
                f"slot {slot} has {self._arena.slot_bytes(slot)}"
            )
        offsets = layout.part_offsets
        hulls = [aligned_hull(part.offset, part.n_bytes, self._alignment) for part in parts]
        base = self._arena.address(slot)
        gate, up, down = (base + begin + lead for begin, (_, _, lead) in zip(offsets, hulls, strict=True))
        fetch = Fetch(layer, expert, slot, (gate, up, down))
        memory = self._arena.view(slot)
        operations = [
            ReadOperation(
                file=part.file,
                start=start,
                length=length,
                needed=lead + part.n_bytes,
                buffer=memory[begin : begin + length],
                on_landed=partial(self._read_landed, fetch, index),
            )
            for index, (part, begin, (start, length, lead)) in enumerate(zip(parts, offsets, hulls, strict=True))
        ]
        return fetch, operations

    def _read_landed(self, fetch: Fetch, index: int, operation: ReadOperation) -> None:
        """Account for one read that has ended, and for the whole fetch if it was the last."""
        if operation.error is None:
            self._counts.reads_landed += 1
            self._counts.bytes_read += operation.length
        else:
            self._counts.reads_failed += 1
            fetch.error = fetch.error or operation.error
        fetch._parts_left.discard(index)
        if fetch._parts_left <= {_DOWN}:
            fetch._gate_up_landed.set()
        if fetch._parts_left:
            return
        if fetch._abandoned:
            self._pool.reclaim(fetch.slot)
            return
        del self._in_flight[fetch.key]
        fetch._all_landed.set()
        if fetch.error is None:
            self._counts.landed += 1
            self._pool.landed(fetch.slot)
        else:
            self._counts.failed += 1
            self._pool.release(fetch.slot)
        if self._on_done is not None:
            self._on_done(fetch)
