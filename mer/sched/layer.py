"""Running one layer's experts: resident ones while missing ones load, landed ones as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import attrs
import trio

from mer.compute.worker import Done, Job, LoadedExpert, Operation, RunExperts
from mer.errors import EngineClosed, ReadError
from mer.io.fetch import Fetch
from mer.sched.store import ExpertStore


class WorkerLink:
    """Sends a worker one job at a time and waits for what it gives."""

    def __init__(self, jobs: trio.MemorySendChannel[Job], results: trio.MemoryReceiveChannel[Done]) -> None:
        self._jobs = jobs
        self._results = results

    async def run(self, *operations: Operation) -> Done:
        """Run operations as one job.

        If cancelled while the job runs, its result stays behind: the link is of no use any more.

        Raises:
            MerError: the job failed.
            EngineClosed: the worker is gone.
        """
        try:
            await self._jobs.send(Job(operations))
            done = await self._results.receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
            raise EngineClosed("the compute worker has stopped") from None
        if done.error is not None:
            raise done.error
        return done


@attrs.frozen
class LayerResult:
    """What is left of a layer when its experts are done or ready."""

    pinned: tuple[LoadedExpert, ...]  # ready but not yet run: they go with the next job, then `unpin`
    failed: dict[int, ReadError]  # {expert: why its bytes could not be had}


class LayerRun:
    """The experts of one layer for one batch.

    Slots are taken as they can be had and never waited for while this run holds one that it could give back: it waits
    only when nothing is ready to compute. Then every slot is being filled, by fetches of this run or by those that an
    earlier batch has left behind, and each of them that ends leaves a slot to be had.
    """

    def __init__(self, store: ExpertStore, link: WorkerLink, layer: int) -> None:
        self._store, self._link, self._layer = store, link, layer
        self._missing: deque[int] = deque()
        self._in_flight: dict[int, Fetch] = {}
        self._ready: list[LoadedExpert] = []
        self._failed: dict[int, ReadError] = {}

    async def run(self, experts: Sequence[int], wanted: Callable[[], bool]) -> LayerResult:
        """Compute the given experts, all but those that are ready last.

        If cancelled, nothing stays pinned; reads under way land in the cache.

        Args:
            experts: numbers of the routed experts, each once.
            wanted: looked at between jobs and when something changes in the store; false gives the layer up.

        Raises:
            MerError: a job failed; the experts it ran on are dropped.
        """
        store, layer = self._store, self._layer
        hits, misses = store.cache.lookup(layer, experts)
        self._ready = [store.pin(layer, expert) for expert in hits]
        self._missing.extend(misses)
        try:
            while (self._missing or self._in_flight) and wanted():
                self._collect()
                self._start()
                if not (self._missing or self._in_flight):
                    break
                if self._ready:
                    await self._run_ready()
                else:
                    await store.wait_for_change()
        except BaseException:
            store.unpin(layer, self._ready, used=False)
            raise
        return LayerResult(tuple(self._ready), self._failed)

    def _collect(self) -> None:
        """Pin what has landed, before anything can evict it."""
        for expert, fetch in list(self._in_flight.items()):
            if fetch.done:
                del self._in_flight[expert]
                if fetch.error is None:
                    self._ready.append(self._store.pin(self._layer, expert))
                else:
                    self._failed[expert] = fetch.error
        for expert in [e for e in self._missing if (self._layer, e) in self._store.cache]:
            self._missing.remove(expert)  # a fetch that an earlier batch left behind has brought it since the lookup
            self._ready.append(self._store.pin(self._layer, expert))

    def _start(self) -> None:
        """Start as many missing experts as there are slots to be had."""
        while self._missing and (fetch := self._store.start(self._layer, self._missing[0])) is not None:
            self._in_flight[self._missing.popleft()] = fetch

    async def _run_ready(self) -> None:
        ready, self._ready = self._ready, []
        try:
            await self._link.run(RunExperts(self._layer, tuple(ready)))
        except BaseException:  # the job failed, or the engine closes while the worker is still at it
            self._store.discard(self._layer, ready)
            raise
        self._store.unpin(self._layer, ready, used=True)
