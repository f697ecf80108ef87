"""The expert store: cache, pool and fetcher, joined."""

from __future__ import annotations

from collections.abc import Callable

from mer.compute.messages import Tier
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.loan.desk import LoanDesk
from mer.io.pool import BufferPool
from mer.sched.cache import ExpertCache
from mer.sched.claims import Claims
from mer.sched.loans import Loans
from mer.sched.prefetch import Prefetcher
from mer.sched.residents import Residents
from mer.sched.speculation import Speculation
from mer.sched.traffic import Traffic
from mer.sched.waiting import Waiting


class ExpertStore:
    """Joins cache, pool and fetcher: each part below is given what it uses when it is made.

    The parts tell each other what they must by a record that they share (`Traffic`). Pool and fetcher call the part
    that asked for the slot or the fetch.

    Attributes:
        fetcher: reads.
        residents: pins experts in memory, and chooses the ones to evict.
        speculation: reads experts that no layer has asked for yet.
        claims: brings the experts that a layer misses.
        loans: reads within jobs.
        waiting: of the scheduler, for experts in flight.

    Args:
        cache: which experts are in which slots.
        pool: the accounting of the slots.
        fetcher: see above.
        kind_of: returns the class of slots that an expert fits.
        tier: experts in the worker's own memory, which need no slot; None if it has none.
        desk: lends jobs what they need to read missing experts; by default none does.
        prefetcher: chooses the experts to read on a guess; by default none is.
        on_fetched: called for every fetch that has landed or failed, before any listener; it may not raise.
    """

    def __init__(
        self,
        cache: ExpertCache,
        pool: BufferPool,
        fetcher: Fetcher,
        kind_of: Callable[[int, int], int],
        *,
        tier: Tier | None = None,
        desk: LoanDesk | None = None,
        prefetcher: Prefetcher | None = None,
        on_fetched: Callable[[Fetch], None] | None = None,
    ) -> None:
        traffic = Traffic()
        self.fetcher = fetcher
        self.waiting = Waiting(traffic, fetcher.expert_bytes, on_fetched)
        self.residents = Residents(cache, pool, kind_of, tier)
        self.speculation = Speculation(self.residents, fetcher, traffic, self.waiting, prefetcher)
        self.claims = Claims(self.residents, fetcher, self.speculation, traffic, self.waiting)
        self.loans = Loans(self.residents, desk, traffic, self.waiting, self.claims)
