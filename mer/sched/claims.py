"""Claims of a layer: its missing experts on their way."""

from __future__ import annotations

from collections.abc import Iterable

from mer.compute.messages import LoadedExpert, Stage
from mer.errors import MerError
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.pool import Priority, Ticket
from mer.sched.cache import Resident
from mer.sched.residents import Residents
from mer.sched.speculation import Speculation
from mer.sched.traffic import Claim, Traffic
from mer.sched.waiting import Waiting


class Claims:
    """Brings the missing experts of a layer into slots of evicted ones, and lets jobs begin before down has landed.

    Synchronous; used by one task, the scheduler, and by the callbacks of pool and fetcher. Fetches for a batch that was
    given up land all the same, and their experts stay in the cache.

    Args:
        residents: what is in memory.
        fetcher: reads.
        speculation: what is read before a layer asks for it.
        traffic: what is on its way.
        waiting: of the scheduler.
    """

    def __init__(
        self, residents: Residents, fetcher: Fetcher, speculation: Speculation, traffic: Traffic, waiting: Waiting
    ) -> None:
        self._residents, self._fetcher, self._traffic, self._waiting = residents, fetcher, traffic, waiting
        self._speculation = speculation
        self._pool, self._cache = residents.pool, residents.cache
        self._arranged: set[Fetch] = set()  # in flight, with gate and up re-arranged for the kernels
        self._spoiled: set[Fetch] = set()  # in flight, with gate and up half re-arranged

    @property
    def loading(self) -> int:
        """Number of claims that have neither landed nor failed: with 0, no layer waits for the disk."""
        return self._traffic.loading

    def claim(self, layer: int, experts: Iterable[int]) -> tuple[list[LoadedExpert], list[Claim]]:
        """Pin the resident ones of a layer's experts and claim the others, all of them at once.

        Reads ahead and prefetches of these experts become demand. Other tickets for reads ahead are withdrawn, and
        wrong guesses that are in flight are abandoned.
        """
        loaded, misses = self._residents.lookup(layer, list(experts))
        claims = [Claim((layer, expert)) for expert in misses]
        for claim in claims:
            self._traffic.claims[claim.key] = claim
            self._traffic.loading += 1
            self._start(claim)
        self._speculation.withdraw()
        return loaded, claims

    def give_up(self, claims: Iterable[Claim]) -> None:
        """Drop claims: tickets leave the line, reads in flight go on, landed experts are unpinned."""
        for claim in claims:
            if self._traffic.claims.pop(claim.key, None) is None:
                continue
            if claim.landed:
                self._pool.unpin(self._cache[claim.key].slot)
                continue
            if claim.error is None:
                self._traffic.loading -= 1
                if claim.ticket is not None and claim.ticket.slot is None:
                    self._pool.withdraw(claim.ticket)

    def take(self, claim: Claim) -> LoadedExpert:
        """Turn a landed claim into a pinned expert."""
        del self._traffic.claims[claim.key]
        resident = self._cache[claim.key]
        stage = Stage.OUTER if claim.inner_done else Stage.WHOLE
        return LoadedExpert(claim.key[1], resident.addresses, resident.raw, stage)

    def fail_starved(self) -> None:
        """Fail the claims that no slot can serve: all of their kind wait for reads that did not return in time."""
        error = self._waiting.last_error
        for claim in list(self._traffic.claims.values()):
            ticket = claim.ticket
            waits = ticket is not None and ticket.slot is None and claim.error is None
            if waits and ticket is not None and error is not None and not self._pool.usable(ticket.kind):
                self._pool.withdraw(ticket)
                self._fail(claim, error)

    # --- jobs on gate and up while down is on its way ---

    def inner_ready(self, claim: Claim) -> bool:
        """Return whether a job can compute with gate and up of an expert while its down matrix is in flight."""
        fetch = claim.fetch
        return fetch is not None and not claim.inner_done and fetch.inner_landed and fetch not in self._spoiled

    def begin_inner(self, claim: Claim) -> LoadedExpert:
        """Hold an expert whose gate and up have landed for a job on these, while down is in flight."""
        assert claim.fetch is not None
        self._fetcher.hold(claim.fetch)
        raw = claim.fetch not in self._arranged
        return LoadedExpert(claim.key[1], claim.fetch.addresses, (raw, True), Stage.INNER)

    def end_inner(self, claim: Claim, *, done: bool) -> None:
        """Release an expert after a job on gate and up; if it is not `done`, their bytes may be half re-arranged."""
        fetch = claim.fetch
        assert fetch is not None
        if claim.landed:
            if done:
                self._cache[claim.key].raw = (False, self._cache[claim.key].raw[1])
            else:
                del self._traffic.claims[claim.key]
                self._residents.discard_one(claim.key)
        elif claim.error is None:
            (self._arranged if done else self._spoiled).add(fetch)
        claim.inner_done = done
        self._fetcher.let_go(fetch)

    # --- callbacks ---

    def inner_landed(self, fetch: Fetch) -> None:
        """Take note that two matrices of an expert have landed; called by the fetcher."""
        claim = self._traffic.claims.get(fetch.key)
        if claim is not None and claim.staged:
            self._waiting.wake()

    def landed(self, fetch: Fetch) -> None:
        """Take an expert into the cache when its fetch ends; called by the fetcher."""
        self._waiting.ended(fetch)
        claim = self._traffic.claims.get(fetch.key)
        arranged, spoiled = fetch in self._arranged, fetch in self._spoiled
        self._arranged.discard(fetch)
        self._spoiled.discard(fetch)
        if fetch.error is not None:
            if claim is not None:
                self._fail(claim, fetch.error)
        elif spoiled:
            self._pool.release(fetch.slot)
            if claim is not None:
                self._start(claim)
        else:
            self._cache.insert(fetch.key, Resident(fetch.slot, fetch.addresses, (not arranged, True), None))
            if claim is not None:
                self._pool.pin(fetch.slot)
                claim.landed = True
                self._traffic.loading -= 1
            else:
                self._pool.serve()
        self._speculation.guess()
        self._waiting.wake_for(fetch)

    def _start(self, claim: Claim) -> None:
        """Start a claim: join a fetch in flight or a ticket in line, or request a slot."""
        fetch = claim.fetch = self._fetcher.in_flight(*claim.key)
        ticket = self._traffic.ahead.pop(claim.key, None)
        if fetch is not None:
            if fetch in self._traffic.guesses:
                self._speculation.promoted(fetch)
                fetch.hand_over(self)
                self._fetcher.promote(fetch, Priority.DEMAND)
        elif ticket is not None:
            claim.ticket = ticket
            ticket.on_granted = self._granted
            self._pool.promote(ticket)
        elif (refusal := self._fetcher.refusal(*claim.key)) is not None:
            self._fail(claim, refusal)  # before anything is evicted for it
        else:
            claim.ticket = self._residents.ticket(claim.key, Priority.DEMAND, self._granted)
            self._pool.request(claim.ticket)

    def _granted(self, ticket: Ticket) -> None:
        """Start the fetch that a slot was asked for; called by the pool."""
        assert ticket.slot is not None
        claim = self._traffic.claims[ticket.key]
        try:
            claim.fetch = self._fetcher.start(*ticket.key, ticket.slot, ticket.priority, self)
        except MerError as error:  # the engine is closing, or the file has been left alone since
            self._pool.release(ticket.slot)
            self._fail(claim, error)
            self._waiting.wake()

    def _fail(self, claim: Claim, error: MerError) -> None:
        claim.error = error
        self._traffic.loading -= 1
