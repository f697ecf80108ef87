"""Experts on their way from disk to the worker: cache, pool and fetcher together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import attrs
import trio

from mer.compute.messages import AWAY, LoadedExpert, Stage, Tier
from mer.errors import MerError, ReadError
from mer.io.fetch import Fetch, Fetcher
from mer.io.job_reads import JobRead, JobReads
from mer.io.pool import BufferPool, SlotState, Ticket
from mer.io.priority import Priority
from mer.sched.cache import ExpertCache, Resident
from mer.sched.keys import ExpertKey
from mer.sched.speculation import SpeculationCounts, SpeculationStatistics


@attrs.define(eq=False)
class Claim:
    """A missing expert that the running layer needs.

    Attributes:
        key: (layer, expert).
        ticket: its place in line for a slot, unless it was on its way already.
        fetch: what brings it, once there is a slot.
        landed: it is resident now, and pinned.
        error: why it cannot be had.
        inner_done: its gate and up matrices have done their work in the running batch.
        staged: they may do so before its down matrix has landed.
    """

    key: ExpertKey
    ticket: Ticket | None = None
    fetch: Fetch | None = None
    landed: bool = False
    error: MerError | None = None
    inner_done: bool = False
    staged: bool = False


class ExpertStore:
    """Pins the experts that a layer needs, and brings missing ones into slots that the cache gives up.

    Attributes:
        keeps_all: while true, speculation makes no expert leave: the worker may use any.
        on_idle: called when nothing is being read any more that a layer waits for.
        stalled_s: time spent in `wait_for_change` so far: the worker had nothing to do.

    Used by one task, the scheduler, and by the callbacks of pool and fetcher; all but `wait_for_change` is synchronous.
    What was started for a batch that was given up lands all the same and stays in the cache.

    Args:
        cache: the residents.
        pool: the accounting of the slots; the store answers its `evict`.
        kind_of: returns the class of slots that an expert fits.
        tier: experts that the worker has in memory of its own, and that need no slot; None if it has none.
    """

    def __init__(
        self, cache: ExpertCache, pool: BufferPool, kind_of: Callable[[int, int], int], tier: Tier | None = None
    ) -> None:
        self.keeps_all = False
        self._job_reads: JobReads | None = None  # while a job has it
        self._tier = tier
        self.cache = cache
        self.pool = pool
        pool.evict = self._evict
        self._kind_of = kind_of
        self._fetcher: Fetcher | None = None
        self._claims: dict[ExpertKey, Claim] = {}
        self._loading = 0  # claims that have neither landed nor failed
        self._ahead: set[ExpertKey] = set()  # experts of the layer that is read ahead, resident or not
        self._ahead_tickets: dict[ExpertKey, Ticket] = {}  # those of them that wait for a slot
        self._arranged: set[Fetch] = set()  # in flight, with gate and up re-arranged for the kernels
        self._spoiled: set[Fetch] = set()  # in flight, with gate and up half re-arranged
        self._guesses: set[Fetch] = set()  # in flight, started before a layer asked for the expert
        self._speculation = {priority: SpeculationCounts() for priority in Priority if priority}
        self.stalled_s = 0.0
        self.on_idle: Callable[[], None] = lambda: None
        self._last_error: ReadError | None = None
        self._changed = trio.Event()
        self._awaited_bytes = 0  # experts whose landing is worth a wake-up while others load
        self._landed_bytes = 0  # since the wait began

    def attach(self, fetcher: Fetcher) -> None:
        """Use a fetcher whose `on_done` is this store's `landed` and whose `on_inner` is its `inner_landed`."""
        self._fetcher = fetcher

    @property
    def fetcher(self) -> Fetcher:
        """The fetcher in use."""
        assert self._fetcher is not None
        return self._fetcher

    @property
    def loading(self) -> int:
        """How many claims have neither landed nor failed: with 0 the disk does nothing that is waited for."""
        return self._loading

    @property
    def guessing(self) -> int:
        """How many experts are being read ahead or on a guess."""
        return len(self._guesses)

    @property
    def all_held(self) -> bool:
        """Whether the worker has every expert in memory of its own, so that nothing is left to read or to guess."""
        return self._tier is not None and self._tier.full

    # What a layer needs

    def claim(self, layer: int, experts: Iterable[int]) -> tuple[list[LoadedExpert], list[Claim]]:
        """Pin the resident ones of a layer's experts and get the others on their way, all of them at once.

        What was read ahead or prefetched for the layer becomes demand; what was asked for in vain is withdrawn, and
        wrong guesses that are still being read are abandoned.
        """
        union = list(experts)
        held = self._hold(layer, union)
        hits, misses = self.cache.lookup(layer, union, held)
        loaded = [LoadedExpert(expert, AWAY, (False, False)) for expert in held]
        loaded += [self._pinned(expert, self.cache[layer, expert]) for expert in hits]
        claims = [Claim((layer, expert)) for expert in misses]
        for claim in claims:
            self._claims[claim.key] = claim
            self._loading += 1
            self._start(claim)
        self.claimed()
        return loaded, claims

    def pin_resident(self, layer: int, experts: Sequence[int]) -> tuple[LoadedExpert, ...] | None:
        """Pin a layer's experts if all of them are resident; else do nothing and return None.

        `claimed` follows, as soon as there is time.
        """
        held = self._hold(layer, experts)
        residents = self.cache.lookup_all(layer, experts, held)
        if residents is None:
            self._release(layer, held)
            return None
        if held:
            away = tuple(LoadedExpert(expert, AWAY, (False, False)) for expert in held)
            return away + tuple(map(self._pinned, (e for e in experts if e not in held), residents))
        return tuple(map(self._pinned, experts, residents))

    def _hold(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Hold those of a layer's experts that the worker has in memory of its own, and return which they are."""
        tier = self._tier
        return [] if tier is None else [expert for expert in experts if tier.hold(layer, expert)]

    def _release(self, layer: int, experts: Iterable[int]) -> None:
        """Let go of experts that `_hold` has returned."""
        if self._tier is not None:
            for expert in experts:
                self._tier.release(layer, expert)

    def claimed(self) -> None:
        """Withdraw what was asked for in vain, and abandon wrong guesses that are still being read."""
        self.drop_ahead()
        self._cancel_prefetches()

    def _start(self, claim: Claim) -> None:
        """Get a claimed expert on its way: join what is under way, or ask for a slot."""
        fetch = claim.fetch = self.fetcher.in_flight(*claim.key)
        ticket = self._ahead_tickets.pop(claim.key, None)
        if fetch is not None:
            if fetch in self._guesses:
                self._guesses.discard(fetch)
                self._speculation[fetch.priority].promoted += 1
                self.fetcher.promote(fetch, Priority.DEMAND)
        elif ticket is not None:
            claim.ticket = ticket
            self.pool.promote(ticket)
        elif (refusal := self.fetcher.refusal(*claim.key)) is not None:
            self._fail(claim, refusal)  # before anything is evicted for it
        else:
            claim.ticket = self._ticket(claim.key, Priority.DEMAND)
            self.pool.request(claim.ticket)

    def give_up(self, claims: Iterable[Claim]) -> None:
        """Forget claims: tickets leave the line, reads under way go on, landed experts are unpinned."""
        for claim in claims:
            if self._claims.pop(claim.key, None) is None:
                continue
            if claim.landed:
                self.pool.unpin(self.cache[claim.key].slot)
                continue
            if claim.error is None:
                self._loading -= 1
                if claim.ticket is not None and claim.ticket.slot is None:
                    self.pool.withdraw(claim.ticket)

    def take(self, claim: Claim) -> LoadedExpert:
        """Turn a landed claim into a pinned expert."""
        del self._claims[claim.key]
        resident = self.cache[claim.key]
        stage = Stage.OUTER if claim.inner_done else Stage.WHOLE
        return LoadedExpert(claim.key[1], resident.addresses, resident.fresh, stage)

    def inner_ready(self, claim: Claim) -> bool:
        """Return whether gate and up of an expert can do their work while its down matrix is on the way."""
        fetch = claim.fetch
        return fetch is not None and not claim.inner_done and fetch.inner_landed and fetch not in self._spoiled

    def begin_inner(self, claim: Claim) -> LoadedExpert:
        """Hold an expert whose gate and up have landed for a job on these, while down is on the way."""
        assert claim.fetch is not None
        self.fetcher.hold(claim.fetch)
        fresh = claim.fetch not in self._arranged
        return LoadedExpert(claim.key[1], claim.fetch.addresses, (fresh, True), Stage.INNER)

    def end_inner(self, claim: Claim, *, done: bool) -> None:
        """Let an expert go after a job on gate and up; if it is not `done`, their bytes may be half re-arranged."""
        fetch = claim.fetch
        assert fetch is not None
        if claim.landed:
            if done:
                self.cache[claim.key].fresh = (False, self.cache[claim.key].fresh[1])
            else:
                del self._claims[claim.key]
                self._discard(claim.key)
        elif claim.error is None:
            (self._arranged if done else self._spoiled).add(fetch)
        claim.inner_done = done
        self.fetcher.let_go(fetch)

    def unpin(
        self, layer: int, experts: Iterable[LoadedExpert], *, used: bool, arranged: Collection[int] | None = None
    ) -> None:
        """Let pinned experts go; with `used`, a job has run on them and has re-arranged those of `Done.arranged`."""
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
                self._discard((layer, loaded.expert))

    def forget(self, layer: int, experts: Iterable[int]) -> int:
        """Drop those of a layer's experts that are resident and not pinned, so that they are read again; count them.

        What a worker holds in memory of its own cannot be forgotten: with a tier, nothing is.
        """
        forgotten = 0
        for expert in experts if self._tier is None else ():
            key = layer, expert
            if key in self.cache and self.pool.state(self.cache[key].slot) is SlotState.READY:
                self.pool.release(self._left(self.cache.drop(key)))
                forgotten += 1
        return forgotten

    def _discard(self, key: ExpertKey) -> None:
        slot = self._left(self.cache.drop(key))
        self.pool.unpin(slot)
        self.pool.release(slot)

    def _pinned(self, expert: int, resident: Resident) -> LoadedExpert:
        self.pool.pin(resident.slot)
        if resident.speculation is not None:
            self._speculation[resident.speculation].used += 1
            resident.speculation = None
        return resident.arranged or LoadedExpert(expert, resident.addresses, resident.fresh)

    # Reads that a job makes by itself

    def lend(self, layer: int, pinned: Iterable[LoadedExpert]) -> JobReads | None:
        """Let the job that is about to start make reads by itself, until `take_back`; None if that cannot be.

        Nothing is read ahead or on a guess meanwhile.

        Args:
            layer: of the experts that the job begins with.
            pinned: these experts.
        """
        if self._ahead_tickets:
            return None
        self._job_reads = self.fetcher.lend([(layer, loaded.expert) for loaded in pinned])
        return self._job_reads

    @property
    def lent(self) -> bool:
        """Whether a job makes reads by itself just now."""
        return self._job_reads is not None

    def stop_reads(self) -> None:
        """Let the job that runs begin no more reads: it ends where it misses an expert."""
        if self._job_reads is not None:
            self._job_reads.stop()

    def take_back(self) -> list[JobRead]:
        """End the loan, if there is one, behind the job; return what it has read, each for `keep` or `drop`."""
        if self._job_reads is None:
            return []
        self.stalled_s += self._job_reads.waited_s
        self._job_reads = None
        return self.fetcher.take_back(self._taken)

    def _taken(self, victim: ExpertKey) -> None:
        """Forget a resident whose slot a job has taken; called by the fetcher."""
        self.pool.refill(self._left(self.cache.evict(victim)))

    def drop(self, reads: Iterable[JobRead]) -> None:
        """Give up what a job that has failed has read."""
        reads = list(reads)
        self.cache.missed((read.layer, read.expert) for read in reads)
        self.cache.missed(())
        for read in reads:
            if read.landed:
                self.pool.release(read.slot)

    def keep(self, read: JobRead) -> None:
        """Take what a job has read into the cache, if it has landed."""
        if read.landed:
            key = read.layer, read.expert
            self.cache.insert(key, Resident(read.slot, read.addresses, (True, True), None))
            if read.arranged:
                self.cache.arranged(key)

    # Speculation

    def read_ahead(self, layer: int, experts: Iterable[int]) -> None:
        """Get the missing ones of experts that a layer to come is certain to need on their way, behind all demand.

        None of them gives way to speculation, and to demand only when nothing else can. The layer's `claim`, or any
        other, ends that.
        """
        self.drop_ahead()
        if self._job_reads is not None:
            return
        self._ahead = {(layer, expert) for expert in experts}
        for key in sorted(self._ahead):
            if self._absent(key):
                self._ahead_tickets[key] = ticket = self._ticket(key, Priority.READ_AHEAD)
                self.pool.request(ticket)

    def drop_ahead(self) -> None:
        """Withdraw what is still in line to be read ahead."""
        self._ahead.clear()
        while self._ahead_tickets:
            _, ticket = self._ahead_tickets.popitem()
            self.pool.withdraw(ticket)

    def price(self, key: ExpertKey) -> float | None:
        """Return what reading an expert on a guess would cost the cache.

        Returns:
            The probability that the expert which would leave for it is used at its layer's next visit, 0 for a free
            slot; None if it is there, on its way, or gets no slot.
        """
        kind = self._kind_of(*key)
        if self._job_reads is not None or not self._absent(key) or not self.pool.permits(kind):
            return None
        if self.pool.has_free(kind):
            return 0.0
        if self.keeps_all:
            return None
        victim = self.cache.victim_for(key[0], self._evictable(kind), kind=kind)
        return None if victim is None else self.cache.likelihood(victim)

    def prefetch(self, key: ExpertKey, probability: float) -> bool:
        """Start reading an expert that a layer to come uses with this probability.

        Returns:
            False if `price` is None or not below the probability.
        """
        price = self.price(key)
        if price is None or price >= probability:
            return False
        self.pool.request(self._ticket(key, Priority.PREFETCH))
        return True

    def _absent(self, key: ExpertKey) -> bool:
        """Return whether an expert is nowhere in memory nor on its way nor asked for, and its file not left alone."""
        known = key in self.cache or key in self._claims or self.fetcher.in_flight(*key) is not None
        if self._tier is not None and self._tier.resident(*key):
            return False
        return not known and self.fetcher.refusal(*key) is None

    def _cancel_prefetches(self) -> None:
        """Abandon the guesses that are still being read: what a layer needs is known now and claimed."""
        for fetch in list(self._guesses):
            if fetch.priority is Priority.PREFETCH:
                self._guesses.discard(fetch)
                self._speculation[Priority.PREFETCH].cancelled += 1
                self.fetcher.abandon(fetch)

    # Callbacks

    def landed(self, fetch: Fetch) -> None:
        """Take an expert into the cache when its fetch ends; called by the fetcher."""
        key = fetch.key
        claim = self._claims.get(key)
        arranged, spoiled = fetch in self._arranged, fetch in self._spoiled
        self._arranged.discard(fetch)
        self._spoiled.discard(fetch)
        guess = fetch in self._guesses
        self._guesses.discard(fetch)
        if fetch.error is not None:
            self._last_error = fetch.error
            if claim is not None:
                self._fail(claim, fetch.error)
            elif guess:
                self._speculation[fetch.priority].failed += 1
        elif spoiled:
            self.pool.release(fetch.slot)
            if claim is not None:
                self._start(claim)
        else:
            speculation = fetch.priority if guess else None
            self.cache.insert(key, Resident(fetch.slot, fetch.addresses, (not arranged, True), speculation))
            if claim is not None:
                self.pool.pin(fetch.slot)
                claim.landed = True
                self._loading -= 1
            else:
                self.pool.serve()
        if not self._loading:
            self.on_idle()
        self._landed_bytes += self.fetcher.expert_bytes(*key)
        if fetch.error is not None or self._landed_bytes >= self._awaited_bytes or not self._reads_for_claims():
            self.wake()

    def _reads_for_claims(self) -> bool:
        """Return whether anything that is claimed is being read; the rest waits for slots, which the layer may hold."""
        claims = self._claims.values()
        return any(claim.fetch is not None and not claim.landed and claim.error is None for claim in claims)

    def inner_landed(self, fetch: Fetch) -> None:
        """Take note that two matrices of an expert have landed; called by the fetcher."""
        claim = self._claims.get(fetch.key)
        if claim is not None and claim.staged:
            self.wake()

    def _granted(self, ticket: Ticket) -> None:
        """Start the fetch that a slot was asked for; called by the pool."""
        self._ahead_tickets.pop(ticket.key, None)
        assert ticket.slot is not None
        try:
            fetch = self.fetcher.start(*ticket.key, ticket.slot, ticket.priority)
        except MerError as error:  # the engine is closing, or the file has been left alone since
            self.pool.release(ticket.slot)
            if ticket.key in self._claims:
                self._fail(self._claims[ticket.key], error)
            self.wake()
            return
        if ticket.priority is not Priority.DEMAND:
            self._guesses.add(fetch)
            self._speculation[ticket.priority].issued += 1
        if ticket.key in self._claims:
            self._claims[ticket.key].fetch = fetch

    def _evict(self, ticket: Ticket) -> int | None:
        """Give up a resident expert for a ticket; called by the pool."""
        if self.keeps_all and ticket.priority is not Priority.DEMAND:
            return None
        layer, kind = ticket.key[0], ticket.kind
        victim = None if self._tier is None else self.cache.evict_for(layer, self._copied(kind), kind=kind)
        if victim is None:
            victim = self.cache.evict_for(layer, self._evictable(kind), kind=kind)
        if victim is None and ticket.priority is Priority.DEMAND and self._ahead:
            victim = self.cache.evict_for(layer, self._evictable(kind, spare_ahead=False), kind=kind)
        return None if victim is None else self._left(victim)

    def _left(self, resident: Resident) -> int:
        """Return the slot of an expert that has left the cache, after counting the guess that brought it in vain."""
        if resident.speculation is not None:
            self._speculation[resident.speculation].evicted_unused += 1
        return resident.slot

    def _evictable(self, kind: int, *, spare_ahead: bool = True) -> Callable[[ExpertKey], bool]:
        """Return whether an expert's slot is of a kind, unpinned, and, with `spare_ahead`, not what is read ahead."""
        pool, cache, spared = self.pool, self.cache, self._ahead if spare_ahead else ()

        def evictable(key: ExpertKey) -> bool:
            slot = cache[key].slot
            return pool.state(slot) is SlotState.READY and pool.kind(slot) == kind and key not in spared

        return evictable

    def _copied(self, kind: int) -> Callable[[ExpertKey], bool]:
        """Return whether an expert is `_evictable` and in the worker's own memory too: it leaves first."""
        evictable, tier = self._evictable(kind), self._tier
        return lambda key: tier is not None and tier.resident(*key) and evictable(key)

    def _fail(self, claim: Claim, error: MerError) -> None:
        claim.error = error
        self._loading -= 1

    def _ticket(self, key: ExpertKey, priority: Priority) -> Ticket:
        return Ticket(key, self._kind_of(*key), priority, self._granted)

    # Waiting

    def wake(self) -> None:
        """Make whoever is in `wait_for_change` look again."""
        self._changed.set()
        self._changed = trio.Event()

    def let_leave(self) -> None:
        """End `keeps_all`."""
        if self.keeps_all:
            self.keeps_all = False
            self.pool.serve()

    async def wait_for_change(self, n_bytes: int = 0) -> None:
        """Wait until there is something to do, or for the next `wake`; changes nothing if cancelled.

        That is when experts of so many bytes have landed, all that are being read have, one has failed, or gate and up
        of one that is `staged` have landed.
        """
        self._awaited_bytes, self._landed_bytes = n_bytes, 0
        began_s = trio.current_time()
        try:
            await self._changed.wait()
        finally:
            self.stalled_s += trio.current_time() - began_s

    def fail_starved(self) -> None:
        """Fail the claims that no slot can serve: all of their kind wait for reads that did not return in time."""
        for claim in list(self._claims.values()):
            ticket = claim.ticket
            waits = ticket is not None and ticket.slot is None and claim.error is None
            if waits and ticket is not None and self._last_error is not None and not self.pool.usable(ticket.kind):
                self.pool.withdraw(ticket)
                self._fail(claim, self._last_error)

    def speculation(self, priority: Priority) -> SpeculationStatistics:
        """Return a snapshot of one class of speculation."""
        return self._speculation[priority].snapshot(
            in_flight=sum(fetch.priority is priority for fetch in self._guesses),
            resident_unused=self.cache.unused(priority),
        )
