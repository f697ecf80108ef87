"""Experts on their way from disk to the worker: cache, pool and fetcher together."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from mer.compute.worker import LoadedExpert
from mer.io.fetch import Fetch, Fetcher
from mer.io.pool import BufferPool
from mer.sched.experts import ExpertCache


class ExpertStore:
    """Pins resident experts, and brings missing ones into slots that the cache gives up.

    Used by one task, the scheduler. Fetches whose batch was given up land all the same and stay in the cache.
    """

    def __init__(self, cache: ExpertCache, pool: BufferPool) -> None:
        self.cache = cache
        self.pool = pool
        self._fetcher: Fetcher | None = None
        self._changed = trio.Event()

    def attach(self, fetcher: Fetcher) -> None:
        """Use a fetcher whose `on_done` is this store's `landed`."""
        self._fetcher = fetcher

    def landed(self, fetch: Fetch) -> None:
        """Take an expert into the cache when its fetch ends; synchronous, called by the fetcher."""
        if fetch.error is None:
            self.cache.insert(fetch.key, fetch.slot, fetch.addresses)
        self.wake()

    def wake(self) -> None:
        """Make whoever is in `wait_for_change` look again."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for_change(self) -> None:
        """Wait until the next fetch ends, successful or not, or the next `wake`; changes nothing if cancelled."""
        await self._changed.wait()

    def pin(self, layer: int, expert: int) -> LoadedExpert:
        """Keep a resident expert in its slot and return where its matrices lie."""
        resident = self.cache[layer, expert]
        self.pool.pin(resident.slot)
        resident.pins += 1
        return LoadedExpert(expert, resident.addresses, (resident.fresh, resident.fresh))

    def unpin(self, layer: int, experts: Iterable[LoadedExpert], *, used: bool) -> None:
        """Let pinned experts go; with `used`, a job has run on them and has arranged their bytes for the kernels."""
        for loaded in experts:
            resident = self.cache[layer, loaded.expert]
            resident.fresh = resident.fresh and not used
            resident.pins -= 1
            self.pool.unpin(resident.slot)

    def discard(self, layer: int, experts: Iterable[LoadedExpert]) -> None:
        """Drop pinned experts whose job failed half-way: their bytes may be half arranged."""
        for loaded in experts:
            slot = self.cache.drop((layer, loaded.expert))
            self.pool.unpin(slot)
            self.pool.release(slot)

    def start(self, layer: int, expert: int) -> Fetch | None:
        """Start fetching an expert, or join the fetch under way; None if no slot can be had right now."""
        assert self._fetcher is not None
        under_way = self._fetcher.in_flight(layer, expert)
        if under_way is not None:
            return under_way
        try:
            (slot,) = self.pool.lease_nowait(1)
        except trio.WouldBlock:
            victim = self.cache.evict_for(layer)
            if victim is None:
                return None
            self.pool.release(victim)
            (slot,) = self.pool.lease_nowait(1)
        return self._fetcher.start(layer, expert, slot)
