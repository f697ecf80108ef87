"""Fetches of experts into leased slots: at most one in flight per expert, tried again, given up and counted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Final

import attrs
import trio

from mer.errors import ConfigError, EngineClosed, FileSuspended, ReadError, ReadTimeout
from mer.io.arena import Arena
from mer.io.breaker import CircuitBreaker
from mer.io.extents import ExpertKey, ExpertMap, SlotClasses, aligned_hull
from mer.io.fetch import Fetch, FetchListener
from mer.io.fetch_counts import ClassCounts, FetcherStatistics, ReadCounts
from mer.io.patient import delay_s
from mer.io.pool import BufferPool, Priority, SlotState
from mer.io.reader import Reader, ReadOperation
from mer.io.stalls import StallWatch
from mer.units import format_duration

DEFAULT_READ_DEADLINE_S: Final = 30.0


class Fetcher:
    """Brings experts from their files into slots.

    A fetch is one read for each matrix and no task: everything happens in synchronous calls and in the reader's
    callbacks, so cancelling a task that waits for a fetch never disturbs it. Any number of fetches started one after
    another are all in flight at once. `run` keeps the timers: without it, no read is tried again and none is given up.
    To be used from the trio thread alone.

    A read that fails with a transient error is tried again after 5, 10 and 50 ms, the failed matrix alone; see
    `mer.io.patient`. A fetch fails with the first of its reads that fails for good, at once: reads of it that have not
    begun are cancelled, and its slot is QUARANTINED until those that have are back, then FREE.

    A read is stuck when the reader has been at one chunk of it for `read_deadline_s`; waiting behind other reads does
    not count, nor does time in which the whole process was stopped. The fetch then fails with ReadTimeout and the
    reader replaces the threads.

    After five fetches in a row have failed for good in reads of one file, and none landed, new ones from this file are
    refused for 1 s, then for twice as long each time up to 60 s; after that one is let through to find out.

    Args:
        pool: the accounting of the slots.
        arena: their memory.
        classes: the sizes of the slots.
        expert_map: where every expert lies in the files.
        reader: reads them.
        read_deadline_s: see above.

    Raises:
        ConfigError: the slots have other sizes, the pool and the arena disagree, a file needs a coarser alignment, or
            the deadline is not positive.
    """

    def __init__(
        self,
        pool: BufferPool,
        arena: Arena,
        classes: SlotClasses,
        expert_map: ExpertMap,
        reader: Reader,
        *,
        read_deadline_s: float = DEFAULT_READ_DEADLINE_S,
    ) -> None:
        if pool.n_slots != arena.n_slots:
            raise ConfigError(f"the pool has {pool.n_slots} slots and the arena {arena.n_slots}")
        for slot in range(arena.n_slots):
            if pool.kind(slot) != arena.kind(slot):
                raise ConfigError(
                    f"slot {slot} has class {pool.kind(slot)} in the pool, {arena.kind(slot)} in the arena"
                )
        if arena.class_bytes != classes.slot_bytes:
            raise ConfigError(
                f"the experts need slots of {classes.slot_bytes} bytes, the arena has {arena.class_bytes}"
            )
        for number, mode in enumerate(reader.modes):
            if classes.alignment % mode.alignment:
                raise ConfigError(
                    f"file {number} is read at multiples of {mode.alignment} bytes, "
                    f"the slots are laid out for {classes.alignment}"
                )
        if not read_deadline_s > 0:
            raise ConfigError(f"a read deadline of {read_deadline_s} s is not positive; try {DEFAULT_READ_DEADLINE_S}")
        self._pool = pool
        self._arena = arena
        self._alignment = classes.alignment
        self._experts = expert_map.experts
        self._reader = reader
        self._in_flight: dict[ExpertKey, Fetch] = {}
        self._stalls = StallWatch(reader, read_deadline_s)
        self._retries: list[tuple[float, int, Fetch, int]] = []  # a heap: when, in which order, which part
        self._changed = trio.Event()
        self._breakers = [CircuitBreaker() for _ in reader.modes]  # per file
        self._classes = [ClassCounts() for _ in Priority]
        self._counts = ReadCounts()
        self._touched = bytearray(arena.n_slots)  # 1 for slots that something has been read into

    @property
    def bytes_read(self) -> int:
        """Bytes of experts read so far: the sum of the aligned hulls of the reads that landed."""
        return self._counts.bytes_read

    def expert_bytes(self, layer: int, expert: int) -> int:
        """Return the bytes of an expert's matrices."""
        return self._experts[layer][expert].n_bytes

    def in_flight(self, layer: int, expert: int) -> Fetch | None:
        """Return the fetch that is bringing an expert, or None."""
        return self._in_flight.get((layer, expert))

    @property
    def fetches(self) -> tuple[Fetch, ...]:
        """The fetches in flight, in the order of their starts."""
        return tuple(self._in_flight.values())

    def refusal(self, layer: int, expert: int) -> FileSuspended | None:
        """Return what `start` would raise because a file of this expert is left alone; None if it would not."""
        now_s = trio.current_time()
        for part in self._experts[layer][expert].parts:
            breaker = self._breakers[part.file]
            if not breaker.allows(now_s):
                return FileSuspended(
                    self._reader.paths[part.file],
                    part.offset,
                    part.n_bytes,
                    failures=breaker.failures_in_a_row,
                    next_try_s=breaker.next_try_s(now_s),
                )
        return None

    def start(
        self,
        layer: int,
        expert: int,
        slot: int,
        priority: Priority = Priority.DEMAND,
        listener: FetchListener | None = None,
    ) -> Fetch:
        """Start the reads of an expert into a leased slot (FILLING), the matrix of the outer stage last.

        The slot is the fetcher's from here on; it stays with the caller if this raises.

        Args:
            layer: of the expert.
            expert: its number.
            slot: where to.
            priority: of the reads.
            listener: called for what has landed; by default none is.

        Raises:
            EngineClosed: the reader is closed.
            FileSuspended: a file of this expert is left alone after several failures.
            RuntimeError: the slot is not FILLING or too small, or the expert is on its way already.
        """
        if (layer, expert) in self._in_flight:
            raise RuntimeError(f"expert {expert} of layer {layer} is on its way already")
        if self._pool.state(slot) is not SlotState.FILLING:
            raise RuntimeError(f"slot {slot} is {self._pool.state(slot).name}; lease it before fetching into it")
        refusal = self.refusal(layer, expert)
        if refusal is not None:
            self._counts.refused += 1
            raise refusal
        fetch = self._prepare(layer, expert, slot, priority, listener)
        self._start_reads(fetch, range(len(fetch.addresses)))
        self._note_fetch(fetch)
        return fetch

    def _note_fetch(self, fetch: Fetch) -> None:
        """Count a fetch whose reads have been started."""
        for file in fetch.files:
            if self._breakers[file].begin():
                fetch.begin_probe(file)
        self._in_flight[fetch.key] = fetch
        self._classes[fetch.priority].started += 1

    def promote(self, fetch: Fetch, priority: Priority) -> None:
        """Raise the priority of a fetch; what has been read is not read again.

        Raises:
            RuntimeError: the fetch is over.
            ValueError: the priority is lower than the fetch's.
        """
        self._check_in_flight(fetch)
        before = fetch.priority
        if not fetch.raise_priority(priority):
            return
        self._classes[before].promoted_out += 1
        self._classes[priority].promoted_in += 1
        for read in fetch.reads_in_flight:
            self._reader.promote(read, priority)

    def abandon(self, fetch: Fetch) -> None:
        """Give up a fetch that is not needed any more.

        Reads that have not begun are cancelled; the slot is QUARANTINED until the others land, then FREE. The expert
        counts as not in flight from here on, so it may be fetched again, into another slot. Its listener is not called
        any more.

        Raises:
            RuntimeError: the fetch is over.
        """
        self._check_in_flight(fetch)
        self._classes[fetch.priority].abandoned += 1
        self._give_up(fetch, None)

    @property
    def quiet(self) -> bool:
        """Whether no fetch is in flight and every file can be read: the reader may be lent to a job."""
        return not self._in_flight and all(breaker.closed for breaker in self._breakers)

    def landed_elsewhere(self, layer: int, expert: int, slot: int, lengths: Sequence[int]) -> None:
        """Count an expert that a job has read into a leased slot, which is READY from here on.

        Args:
            layer: of the expert.
            expert: its number.
            slot: where it is.
            lengths: bytes of its reads.
        """
        for part in self._experts[layer][expert].parts:
            self._breakers[part.file].succeeded()
        self._touched[slot] = 1
        self._pool.landed(slot)
        demand = self._classes[Priority.DEMAND]
        demand.started += 1
        demand.landed += 1
        self._counts.by_jobs += 1
        self._counts.reads_started += len(lengths)
        self._counts.reads_landed += len(lengths)
        self._counts.bytes_read += sum(lengths)

    def adopt(
        self,
        layer: int,
        expert: int,
        slot: int,
        listener: FetchListener,
        begun: Mapping[int, Callable[[ReadOperation], ReadOperation]],
    ) -> Fetch:
        """Go on with an expert that a job has begun to read into a leased slot; `start_rest` follows.

        Args:
            layer: of the expert.
            expert: its number.
            slot: where to.
            listener: called for what has landed.
            begun: for each part that the kernel reads already, what returns the operation that will land.
        """
        fetch = self._prepare(layer, expert, slot, Priority.DEMAND, listener)
        for part, adopted in begun.items():
            fetch.replace_read(part, adopted(fetch.read(part)))
        self._counts.by_jobs += 1
        self._counts.handed_over += 1
        self._note_started(fetch, list(begun))
        return fetch

    def start_rest(self, fetch: Fetch) -> None:
        """Start the reads of an adopted fetch that have not begun."""
        self._start_reads(fetch, [part for part in range(len(fetch.addresses)) if fetch.tries(part) == 0])
        self._note_fetch(fetch)

    def hold(self, fetch: Fetch) -> None:
        """Keep the slot of a fetch from being released, should it fail or be abandoned, until `let_go`.

        For a job of the inner stage while the last matrix is on its way. Holds are counted.

        Raises:
            RuntimeError: the matrices of the inner stage have not landed, or the fetch is over.
        """
        self._check_in_flight(fetch)
        fetch.hold()

    def let_go(self, fetch: Fetch) -> None:
        """Undo one `hold`.

        Raises:
            RuntimeError: nobody holds the fetch.
        """
        fetch.let_go()
        self._reclaim(fetch)

    async def run(self) -> None:
        """Try failed reads again and give up stuck ones when it is time, until cancelled."""
        while True:
            self._changed = trio.Event()
            now_s = trio.current_time()
            while self._retries and self._retries[0][0] <= now_s:
                _, _, fetch, index = heapq.heappop(self._retries)
                self._retry(fetch, index)
            if self._stalls.next_look_s <= now_s:
                self._stalls.look(now_s, self._read_stuck)
            with trio.move_on_at(min(self._stalls.next_look_s, self._retries[0][0] if self._retries else inf)):
                await self._changed.wait()

    def statistics(self) -> FetcherStatistics:
        """Return a snapshot."""
        now_s = trio.current_time()
        classes = tuple(counts.frozen() for counts in self._classes)
        return FetcherStatistics(
            started=sum(counts.started for counts in classes),
            landed=sum(counts.landed for counts in classes),
            failed=sum(counts.failed for counts in classes),
            abandoned=sum(counts.abandoned for counts in classes),
            in_flight=len(self._in_flight),
            promoted=sum(counts.promoted_out for counts in classes),
            by_priority=classes,
            reads_in_flight=self._stalls.n_reads,
            breaker_openings=sum(breaker.openings for breaker in self._breakers),
            files=tuple(breaker.statistics(now_s) for breaker in self._breakers),
            **self._counts.as_dict(),
        )

    def _prepare(self, layer: int, expert: int, slot: int, priority: Priority, listener: FetchListener | None) -> Fetch:
        """Return the fetch with its reads, none of them started."""
        extents = self._experts[layer][expert]
        layout = extents.layout(self._alignment)
        memory = self._arena.view(slot)
        if layout.n_bytes > len(memory):  # never write into the next slot
            raise RuntimeError(
                f"expert {expert} of layer {layer} needs {layout.n_bytes} bytes, slot {slot} has {len(memory)}"
            )
        parts, offsets = extents.parts, layout.part_offsets
        hulls = [aligned_hull(part.offset, part.n_bytes, self._alignment) for part in parts]
        base = self._arena.address(slot)
        addresses = tuple(base + begin + lead for begin, (_, _, lead) in zip(offsets, hulls, strict=True))
        fetch = Fetch(layer, expert, slot, addresses, priority, listener)
        fetch.plan(
            ReadOperation(
                file=part.file,
                start=start,
                length=length,
                needed=lead + part.n_bytes,
                buffer=memory[begin : begin + length],
                address=base + begin,
                on_landed=partial(self._read_landed, fetch, index),
                priority=priority,
                untouched=not self._touched[slot],
            )
            for index, (part, begin, (start, length, lead)) in enumerate(zip(parts, offsets, hulls, strict=True))
        )
        return fetch

    def _start_reads(self, fetch: Fetch, indices: Sequence[int]) -> None:
        self._reader.start(*[fetch.read(index) for index in indices])
        self._note_started(fetch, indices)

    def _note_started(self, fetch: Fetch, indices: Sequence[int]) -> None:
        """Account for reads that the reader has."""
        fetch.reads_begun(indices)
        for index in indices:
            self._stalls.begin(fetch.read(index), fetch)
        self._counts.reads_started += len(indices)
        if self._stalls.wind(trio.current_time()):
            self._changed.set()

    def _read_landed(self, fetch: Fetch, index: int, read: ReadOperation) -> None:
        """Account for one read that has ended, and for the whole fetch if that decides it."""
        self._stalls.end(read)
        fetch.read_ended(index)
        if read.error is None:
            self._counts.reads_landed += 1
            self._counts.bytes_read += read.length
            self._breakers[read.file].succeeded()
            fetch.end_probe(read.file)
        elif read.cancelled:
            self._counts.reads_cancelled += 1
        else:
            self._counts.reads_failed += 1
        if fetch.done:
            self._reclaim(fetch)
        elif read.error is None:
            self._part_landed(fetch, index)
        else:
            self._part_failed(fetch, index, read.error)

    def _part_landed(self, fetch: Fetch, index: int) -> None:
        if fetch.part_landed(index):
            del self._in_flight[fetch.key]
            self._classes[fetch.priority].landed += 1
            self._touched[fetch.slot] = 1
            self._pool.landed(fetch.slot)
            fetch.tell_end()

    def _part_failed(self, fetch: Fetch, index: int, error: ReadError) -> None:
        tries = fetch.tries(index)
        delay = delay_s(error, tries)
        if delay is None:
            final = error.after(tries)
            final.__cause__ = error
            self._fail(fetch, fetch.read(index).file, final)
            return
        heapq.heappush(self._retries, (trio.current_time() + delay, self._counts.reads_failed, fetch, index))
        self._changed.set()

    def _retry(self, fetch: Fetch, index: int) -> None:
        if fetch.done:
            return
        last = fetch.read(index)
        fetch.replace_read(index, attrs.evolve(last, priority=fetch.priority, error=None, cancelled=False))
        try:
            self._start_reads(fetch, (index,))
        except EngineClosed:
            assert last.error is not None
            self._fail(fetch, last.file, last.error.after(fetch.tries(index)))
        else:
            self._counts.retried += 1

    def _read_stuck(self, fetch: Fetch, read: ReadOperation, stalled_s: float) -> None:
        """Fail the fetch of a read that was written off."""
        if not fetch.done:
            self._counts.deadline_failures += 1
            path, reason = self._reader.paths[read.file], f"no answer for {format_duration(stalled_s)}"
            self._fail(fetch, read.file, ReadTimeout(path, read.start, read.needed, reason))

    def _fail(self, fetch: Fetch, file: int, error: ReadError) -> None:
        """End a fetch because a read of a file has failed for good."""
        self._breakers[file].failed(trio.current_time(), probe=fetch.end_probe(file))
        self._classes[fetch.priority].failed += 1
        self._give_up(fetch, error)
        fetch.tell_end()

    def _give_up(self, fetch: Fetch, error: ReadError | None) -> None:
        """End a fetch that has not landed; its slot is free once no read writes into it and no job holds it."""
        del self._in_flight[fetch.key]
        fetch.end(error)
        for file in fetch.probes:
            self._breakers[file].drop_probe()
        for read in fetch.reads_in_flight:
            self._reader.cancel(read)
        self._pool.quarantine(fetch.slot)
        self._reclaim(fetch)

    def _reclaim(self, fetch: Fetch) -> None:
        """Give back the slot of a fetch that did not land, if nothing needs it any more."""
        if not fetch.needs_slot:
            fetch.drop_reads()
            self._pool.reclaim(fetch.slot)

    def _check_in_flight(self, fetch: Fetch) -> None:
        if self._in_flight.get(fetch.key) is not fetch:
            raise RuntimeError(f"the fetch of expert {fetch.expert} of layer {fetch.layer} is not in flight")
