"""Running one layer's experts: resident ones while missing ones load, landed ones as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import attrs
import trio

from mer.compute.messages import Done, Job, LoadedExpert, Operation, RunExperts, RunShared, nothing
from mer.errors import EngineClosed, MerError
from mer.sched.store import ExpertStore
from mer.sched.traffic import Claim


class WorkerLink:
    """Sends a worker one job at a time and waits for what it gives."""

    def __init__(self, jobs: trio.MemorySendChannel[Job], results: trio.MemoryReceiveChannel[Done]) -> None:
        self._jobs = jobs
        self._results = results

    async def run(self, *operations: Operation, on_started: Callable[[], None] = nothing) -> Done:
        """Run operations as one job; once it computes, `on_started` is called, unless the job fails before.

        If cancelled while the job runs, its result stays in the channel: the link must not be used again.

        Raises:
            MerError: the job failed.
            EngineClosed: the worker is gone.
        """
        try:
            self._jobs.send_nowait(Job(operations, on_started))  # there is room: the job before has been answered
            done = await self._results.receive()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
            raise EngineClosed("the compute worker has stopped") from None
        if done.error is not None:
            raise done.error
        return done


@attrs.frozen
class LayerResult:
    """Experts of a layer that remain for the next job, and those that failed."""

    pinned: tuple[LoadedExpert, ...]  # ready but not yet run: they go with the next job, then `unpin`
    failed: dict[int, MerError]  # {expert: why its bytes could not be had}


WORTH_BYTES: Final = 8 << 20
"""Computing so many bytes of weights, or fewer for many rows, takes longer than a job's way there and back, for which
the next expert to land would have to wait."""
_CHEAP_ROWS: Final = 4


class LayerRun:
    """The experts of one layer for one batch.

    All missing experts are claimed at once. Jobs compute resident experts while the others load, and landed ones as
    they come; with `staged` even before their last matrix has landed. A job starts only where it has enough to do; the
    rest goes with the job that follows. A layer that needs more slots than there are goes in waves: its computed
    experts are unpinned, and their slots go to the next tickets in line. This run waits only when nothing is ready to
    compute; then every slot that it could use is being filled, and each of these fetches ends.

    Args:
        store: brings the experts.
        link: to the worker.
        layer: whose experts they are.
        staged: whether the batch may be computed in stages.
        pairs: (token, choice) pairs of the batch.
        worth_bytes: weights from which on a separate job pays, where experts have few rows each.
        shared: whether the layer's experts share a network. It is in memory, so that it fills the first wait; without
            a wait it runs with the job that adds the experts' outputs.
    """

    def __init__(
        self,
        store: ExpertStore,
        link: WorkerLink,
        layer: int,
        *,
        staged: bool,
        pairs: int,
        worth_bytes: int,
        shared: bool = False,
    ) -> None:
        self._store, self._link, self._layer, self._staged = store, link, layer, staged
        self._pairs, self._worth_bytes = pairs, worth_bytes
        self._shared = shared  # whether it is still to be run
        self._claims: list[Claim] = []
        self._ready: list[LoadedExpert] = []
        self._inner: list[Claim] = []  # those of the claims whose gate and up go with the next job
        self._failed: dict[int, MerError] = {}
        self._claimed: Callable[[], None] = nothing  # still to be called

    async def run(
        self, experts: Sequence[int], wanted: Callable[[], bool], claimed: Callable[[], None] = nothing
    ) -> LayerResult:
        """Compute the given experts, all but those that are ready last.

        If cancelled, nothing stays pinned; reads in flight land in the cache.

        Args:
            experts: numbers of the routed experts, each once.
            wanted: looked at between jobs and when something changes in the store; false gives the layer up.
            claimed: called once, after all missing experts have been asked for, while a job runs if there is one.

        Raises:
            MerError: a job failed; the experts it ran on are dropped.
        """
        store = self._store
        self._ready, self._claims = store.claims.claim(self._layer, experts)
        # up to some rows, an expert takes as long as its weights take from memory
        self._worth_bytes //= max(1, self._pairs // (len(experts) or 1) // _CHEAP_ROWS)
        for claim in self._claims:
            claim.staged = self._staged and store.fetcher.expert_bytes(*claim.key) >= self._worth_bytes
        try:
            self._claimed = claimed
            while self._claims and wanted():
                self._collect()
                if self._claims and self._has_a_job():
                    await self._run_ready()
                elif self._claims:
                    self._tell()
                    store.claims.fail_starved()
                    if all(claim.error is None for claim in self._claims):
                        await store.waiting.wait_for_change(self._worth_bytes - self._ready_bytes())
        except BaseException:
            store.residents.unpin(self._layer, self._ready, used=False)
            raise
        finally:
            store.claims.give_up(self._claims)
        self._tell()
        return LayerResult(tuple(self._ready), self._failed)

    def _tell(self) -> None:
        """Call `claimed`, if that has not been done."""
        claimed, self._claimed = self._claimed, nothing
        claimed()

    def _has_a_job(self) -> bool:
        """Return whether to compute what is ready before the rest lands; it must be if that waits for slots."""
        if self._shared:
            return True
        if self._inner or not self._ready:
            return bool(self._inner)
        slots_awaited = all(claim.fetch is None for claim in self._claims)
        return slots_awaited or self._ready_bytes() >= self._worth_bytes

    def _ready_bytes(self) -> int:
        return sum(self._store.fetcher.expert_bytes(self._layer, loaded.expert) for loaded in self._ready)

    def _collect(self) -> None:
        """Sort the claims into landed, failed and waiting ones."""
        store, waiting = self._store, []
        self._inner = []
        for claim in self._claims:
            if claim.error is not None:
                self._failed[claim.key[1]] = claim.error
                store.claims.give_up([claim])
            elif claim.landed:
                self._ready.append(store.claims.take(claim))
            else:
                waiting.append(claim)
                if claim.staged and store.claims.inner_ready(claim):
                    self._inner.append(claim)
        self._claims = waiting

    async def _run_ready(self) -> None:
        """Run a job on what is ready, and on the shared network unless it has run."""
        store = self._store
        ready, self._ready = self._ready, []
        inner, self._inner = self._inner, []
        parts = [store.claims.begin_inner(claim) for claim in inner]
        operations: list[Operation] = []
        if ready or parts:
            operations.append(RunExperts(self._layer, (*ready, *parts)))
        if self._shared:
            operations.append(RunShared(self._layer))
            self._shared = False
        try:
            done = await self._link.run(*operations, on_started=self._tell)
        except BaseException:  # the job failed, or the engine closes while the job runs
            for claim in inner:
                store.claims.end_inner(claim, done=False)
            store.residents.discard(self._layer, ready)
            raise
        for claim in inner:
            store.claims.end_inner(claim, done=True)
        store.residents.unpin(self._layer, ready, used=True, arranged=done.arranged)
