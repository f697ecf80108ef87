"""The streaming benchmark with the seed's cache and prefetcher, reading and computing for real."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

import attrs
import trio

from mer.bench.datafile import DataFile
from mer.bench.network import begin
from mer.bench.seed_cache import SeedCache
from mer.bench.tally import Tally
from mer.bench.workload import Workload
from mer.compute.messages import Advance, Combine, Float32Array, LoadedExpert, Operation, RunExperts
from mer.errors import ReadError
from mer.io.arena import Arena
from mer.io.extents import aligned_hull
from mer.io.reader import Reader, ReadOperation
from mer.sched.layer import WorkerLink

MAX_DEMAND_READS: Final = 16  # of one iteration that are in flight at once


def seed_buffers(workload: Workload, n_slots: int) -> int:
    """Return the expert buffers: the cache's slots, and as many as one iteration needs besides."""
    return n_slots + workload.widest


def seed_reads(workload: Workload) -> int:
    """Return the reads that may be in flight at once: those of one iteration, and a prefetch."""
    return min(workload.widest, MAX_DEMAND_READS) + 1


@attrs.define(eq=False)
class _Loading:
    """An expert in a buffer, or on its way there."""

    slot: int
    loaded: LoadedExpert
    landed: trio.Event = attrs.Factory(trio.Event)
    error: ReadError | None = None
    dropped: bool = False  # nobody wants it: the buffer is free once the read has landed

    async def wait(self) -> None:
        """Wait until the bytes are there; raise what went wrong."""
        await self.landed.wait()
        if self.error is not None:
            raise self.error


class SeedRun:
    """Runs a workload as the seed does.

    All misses of an iteration are read at once, each expert whole and in one piece. When they are there, its experts
    are computed one after the other. Then the prefetch starts, which a demand read of the same expert does not join.
    There is one permit for it, so that it waits for the one before. What is evicted and prefetched follows `SeedCache`
    whatever the timing; a hit on a prefetched expert whose bytes are not there yet waits for them.

    Args:
        workload: what is looked up.
        data: the experts.
        n_slots: of the cache.
        reader: reads the data file, an expert in one piece.
        arena: `seed_buffers` slots of an expert's size.
        link: leads to a worker made for this workload.
        tally: where to count.
    """

    def __init__(
        self,
        *,
        workload: Workload,
        data: DataFile,
        n_slots: int,
        reader: Reader,
        arena: Arena,
        link: WorkerLink,
        tally: Tally,
    ) -> None:
        self._workload, self._data, self._reader = workload, data, reader
        self._arena, self._link, self._tally = arena, link, tally
        self._cache = SeedCache(workload.n_layers * workload.n_experts, n_slots)
        self._free = list(range(arena.n_slots))
        self._held: dict[int, _Loading] = {}  # {expert in the flat list: where it is}; those of the cache
        self._prefetch: tuple[int, _Loading] | None = None  # started after the last iteration
        self._freed = trio.Event()
        self._transferred = 0  # bytes of the reads that have begun

    async def run(self) -> None:
        """Run every iteration.

        If cancelled, the tally holds the iterations that have ended; reads in flight keep the arena's memory.

        Raises:
            ReadError: an expert could not be read.
            ComputeError: a job failed.
        """
        events = self._workload.events
        await self._link.run(begin(0), Advance(events[0][0]))
        begun_s = time.perf_counter()
        permit: _Loading | None = None
        for at, ids in enumerate(self._workload.flat()):
            step = self._cache.step(ids, last=at == len(events) - 1)
            used = {expert: self._held[expert] for expert in step.hits}
            for expert in step.evicted:
                loading = self._held.pop(expert)
                if expert not in used:
                    self._drop(loading)
            for expert in step.misses:
                used[expert] = await self._start(expert)
            output, compute_s = await self._compute(at, [used[expert] for expert in ids])
            for expert in set(step.evicted).intersection(used):  # a cache too small for one iteration
                self._drop(used[expert])
            self._insert([*([] if self._prefetch is None else [self._prefetch]), *((e, used[e]) for e in step.misses)])
            self._prefetch = None
            if step.prefetch is not None:
                if permit is not None:
                    await permit.wait()
                permit = await self._start(step.prefetch)
                self._prefetch = step.prefetch, permit
            self._count()
            self._tally.end_iteration(output, compute_s, time.perf_counter() - begun_s)
        if permit is not None:
            await permit.wait()
            self._tally.wall_s = time.perf_counter() - begun_s

    async def _compute(self, at: int, used: list[_Loading]) -> tuple[Float32Array, float]:
        """Wait for the experts of an iteration and run them, together with the beginning of the next; return the
        output and the time that the worker took.
        """
        for loading in used:
            await loading.wait()
        events = self._workload.events
        layer = events[at][0]
        following: tuple[Operation, ...] = ()
        if at + 1 < len(events):
            following = begin(at + 1), Advance(events[at + 1][0])
        runs = [RunExperts(layer, (loading.loaded,)) for loading in used]
        done = await self._link.run(*runs, Combine(layer), Advance(self._workload.n_layers), *following)
        for loading in used:
            loading.loaded = attrs.evolve(loading.loaded, raw=(False, False))
        assert done.logits is not None
        return done.logits, done.compute_s

    def _insert(self, arrivals: list[tuple[int, _Loading]]) -> None:
        """Hold the experts that have landed, those that the cache keeps."""
        for expert, loading in arrivals:
            twin = self._held.pop(expert, None)
            if twin is not None:
                self._drop(twin)
            self._held[expert] = loading
        for expert in [expert for expert in self._held if expert not in self._cache]:
            self._drop(self._held.pop(expert))

    async def _start(self, expert: int) -> _Loading:
        """Start reading an expert, as soon as a buffer is free."""
        layer, number = divmod(expert, self._workload.n_experts)
        offset, n_bytes = self._data.extent(layer, number)
        start, length, lead = aligned_hull(offset, n_bytes, self._reader.modes[0].alignment)
        while not self._free:  # a prefetched expert was evicted before it came
            await self._freed.wait()
        slot = self._free.pop()
        first = self._arena.address(slot) + lead - offset
        gate, up, down = (first + part.offset for part in self._data.experts.experts[layer][number].parts)
        loading = _Loading(slot, LoadedExpert(number, (gate, up, down), raw=(True, True)))
        self._reader.start(
            ReadOperation(
                file=0,
                start=start,
                length=length,
                needed=lead + n_bytes,
                buffer=self._arena.view(slot)[:length],
                on_landed=partial(self._landed, loading, time.perf_counter()),
            )
        )
        self._transferred += length
        return loading

    def _landed(self, loading: _Loading, started_s: float, operation: ReadOperation) -> None:
        """Note that a read has ended; synchronous, called by the reader."""
        loading.error = operation.error
        if operation.error is None:
            self._tally.read_s.append(time.perf_counter() - started_s)
        loading.landed.set()
        if loading.dropped:
            self._release(loading.slot)

    def _drop(self, loading: _Loading) -> None:
        loading.dropped = True
        if loading.landed.is_set():
            self._release(loading.slot)

    def _release(self, slot: int) -> None:
        self._free.append(slot)
        self._freed.set()
        self._freed = trio.Event()

    def _count(self) -> None:
        totals, tally = self._cache.totals, self._tally
        tally.lookups, tally.hits, tally.reads = totals.lookups, totals.hits, totals.reads
        tally.prefetches, tally.prefetches_used = totals.prefetches, totals.prefetches_used
        tally.bytes_read = totals.reads * self._data.plan.geometry.expert_bytes
        tally.bytes_transferred = self._transferred
