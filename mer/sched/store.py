"""The expert store: what brings experts from disk to the worker, joined."""

from __future__ import annotations

from collections.abc import Callable

from mer.compute.messages import Tier
from mer.io.fetch import Fetch, Fetcher
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
    """Joins cache, pool and fetcher: each part below has what it uses when it is made.

    What one part must tell another goes by the record that they share (`Traffic`), and what pool and fetcher have to
    tell goes to whoever has asked for the slot or the fetch.

    Attributes:
        fetcher: reads.
        residents: pins experts in memory, and chooses who leaves.
        speculation: reads what no layer has asked for yet.
        claims: brings what a layer misses.
        loans: reads that jobs make by themselves.
        waiting: of the scheduler, for what is being read.

    Args:
        cache: which experts are in which slots.
        pool: the accounting of the slots.
        fetcher: see above.
        kind_of: returns the class of slots that an expert fits.
        tier: experts that the worker has in memory of its own, and that need no slot; None if it has none.
        prefetcher: chooses what is read on a guess; by default nothing is.
        on_fetched: told of every fetch that has landed or failed, before anybody else; it may not raise.
    """

    def __init__(
        self,
        cache: ExpertCache,
        pool: BufferPool,
        fetcher: Fetcher,
        kind_of: Callable[[int, int], int],
        *,
        tier: Tier | None = None,
        prefetcher: Prefetcher | None = None,
        on_fetched: Callable[[Fetch], None] | None = None,
    ) -> None:
        traffic = Traffic()
        self.fetcher = fetcher
        self.waiting = Waiting(traffic, fetcher.expert_bytes, on_fetched)
        self.residents = Residents(cache, pool, kind_of, tier)
        self.speculation = Speculation(self.residents, fetcher, traffic, self.waiting, prefetcher)
        self.claims = Claims(self.residents, fetcher, self.speculation, traffic, self.waiting)
        self.loans = Loans(self.residents, fetcher, traffic, self.waiting, self.claims)
