"""Reads of experts before a layer asks for them."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from mer.errors import MerError
from mer.io.extents import ExpertKey
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.pool import Priority, Ticket
from mer.sched.cache import Resident
from mer.sched.prefetch import Prefetcher
from mer.sched.residents import Residents
from mer.sched.traffic import Traffic
from mer.sched.waiting import Waiting


@attrs.frozen(kw_only=True)
class SpeculationStatistics:
    """A snapshot of one class of reads before demand.

    `issued == used + promoted + evicted_unused + cancelled + failed + in_flight + resident_unused`.
    """

    issued: int  # fetches started
    used: int  # landed before the layer asked for the expert
    promoted: int  # in flight when the layer asked for it
    evicted_unused: int
    cancelled: int  # abandoned in flight
    failed: int
    in_flight: int
    resident_unused: int


@attrs.define
class _Counts:
    """Named as in SpeculationStatistics."""

    issued: int = 0
    promoted: int = 0
    cancelled: int = 0
    failed: int = 0


class Speculation:
    """Reads the experts that a layer to come is certain to need, after all demand, and likely ones after these.

    Synchronous; used by one task, the scheduler, and by the callbacks of pool and fetcher.

    Args:
        residents: what is in memory.
        fetcher: reads.
        traffic: what is on its way.
        waiting: of the scheduler.
        prefetcher: chooses the experts to read on a guess; by default none is.
    """

    def __init__(
        self,
        residents: Residents,
        fetcher: Fetcher,
        traffic: Traffic,
        waiting: Waiting,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self._residents, self._fetcher, self._traffic, self._waiting = residents, fetcher, traffic, waiting
        self._pool, self._cache = residents.pool, residents.cache
        self._prefetcher = prefetcher
        self._counts = {priority: _Counts() for priority in Priority if priority}

    def read_ahead(self, layer: int, experts: Iterable[int]) -> None:
        """Request slots for the missing ones of experts that a layer to come is certain to need, after all demand.

        Speculation evicts none of these experts, and demand only when it can evict no other. The next claims of any
        layer end that.
        """
        self.drop_ahead()
        if self._traffic.lent:
            return
        ahead = [(layer, expert) for expert in experts]
        self._residents.spared.update(ahead)
        for key in sorted(ahead):
            if self._absent(key):
                ticket = self._residents.ticket(key, Priority.READ_AHEAD, self._granted)
                self._traffic.ahead[key] = ticket
                self._pool.request(ticket)

    def drop_ahead(self) -> None:
        """Withdraw the tickets for reads ahead that are still in line."""
        self._residents.spared.clear()
        while self._traffic.ahead:
            _, ticket = self._traffic.ahead.popitem()
            self._pool.withdraw(ticket)

    def withdraw(self) -> None:
        """Withdraw tickets for reads ahead, and abandon wrong guesses: the layer has claimed the experts it needs."""
        self.drop_ahead()
        for fetch in list(self._traffic.guesses):
            if fetch.priority is Priority.PREFETCH:
                self._traffic.guesses.discard(fetch)
                self._counts[Priority.PREFETCH].cancelled += 1
                self._fetcher.abandon(fetch)

    @property
    def guessing(self) -> int:
        """Number of experts that are being read ahead or on a guess."""
        return len(self._traffic.guesses)

    def guess(self) -> None:
        """Read what the prefetcher chooses, if nothing is being read that a layer waits for."""
        if self._prefetcher is not None and not self._traffic.loading:
            self._prefetcher.idle(self)

    def price(self, key: ExpertKey) -> float | None:
        """Return what reading an expert on a guess would cost the cache.

        Returns:
            See `Residents.price`; None also if the expert is there or on its way.
        """
        return None if self._traffic.lent or not self._absent(key) else self._residents.price(key)

    def prefetch(self, key: ExpertKey, probability: float) -> bool:
        """Start reading an expert that a layer to come uses with this probability.

        Returns:
            False if `price` is None or not below the probability.
        """
        price = self.price(key)
        if price is None or price >= probability:
            return False
        self._pool.request(self._residents.ticket(key, Priority.PREFETCH, self._granted))
        return True

    def promoted(self, fetch: Fetch) -> None:
        """Note that a layer claims an expert in flight: its fetch is no longer speculation's."""
        self._traffic.guesses.discard(fetch)
        self._counts[fetch.priority].promoted += 1

    def inner_landed(self, fetch: Fetch) -> None:
        """See `FetchListener`; nobody waits for it."""

    def landed(self, fetch: Fetch) -> None:
        """Take a guess into the cache; called by the fetcher."""
        self._waiting.ended(fetch)
        self._traffic.guesses.discard(fetch)
        if fetch.error is not None:
            self._counts[fetch.priority].failed += 1
        else:
            self._cache.insert(fetch.key, Resident(fetch.slot, fetch.addresses, (True, True), fetch.priority))
            self._pool.serve()
        self.guess()
        self._waiting.wake_for(fetch)

    def statistics(self, priority: Priority) -> SpeculationStatistics:
        """Return a snapshot of one class of speculation."""
        return SpeculationStatistics(
            used=self._residents.used[priority],
            evicted_unused=self._residents.evicted_unused[priority],
            in_flight=sum(fetch.priority is priority for fetch in self._traffic.guesses),
            resident_unused=self._cache.unused(priority),
            **attrs.asdict(self._counts[priority]),
        )

    def _granted(self, ticket: Ticket) -> None:
        """Start the fetch that a slot was asked for; called by the pool."""
        self._traffic.ahead.pop(ticket.key, None)
        assert ticket.slot is not None
        try:
            fetch = self._fetcher.start(*ticket.key, ticket.slot, ticket.priority, self)
        except MerError:  # the engine is closing, or the file has been left alone since
            self._pool.release(ticket.slot)
            self._waiting.wake()
            return
        self._traffic.guesses.add(fetch)
        self._counts[ticket.priority].issued += 1

    def _absent(self, key: ExpertKey) -> bool:
        """Return whether an expert is neither in memory nor in flight nor claimed, and its files are not suspended."""
        known = key in self._cache or key in self._traffic.claims or self._fetcher.in_flight(*key) is not None
        tier = self._residents.tier
        if tier is not None and tier.resident(*key):
            return False
        return not known and self._fetcher.refusal(*key) is None
