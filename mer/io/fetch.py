"""Fetches of experts: three aligned reads into one leased slot, at most one fetch in flight per expert."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Final, Protocol, TypeAlias

import attrs
import trio

from mer.errors import ConfigError, EngineClosed, FileSuspended, ReadError, ReadTimeout
from mer.io.arena import Arena
from mer.io.breaker import CircuitBreaker
from mer.io.extents import ExpertMap, SlotClasses, aligned_hull
from mer.io.fetch_counts import ClassCounts, FetcherStatistics, ReadCounts
from mer.io.job_reads import JobRead, JobReads
from mer.io.pool import BufferPool, SlotState
from mer.io.priority import Priority
from mer.io.reader import Reader, ReadOperation
from mer.io.retry import delay_s
from mer.units import format_duration

ExpertKey: TypeAlias = tuple[int, int]
"""(layer, expert)"""

DEFAULT_READ_DEADLINE_S: Final = 30.0
_ROUNDING_S: Final = 1e-6  # sums of times are not exact: without it a look may come too early, and again at once
_LOOK_EVERY_S: Final = 1.0
_LATE_S: Final = 1.0  # a look that comes so late: the process was stopped, or the event loop held up
_LOANS_TO_SKIP: Final = 64  # after reads that a job has not waited for: the disk is slow, and the way to it no matter
_DOWN: Final = 2  # index of the down projection: gate and up come before it in the order of parts


class FetchListener(Protocol):
    """Whoever has asked for a fetch; neither call may raise."""

    def inner_landed(self, fetch: Fetch) -> None:
        """Take note that gate and up matrices have landed while the down matrix has not."""

    def landed(self, fetch: Fetch) -> None:
        """Take note that a fetch has landed or failed, before any task that waits for it runs.

        Its slot is READY, or FREE or QUARANTINED when `fetch.error` is set.
        """


@attrs.define(eq=False)
class Fetch:
    """One expert on its way into a slot.

    Attributes:
        layer: of the expert.
        expert: its number in the layer.
        slot: where it goes; the fetch's own until it is done.
        addresses: where the bytes of gate, up and down begin in memory; valid to read after the wait for them.
        priority: of its reads; raised by `Fetcher.promote`.
        listener: told of what has landed; whoever takes the fetch over puts itself there.
        inner_landed: whether gate and up are in memory.
        done: whether it is over: landed, failed or abandoned.
        begun_s: when it was started.
        error: why it failed, or None.
    """

    layer: int
    expert: int
    slot: int
    addresses: tuple[int, int, int]
    priority: Priority
    listener: FetchListener | None
    begun_s: float = attrs.field(factory=trio.current_time, init=False)
    inner_landed: bool = attrs.field(default=False, init=False)
    done: bool = attrs.field(default=False, init=False)
    error: ReadError | None = attrs.field(default=None, init=False)
    _reads: list[ReadOperation] = attrs.field(factory=list, init=False)  # latest of gate, up, down, while it needs them
    _tries: list[int] = attrs.field(factory=lambda: [0, 0, 0], init=False)
    _missing: set[int] = attrs.field(factory=lambda: {0, 1, 2}, init=False)  # parts that have not landed
    _reading: set[int] = attrs.field(factory=set, init=False)  # parts whose latest read is in flight
    _probes: set[int] = attrs.field(factory=set, init=False)  # files that this fetch finds out about
    _holds: int = attrs.field(default=0, init=False)
    _abandoned: bool = attrs.field(default=False, init=False)
    _inner: trio.Event = attrs.field(factory=trio.Event, init=False)
    _over: trio.Event = attrs.field(factory=trio.Event, init=False)

    @property
    def key(self) -> ExpertKey:
        """(layer, expert)"""
        return self.layer, self.expert

    @property
    def missing(self) -> frozenset[int]:
        """The parts (gate 0, up 1, down 2) that have not landed."""
        return frozenset(self._missing)

    async def wait_gate_up(self) -> None:
        """Wait until the gate and up matrices are in memory; the fetch goes on if the wait is cancelled.

        The slot is still FILLING then, and the fetch may fail later: whoever works on the two matrices in place must
        `Fetcher.hold` it.

        Raises:
            ReadError: the fetch has failed.
            RuntimeError: the fetch was abandoned.
        """
        await self._inner.wait()
        self._raise_if_failed()

    async def wait(self) -> None:
        """Wait until all three matrices are in memory; the fetch goes on if the wait is cancelled.

        Raises:
            ReadError: the fetch has failed.
            RuntimeError: the fetch was abandoned.
        """
        await self._over.wait()
        self._raise_if_failed()

    def _raise_if_failed(self) -> None:
        if self._abandoned:
            raise RuntimeError(f"the fetch of expert {self.expert} of layer {self.layer} was abandoned")
        if self.error is not None:  # a new instance, as several tasks may raise it and each adds its traceback
            raise copy.copy(self.error) from self.error


class Fetcher:
    """Brings experts from their files into slots.

    A fetch is three reads and no task: everything happens in synchronous calls and in the reader's callbacks, so
    cancelling a task that waits for a fetch never disturbs it. Any number of fetches started one after another are
    all in flight at once. `run` keeps the timers: without it, no read is tried again and none is given up. To be used
    from the trio thread alone.

    A read that fails with a transient error is tried again after 5, 10 and 50 ms, the failed matrix alone; see
    `mer.io.retry`. A fetch fails with the first of its reads that fails for good, at once: reads of it that have not
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
        job_reads: what jobs that read by themselves are lent; by default none does.

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
        job_reads: JobReads | None = None,
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
        self._deadline_s = read_deadline_s
        self._job_reads = job_reads
        self._loans_to_skip = 0
        self._in_flight: dict[ExpertKey, Fetch] = {}
        self._outstanding: dict[ReadOperation, tuple[Fetch, int]] = {}  # started and not landed
        self._written_off: set[ReadOperation] = set()  # of them
        self._excused_s: dict[ReadOperation, float] = {}  # of them: how long nobody could hear of their end
        self._retries: list[tuple[float, int, Fetch, int]] = []  # a heap: when, in which order, which part
        self._next_look_s = inf  # when the outstanding reads are looked at for stuck ones
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
        """The fetches under way, in the order of their starts."""
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
        """Start the reads of an expert into a leased slot (FILLING), gate and up before down.

        The slot is the fetcher's from here on; it stays with the caller if this raises.

        Args:
            layer: of the expert.
            expert: its number.
            slot: where to.
            priority: of the reads.
            listener: told of what has landed, by default nobody.

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
        self._start_reads(fetch, range(3))
        self._note_fetch(fetch)
        return fetch

    def _note_fetch(self, fetch: Fetch) -> None:
        """Count a fetch whose reads have been started."""
        for file in {read.file for read in fetch._reads}:
            if self._breakers[file].begin():
                fetch._probes.add(file)
        self._in_flight[fetch.key] = fetch
        self._classes[fetch.priority].started += 1

    def promote(self, fetch: Fetch, priority: Priority) -> None:
        """Raise the priority of a fetch; what has been read is not read again.

        Raises:
            RuntimeError: the fetch is over.
            ValueError: the priority is lower than the fetch's.
        """
        self._check_in_flight(fetch)
        if priority > fetch.priority:
            raise ValueError(f"a fetch of priority {fetch.priority.name} cannot be lowered to {priority.name}")
        if priority == fetch.priority:
            return
        self._classes[fetch.priority].promoted_out += 1
        self._classes[priority].promoted_in += 1
        fetch.priority = priority
        for index in fetch._reading:
            self._reader.promote(fetch._reads[index], priority)

    def abandon(self, fetch: Fetch) -> None:
        """Give up a fetch that nobody wants any more.

        Reads that have not begun are cancelled; the slot is QUARANTINED until the others land, then FREE. The expert
        counts as not in flight from here on, so it may be fetched again, into another slot. Whoever still waits for
        the fetch gets RuntimeError; its listener hears nothing more.

        Raises:
            RuntimeError: the fetch is over.
        """
        self._check_in_flight(fetch)
        fetch._abandoned = True
        self._classes[fetch.priority].abandoned += 1
        self._give_up(fetch)

    def lend(self, kept: Sequence[ExpertKey]) -> JobReads | None:
        """Let a job make reads by itself, into slots of residents, until `take_back`.

        Args:
            kept: residents whose slots it must not take.

        Returns:
            What the job needs; None if the reader or a file does not allow it just now.
        """
        reads = self._job_reads
        if reads is None or self._in_flight or not all(breaker.closed for breaker in self._breakers):
            return None
        if self._loans_to_skip:
            self._loans_to_skip -= 1
            return None
        return reads if reads.lend([self._pool.has_free(kind) for kind in range(self._pool.n_kinds)], kept) else None

    def take_back(self, on_evicted: Callable[[ExpertKey], None], listener: FetchListener) -> list[JobRead]:
        """End the loan behind the job; return what it has begun to read, in order.

        Slots of experts that have landed are READY. The others are fetches in flight now, as if they had been started
        here.

        Args:
            on_evicted: told of every resident whose slot the job has taken; the slot must be FILLING afterwards.
            listener: told of these fetches.
        """
        assert self._job_reads is not None
        begun = self._job_reads.take_back()
        for read in begun:
            on_evicted(read.victim)
        for begun_s, together in itertools.groupby((read for read in begun if read.landed), lambda read: read.begun_s):
            self._account(begun_s, list(together))
        open_reads = [read for read in begun if not read.landed]
        self._counts.by_jobs += len(begun)
        self._counts.handed_over += len(open_reads)
        if any(read.late for read in open_reads):
            self._loans_to_skip = _LOANS_TO_SKIP
        fetches = [self._prepare(read.layer, read.expert, read.slot, Priority.DEMAND, listener) for read in open_reads]
        for read, fetch in zip(open_reads, fetches, strict=True):
            given = [part for part in range(3) if read.tokens[part] is not None]
            for part in given:
                token = read.tokens[part]
                assert token is not None
                operation, lender = fetch._reads[part], self._job_reads.lender
                fetch._reads[part] = lender.adopt(operation, token, read.results[part], read.begun_s)
            self._note_started(fetch, given)
        for read, fetch in zip(open_reads, fetches, strict=True):
            self._start_reads(fetch, [part for part in range(3) if read.tokens[part] is None])
            self._note_fetch(fetch)
        return begun

    def _account(self, begun_s: float, landed: Sequence[JobRead]) -> None:
        """Count what a job has read together."""
        assert self._job_reads is not None
        lengths: list[int] = []
        ended_s: list[float] = []
        for read in sorted(landed, key=lambda read: read.ended_s):
            ended_s += [read.ended_s] * 3
            lengths += read.lengths
            for part in self._experts[read.layer][read.expert].parts:
                self._breakers[part.file].succeeded()
            self._touched[read.slot] = 1
            self._pool.landed(read.slot)
        self._classes[Priority.DEMAND].started += len(landed)
        self._classes[Priority.DEMAND].landed += len(landed)
        self._counts.reads_started += len(lengths)
        self._counts.reads_landed += len(lengths)
        self._counts.bytes_read += sum(lengths)
        self._job_reads.lender.account(lengths, begun_s, ended_s)

    def hold(self, fetch: Fetch) -> None:
        """Keep the slot of a fetch from being released, should it fail or be abandoned, until `let_go`.

        For a job that works on the gate and up matrices while down is on its way. Holds are counted.

        Raises:
            RuntimeError: gate and up have not landed, or the fetch is over.
        """
        self._check_in_flight(fetch)
        if not fetch.inner_landed:
            raise RuntimeError(f"gate and up of expert {fetch.expert} of layer {fetch.layer} have not landed")
        fetch._holds += 1

    def let_go(self, fetch: Fetch) -> None:
        """Undo one `hold`.

        Raises:
            RuntimeError: nobody holds the fetch.
        """
        if not fetch._holds:
            raise RuntimeError(f"nobody holds the fetch of expert {fetch.expert} of layer {fetch.layer}")
        fetch._holds -= 1
        self._reclaim(fetch)

    async def run(self) -> None:
        """Try failed reads again and give up stuck ones when it is time, until cancelled."""
        while True:
            self._changed = trio.Event()
            now_s = trio.current_time()
            while self._retries and self._retries[0][0] <= now_s:
                _, _, fetch, index = heapq.heappop(self._retries)
                self._retry(fetch, index)
            if self._next_look_s <= now_s:
                self._look_for_stuck(now_s)
            with trio.move_on_at(min(self._next_look_s, self._retries[0][0] if self._retries else inf)):
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
            reads_in_flight=len(self._outstanding),
            breaker_openings=sum(breaker.openings for breaker in self._breakers),
            files=tuple(breaker.statistics(now_s) for breaker in self._breakers),
            **self._counts.as_dict(),
        )

    def _prepare(self, layer: int, expert: int, slot: int, priority: Priority, listener: FetchListener | None) -> Fetch:
        """Return the fetch with its reads of gate, up and down, none of them started."""
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
        gate, up, down = (base + begin + lead for begin, (_, _, lead) in zip(offsets, hulls, strict=True))
        fetch = Fetch(layer, expert, slot, (gate, up, down), priority, listener)
        fetch._reads += [
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
        ]
        return fetch

    def _start_reads(self, fetch: Fetch, indices: Sequence[int]) -> None:
        self._reader.start(*[fetch._reads[index] for index in indices])
        self._note_started(fetch, indices)

    def _note_started(self, fetch: Fetch, indices: Sequence[int]) -> None:
        """Account for reads that the reader has."""
        for index in indices:
            fetch._tries[index] += 1
            fetch._reading.add(index)
            self._outstanding[fetch._reads[index]] = fetch, index
        self._counts.reads_started += len(indices)
        if self._next_look_s == inf:
            self._next_look_s = trio.current_time() + min(self._deadline_s, _LOOK_EVERY_S)
            self._changed.set()

    def _read_landed(self, fetch: Fetch, index: int, read: ReadOperation) -> None:
        """Account for one read that has ended, and for the whole fetch if that decides it."""
        del self._outstanding[read]
        self._written_off.discard(read)
        self._excused_s.pop(read, None)
        fetch._reading.discard(index)
        if read.error is None:
            self._counts.reads_landed += 1
            self._counts.bytes_read += read.length
            self._breakers[read.file].succeeded()
            fetch._probes.discard(read.file)
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
        fetch._missing.discard(index)
        if not fetch.inner_landed and fetch._missing <= {_DOWN}:
            fetch.inner_landed = True
            fetch._inner.set()
            if fetch._missing:
                if fetch.listener is not None:
                    fetch.listener.inner_landed(fetch)
                return
        if not fetch._missing:
            del self._in_flight[fetch.key]
            self._classes[fetch.priority].landed += 1
            fetch.done = True
            fetch._over.set()
            self._touched[fetch.slot] = 1
            fetch._reads.clear()  # they refer to the slot's memory, and back to the fetch
            self._pool.landed(fetch.slot)
            if fetch.listener is not None:
                fetch.listener.landed(fetch)

    def _part_failed(self, fetch: Fetch, index: int, error: ReadError) -> None:
        tries = fetch._tries[index]
        delay = delay_s(error, tries)
        if delay is None:
            final = error.after(tries)
            final.__cause__ = error
            self._fail(fetch, fetch._reads[index].file, final)
            return
        heapq.heappush(self._retries, (trio.current_time() + delay, self._counts.reads_failed, fetch, index))
        self._changed.set()

    def _retry(self, fetch: Fetch, index: int) -> None:
        if fetch.done:
            return
        last = fetch._reads[index]
        fetch._reads[index] = attrs.evolve(last, priority=fetch.priority, error=None, cancelled=False)
        try:
            self._start_reads(fetch, (index,))
        except EngineClosed:
            assert last.error is not None
            self._fail(fetch, last.file, last.error.after(fetch._tries[index]))
        else:
            self._counts.retried += 1

    def _look_for_stuck(self, now_s: float) -> None:
        """Give up reads that have been at one chunk for the deadline or longer; see to it that none is missed.

        A look that comes late says that the process did not run, which is no fault of the disk. One look at the end
        would not do: the process may have been stopped until shortly before it.
        """
        late_s = now_s - self._next_look_s
        if late_s > _LATE_S:
            for read in self._outstanding:
                self._excused_s[read] = self._excused_s.get(read, 0.0) + late_s
        oldest_s = 0.0
        for read, (fetch, _) in list(self._outstanding.items()):
            if read in self._written_off or read not in self._outstanding:
                continue
            stalled_s = self._reader.stalled_s(read) - self._excused_s.get(read, 0.0)
            if stalled_s < self._deadline_s - _ROUNDING_S:
                oldest_s = max(oldest_s, stalled_s)
                continue
            self._written_off.add(read)
            self._reader.write_off(read)
            if not fetch.done:
                self._counts.deadline_failures += 1
                path, reason = self._reader.paths[read.file], f"no answer for {format_duration(stalled_s)}"
                self._fail(fetch, read.file, ReadTimeout(path, read.start, read.needed, reason))
        waiting = len(self._outstanding) > len(self._written_off)
        self._next_look_s = now_s + min(self._deadline_s - oldest_s, _LOOK_EVERY_S) if waiting else inf

    def _fail(self, fetch: Fetch, file: int, error: ReadError) -> None:
        """End a fetch because a read of a file has failed for good."""
        self._breakers[file].failed(trio.current_time(), probe=file in fetch._probes)
        fetch._probes.discard(file)
        fetch.error = error
        self._classes[fetch.priority].failed += 1
        self._give_up(fetch)
        if fetch.listener is not None:
            fetch.listener.landed(fetch)

    def _give_up(self, fetch: Fetch) -> None:
        """End a fetch that has not landed; its slot is free once no read writes into it and nobody holds it."""
        del self._in_flight[fetch.key]
        fetch.done = True
        fetch._inner.set()
        fetch._over.set()
        for file in fetch._probes:
            self._breakers[file].drop_probe()
        for index in fetch._reading:
            self._reader.cancel(fetch._reads[index])
        self._pool.quarantine(fetch.slot)
        self._reclaim(fetch)

    def _reclaim(self, fetch: Fetch) -> None:
        """Give back the slot of a fetch that did not land, if nothing needs it any more."""
        if fetch.done and fetch._missing and not fetch._reading and not fetch._holds:
            fetch._reads.clear()
            self._pool.reclaim(fetch.slot)

    def _check_in_flight(self, fetch: Fetch) -> None:
        if self._in_flight.get(fetch.key) is not fetch:
            raise RuntimeError(f"the fetch of expert {fetch.expert} of layer {fetch.layer} is not in flight")
