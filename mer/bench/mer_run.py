"""The streaming benchmark through the engine's own path: cache, pool, fetcher, and compute that overlaps the reads."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

from mer.bench.datafile import DataFile
from mer.bench.network import begin
from mer.bench.tally import Tally
from mer.bench.workload import Workload
from mer.compute.cpu.worker import CPUWorker
from mer.compute.messages import Advance, Combine, Done, Operation, RunExperts, nothing
from mer.errors import MerError
from mer.io.arena import PAGE_BYTES, Arena
from mer.io.fetch import Fetch
from mer.io.pool import Priority
from mer.io.reader import Reader
from mer.opening.actors import open_expert_actors
from mer.sched.layer import WORTH_BYTES, LayerRun, WorkerLink
from mer.sched.policy import Policy


class _TimedLink(WorkerLink):
    """Adds up the time that the worker takes."""

    compute_s: float = 0.0

    async def run(self, *operations: Operation, on_started: Callable[[], None] = nothing) -> Done:
        """See `WorkerLink`."""
        done = await super().run(*operations, on_started=on_started)
        self.compute_s += done.compute_s
        return done


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
        actors = open_expert_actors(
            experts=data.experts,
            classes=data.experts.slot_classes(PAGE_BYTES),
            arena=arena,
            reader=reader,
            top_k=workload.widest,
            policy=policy,
            on_fetched=self._fetched,
        )
        self._cache, self._store, self._fetcher = actors.cache, actors.store, actors.fetcher

    async def run(self) -> None:
        """Run every iteration.

        If cancelled, the tally holds the iterations that have ended; reads in flight keep the arena's memory.

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
        await link.run(begin(0), Advance(events[0][0]))
        begun_s = time.perf_counter()
        for at, (layer, experts) in enumerate(events):
            link.compute_s = 0.0
            run = LayerRun(store, link, layer, staged=True, pairs=len(experts), worth_bytes=WORTH_BYTES)
            result = await run.run(experts, _always)
            for error in result.failed.values():
                store.residents.unpin(layer, result.pinned, used=False)
                raise error
            following: tuple[Operation, ...] = ()
            if at + 1 < len(events):
                following = begin(at + 1), Advance(events[at + 1][0])
            done = await link.run(
                RunExperts(layer, result.pinned), Combine(layer), Advance(self._workload.n_layers), *following
            )
            store.residents.unpin(layer, result.pinned, used=True)
            assert done.logits is not None
            self._count()
            self._tally.end_iteration(done.logits, link.compute_s, time.perf_counter() - begun_s)

    def _fetched(self, fetch: Fetch) -> None:
        """Note how long a fetch has taken that has landed; called by the fetcher."""
        if fetch.error is None:
            self._tally.read_s.append(trio.current_time() - fetch.begun_s)

    def _count(self) -> None:
        tally, cache, fetcher = self._tally, self._cache.statistics(), self._fetcher.statistics()
        guesses = self._store.speculation.statistics(Priority.PREFETCH)
        tally.lookups, tally.hits, tally.reads = cache.lookups, cache.hits, fetcher.started
        tally.prefetches, tally.prefetches_used = guesses.issued, guesses.used + guesses.promoted
        tally.bytes_read = fetcher.started * self._data.plan.geometry.expert_bytes
        tally.bytes_transferred = fetcher.bytes_read


def _always() -> bool:
    return True
