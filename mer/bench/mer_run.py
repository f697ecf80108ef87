"""The streaming benchmark through the engine's own path: cache, pool, fetcher, and compute that overlaps the reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import trio

from mer.bench.datafile import DataFile
from mer.bench.network import begin
from mer.bench.tally import Tally
from mer.bench.workload import Workload
from mer.compute.cpu.worker import CPUWorker
from mer.compute.messages import Attend, Combine, Done, Operation, Project, RunExperts, nothing
from mer.errors import MerError
from mer.io.arena import PAGE_BYTES, Arena
from mer.io.fetch import Fetch, Fetcher
from mer.io.pool import BufferPool, demand_reserve
from mer.io.priority import Priority
from mer.io.reader import Reader
from mer.sched.cache import ExpertCache
from mer.sched.keys import ExpertKey
from mer.sched.layer import WORTH_BYTES, LayerRun, WorkerLink
from mer.sched.policy import Policy
from mer.sched.store import ExpertStore


class _TimedLink(WorkerLink):
    """Adds up the time that the worker takes."""

    compute_s: float = 0.0

    async def run(self, *operations: Operation, on_started: Callable[[], None] = nothing) -> Done:
        """See `WorkerLink`."""
        done = await super().run(*operations, on_started=on_started)
        self.compute_s += done.compute_s
        return done


class _TimedFetcher(Fetcher):
    """Remembers when each fetch was started."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.started_s: dict[ExpertKey, float] = {}  # of the last fetch of each expert

    def start(self, layer: int, expert: int, slot: int, priority: Priority = Priority.DEMAND) -> Fetch:
        """See `Fetcher`."""
        self.started_s[layer, expert] = time.perf_counter()
        return super().start(layer, expert, slot, priority)


class MerRun:
    """Runs a workload as the engine runs one layer after another at batch 1, each iteration being a layer.

    What is resident is computed while the rest loads, gate and up of an expert while its down matrix does; the last
    experts go with the job that ends the iteration and begins the next. Every newcomer takes a slot.

    Args:
        workload: what is looked up.
        data: the experts.
        policy: of the cache; a fresh one.
        reader: reads the data file.
        arena: slots of an expert's size, all of them the cache's.
        worker: made for this workload.
        tally: where to count.
    """

    def __init__(
        self,
        *,
        workload: Workload,
        data: DataFile,
        policy: Policy,
        reader: Reader,
        arena: Arena,
        worker: CPUWorker,
        tally: Tally,
    ) -> None:
        self._workload, self._data, self._tally = workload, data, tally
        self._link = _TimedLink(worker.jobs, worker.results)
        classes = data.experts.slot_classes(PAGE_BYTES)
        slot_counts = [arena.n_slots]
        pool = BufferPool(slot_counts, reserve=demand_reserve(slot_counts, workload.widest))
        self._cache = ExpertCache(policy)
        self._store = ExpertStore(self._cache, pool, classes.kind_of)
        self._fetcher = _TimedFetcher(
            pool, arena, classes, data.experts, reader, on_done=self._landed, on_inner=self._store.inner_landed
        )
        self._store.attach(self._fetcher)

    async def run(self) -> None:
        """Run every iteration.

        If cancelled, the tally holds the iterations that have ended; reads under way keep the arena's memory.

        Raises:
            ReadError: an expert could not be read.
            ComputeError: a job failed.
        """
        failure: MerError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fetcher.run)
            try:
                await self._iterate()
            except MerError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _iterate(self) -> None:
        events, store, link = self._workload.events, self._store, self._link
        await link.run(begin(0), Attend(events[0][0]))
        begun_s = time.perf_counter()
        for at, (layer, experts) in enumerate(events):
            link.compute_s = 0.0
            run = LayerRun(store, link, layer, staged=True, pairs=len(experts), worth_bytes=WORTH_BYTES)
            result = await run.run(experts, _always)
            for error in result.failed.values():
                store.unpin(layer, result.pinned, used=False)
                raise error
            following: tuple[Operation, ...] = ()
            if at + 1 < len(events):
                following = begin(at + 1), Attend(events[at + 1][0])
            done = await link.run(RunExperts(layer, result.pinned), Combine(layer), Project(), *following)
            store.unpin(layer, result.pinned, used=True)
            assert done.logits is not None
            self._count()
            self._tally.end_iteration(done.logits, link.compute_s, time.perf_counter() - begun_s)

    def _landed(self, fetch: Fetch) -> None:
        """Note that a fetch has ended; synchronous, called by the fetcher."""
        started_s = self._fetcher.started_s[fetch.key]
        if fetch.error is None:
            self._tally.read_s.append(time.perf_counter() - started_s)
        self._store.landed(fetch)

    def _count(self) -> None:
        tally, cache, fetcher = self._tally, self._cache.statistics(), self._fetcher.statistics()
        guesses = self._store.speculation(Priority.PREFETCH)
        tally.lookups, tally.hits, tally.reads = cache.lookups, cache.hits, fetcher.started
        tally.prefetches, tally.prefetches_used = guesses.issued, guesses.used + guesses.promoted
        tally.bytes_read = fetcher.started * self._data.plan.geometry.expert_bytes
        tally.bytes_transferred = fetcher.bytes_read


def _always() -> bool:
    return True
