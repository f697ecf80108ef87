"""Resident experts: their pins and their eviction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

from mer.compute.messages import AWAY, LoadedExpert, Tier
from mer.io.extents import ExpertKey
from mer.io.pool import BufferPool, Priority, SlotState, Ticket
from mer.sched.cache import ExpertCache, Resident


class Residents:
    """Pins experts that are in memory, and chooses the ones to evict.

    Attributes:
        cache: which experts are in which slots.
        pool: the accounting of the slots.
        tier: experts in the worker's own memory, which need no slot; None if it has none.
        keeps_all: while true, speculation evicts no expert: the worker may use any.
        spared: experts that only demand evicts, and only when it can evict no other.
        used: guesses of each class that were used after they landed.
        evicted_unused: guesses of each class that were evicted before a use.

    Synchronous; to be used from the trio thread alone.

    Args:
        cache: see above.
        pool: likewise.
        kind_of: returns the class of slots that an expert fits.
        tier: see above.
    """

    def __init__(
        self, cache: ExpertCache, pool: BufferPool, kind_of: Callable[[int, int], int], tier: Tier | None = None
    ) -> None:
        self.cache, self.pool, self.tier = cache, pool, tier
        self.keeps_all = False
        self.spared: set[ExpertKey] = set()
        self.used: Counter[Priority] = Counter()
        self.evicted_unused: Counter[Priority] = Counter()
        self._kind_of = kind_of

    @property
    def all_held(self) -> bool:
        """Whether the worker has every expert in its own memory, so that nothing is left to read or to guess."""
        return self.tier is not None and self.tier.full

    # --- pins ---

    def lookup(self, layer: int, experts: Sequence[int]) -> tuple[list[LoadedExpert], list[int]]:
        """Pin those of a layer's experts that are in memory, and return them and the numbers of those that are not."""
        held = self._hold(layer, experts)
        hits, misses = self.cache.lookup(layer, experts, held)
        loaded = [LoadedExpert(expert, AWAY, (False, False)) for expert in held]
        return loaded + [self._pin(expert, self.cache[layer, expert]) for expert in hits], misses

    def pin_all(self, layer: int, experts: Sequence[int]) -> tuple[LoadedExpert, ...] | None:
        """Pin a layer's experts if all of them are in memory; else do nothing and return None.

        `Speculation.withdraw` follows, as soon as there is time.
        """
        held = self._hold(layer, experts)
        residents = self.cache.lookup_all(layer, experts, held)
        if residents is None:
            self._release(layer, held)
            return None
        if held:
            away = tuple(LoadedExpert(expert, AWAY, (False, False)) for expert in held)
            return away + tuple(map(self._pin, (e for e in experts if e not in held), residents))
        return tuple(map(self._pin, experts, residents))

    def unpin(
        self, layer: int, experts: Iterable[LoadedExpert], *, used: bool, arranged: Collection[int] | None = None
    ) -> None:
        """Release pinned experts; with `used`, a job has run on them and has re-arranged those of `Done.arranged`."""
        for loaded in experts:
            if loaded.addresses == AWAY:
                self._release(layer, (loaded.expert,))
                continue
            resident = self.cache[layer, loaded.expert]
            if used and resident.arranged is None and (arranged is None or loaded.expert in arranged):
                self.cache.arranged((layer, loaded.expert))
            self.pool.unpin(resident.slot)

    def discard(self, layer: int, experts: Iterable[LoadedExpert]) -> None:
        """Drop pinned experts whose job failed half-way: their bytes may be half re-arranged."""
        for loaded in experts:
            if loaded.addresses == AWAY:
                self._release(layer, (loaded.expert,))
            else:
                self.discard_one((layer, loaded.expert))

    def discard_one(self, key: ExpertKey) -> None:
        """Drop a pinned expert."""
        slot = self._left(self.cache.drop(key))
        self.pool.unpin(slot)
        self.pool.release(slot)

    def forget(self, layer: int, experts: Iterable[int]) -> int:
        """Drop those of a layer's experts that are resident and not pinned, so that they are read again; count them.

        Experts in a worker's own memory cannot be dropped: with a tier, none is.
        """
        forgotten = 0
        for expert in experts if self.tier is None else ():
            key = layer, expert
            if key in self.cache and self.pool.state(self.cache[key].slot) is SlotState.READY:
                self.pool.release(self._left(self.cache.drop(key)))
                forgotten += 1
        return forgotten

    def _pin(self, expert: int, resident: Resident) -> LoadedExpert:
        self.pool.pin(resident.slot)
        if resident.speculation is not None:
            self.used[resident.speculation] += 1
            resident.speculation = None
        return resident.arranged or LoadedExpert(expert, resident.addresses, resident.raw)

    def _hold(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Hold those of a layer's experts that the worker has in its own memory, and return their numbers."""
        tier = self.tier
        return [] if tier is None else [expert for expert in experts if tier.hold(layer, expert)]

    def _release(self, layer: int, experts: Iterable[int]) -> None:
        """Release experts that `_hold` has returned."""
        if self.tier is not None:
            for expert in experts:
                self.tier.release(layer, expert)

    # --- room for others ---

    def ticket(self, key: ExpertKey, priority: Priority, on_granted: Callable[[Ticket], None]) -> Ticket:
        """Return a place in line for a slot that an expert fits, which may evict another expert."""
        return Ticket(key, self._kind_of(*key), priority, on_granted, self._evict)

    def price(self, key: ExpertKey) -> float | None:
        """Return what a slot for an expert that is guessed would cost.

        Returns:
            The probability that the expert which would be evicted for it is used at its layer's next visit, 0 for a
            free slot; None if it gets no slot.
        """
        kind = self._kind_of(*key)
        if not self.pool.permits(kind):
            return None
        if self.pool.has_free(kind):
            return 0.0
        if self.keeps_all:
            return None
        victim = self.cache.victim_for(key[0], self._evictable(kind), kind=kind)
        return None if victim is None else self.cache.likelihood(victim)

    def let_leave(self) -> None:
        """End `keeps_all`."""
        if self.keeps_all:
            self.keeps_all = False
            self.pool.serve()

    def replace(self, victim: ExpertKey) -> None:
        """Evict a resident whose slot a job has taken for another one."""
        self.pool.refill(self._left(self.cache.evict(victim)))

    def _evict(self, ticket: Ticket) -> int | None:
        """Evict a resident expert for a ticket, and return its slot; called by the pool."""
        if self.keeps_all and ticket.priority is not Priority.DEMAND:
            return None
        layer, kind = ticket.key[0], ticket.kind
        victim = None if self.tier is None else self.cache.evict_for(layer, self._copied(kind), kind=kind)
        if victim is None:
            victim = self.cache.evict_for(layer, self._evictable(kind), kind=kind)
        if victim is None and ticket.priority is Priority.DEMAND and self.spared:
            victim = self.cache.evict_for(layer, self._evictable(kind, spare=False), kind=kind)
        return None if victim is None else self._left(victim)

    def _left(self, resident: Resident) -> int:
        """Return the slot of an expert that was dropped from the cache; a guess that was never used is counted."""
        if resident.speculation is not None:
            self.evicted_unused[resident.speculation] += 1
        return resident.slot

    def _evictable(self, kind: int, *, spare: bool = True) -> Callable[[ExpertKey], bool]:
        """Return a test whether an expert's slot is of a kind and unpinned, and with `spare`, it is not `spared`."""
        pool, cache, spared = self.pool, self.cache, self.spared if spare else ()

        def evictable(key: ExpertKey) -> bool:
            slot = cache[key].slot
            return pool.state(slot) is SlotState.READY and pool.kind(slot) == kind and key not in spared

        return evictable

    def _copied(self, kind: int) -> Callable[[ExpertKey], bool]:
        """Return a test whether an expert is `_evictable` and in the worker's own memory too: these go first."""
        evictable, tier = self._evictable(kind), self.tier
        return lambda key: tier is not None and tier.resident(*key) and evictable(key)
