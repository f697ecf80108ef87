"""Bugs to be seeded: each context manager breaks production code in one way while its block runs.

None of them repeats the body of what it breaks: that would go on passing for the code as it once was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import mer.sched.predictors.gate
import mer.sched.predictors.markov
from mer.compute.messages import LoadedExpert
from mer.io.extents import ExpertKey
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.pool import BufferPool, Priority, SlotState, Ticket
from mer.sched.admission import AdmissionQueue
from mer.sched.cache import ExpertCache, Resident
from mer.sched.claims import Claims
from mer.sched.layer import LayerRun
from mer.sched.residents import Residents
from mer.sched.scheduler import Scheduler
from mer.sched.sequence import Sequence
from mer.sched.traffic import Claim
from mer.sched.waiting import Waiting

Bug = Callable[[], AbstractContextManager[None]]


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method."""
    with patch.object(owner, name, function):
        yield


def without(owner: Any, name: str, call: str) -> AbstractContextManager[None]:
    """Let a method leave out what it calls of its own object."""

    def method(self: Any, *args: Any) -> Any:
        with patch.object(self, call, lambda *_: None):
            return original(self, *args)

    original = getattr(owner, name)
    return replaced(owner, name, method)


# --- lost wake-ups ---


def freed_slot_wakes_nobody() -> AbstractContextManager[None]:
    """A slot that is given back stays free, whoever waits for one."""
    return without(BufferPool, "_set_free", "serve")


def withdrawal_wakes_nobody() -> AbstractContextManager[None]:
    """Whoever stands behind a request that is withdrawn is not looked at."""
    return without(BufferPool, "withdraw", "serve")


def end_of_a_fetch_wakes_nobody() -> AbstractContextManager[None]:
    """The scheduler does not hear that something has landed."""
    return replaced(Waiting, "wake", lambda self: None)


def room_in_the_queue_wakes_nobody() -> AbstractContextManager[None]:
    """A place in the queue is not given to those who wait for one."""
    return replaced(AdmissionQueue, "_serve_line", lambda self: None)


# --- leaks: slots, pins, places in line and blocks of whoever is cancelled ---


def abandoned_slot_leaks() -> AbstractContextManager[None]:
    """The slot of a fetch that was given up or has failed never comes back."""
    return replaced(Fetcher, "_reclaim", lambda self, fetch: None)


def cancelled_claim_leaks_its_pin() -> AbstractContextManager[None]:
    """What has landed for a batch that nobody wants any more stays pinned."""

    def give_up(self: Claims, claims: list[Claim]) -> None:
        original(self, [claim for claim in claims if not claim.landed])

    original = Claims.give_up
    return replaced(Claims, "give_up", give_up)


def cancelled_claim_leaks_its_ticket() -> AbstractContextManager[None]:
    """What was asked for a batch that nobody wants any more stays in line."""
    return replaced(BufferPool, "withdraw", lambda self, ticket: None)


def cancelled_sequence_leaks_its_blocks() -> AbstractContextManager[None]:
    """The KV blocks of a sequence whose caller has left are not given back."""

    def let_go(self: Scheduler, sequence: Sequence) -> None:
        if sequence.cancelled:
            sequence.lease = None
        original(self, sequence)

    original = Scheduler._let_go
    return replaced(Scheduler, "_let_go", let_go)


# --- slots ---


def slot_is_leased_twice() -> AbstractContextManager[None]:
    """A slot that is leased while others wait counts as free all the same."""

    def serve_head(self: BufferPool, line: deque[Ticket]) -> bool:
        served = original(self, line)
        if served and line:
            taken = next(slot for slot in range(self.n_slots) if self._states[slot] is SlotState.FILLING)
            kind = self._kinds[taken]
            self._states[taken] = SlotState.FREE
            self._counts[kind][SlotState.FILLING] -= 1
            self._counts[kind][SlotState.FREE] += 1
            self._free[kind].append(taken)
        return served

    original = BufferPool._serve_head
    return replaced(BufferPool, "_serve_head", serve_head)


def newcomer_overtakes() -> AbstractContextManager[None]:
    """A request goes to the front of its line."""

    def enter_line(self: BufferPool, ticket: Ticket) -> None:
        original(self, ticket)
        self._lines[ticket.priority][ticket.kind].rotate(1)

    original = BufferPool._enter_line
    return replaced(BufferPool, "_enter_line", enter_line)


def speculation_takes_the_reserve() -> AbstractContextManager[None]:
    """Guesses may take the slots that demand is to have at once."""
    return replaced(BufferPool, "permits", lambda self, kind: self.n_slots)


def pin_is_stale() -> AbstractContextManager[None]:
    """A slot stays pinned after its last use."""
    return without(BufferPool, "unpin", "_move")


def pin_is_ignored() -> AbstractContextManager[None]:
    """The policy gives up what must stay."""

    def evict_for(
        self: ExpertCache, layer: int, evictable: Callable[[ExpertKey], bool], *, kind: int = 0
    ) -> Resident | None:
        return original(self, layer, lambda _: True, kind=kind)

    original = ExpertCache.evict_for
    return replaced(ExpertCache, "evict_for", evict_for)


# --- fetches ---


def reclaimed_with(name: str, value: object) -> AbstractContextManager[None]:
    """Let what keeps a slot from being given back look as it does when nothing does; once, as the pool would notice."""

    def reclaim(self: Fetcher, fetch: Fetch) -> None:
        if self._pool.state(fetch.slot) is SlotState.QUARANTINED:
            with patch.object(fetch, name, value):
                original(self, fetch)

    original = Fetcher._reclaim
    return replaced(Fetcher, "_reclaim", reclaim)


def hold_is_ignored() -> AbstractContextManager[None]:
    """A slot is given away while a job works in it."""

    return reclaimed_with("_holds", 0)


def slot_is_given_back_before_its_reads() -> AbstractContextManager[None]:
    """The slot of a fetch that is given up is free at once, though the kernel may still write into it."""

    return reclaimed_with("_reading", frozenset())


def promotion_reads_again() -> AbstractContextManager[None]:
    """A guess that becomes demand is read a second time."""

    def promote(self: Fetcher, fetch: Fetch, priority: Priority) -> None:
        before = fetch.priority
        original(self, fetch, priority)
        if fetch.priority is not before and fetch._reading:
            self._counts.reads_started += 1

    original = Fetcher.promote
    return replaced(Fetcher, "promote", promote)


def gate_and_up_are_told_too_early() -> AbstractContextManager[None]:
    """The listener hears of two matrices with the first."""

    def part_landed(self: Fetch, part: int) -> bool:
        if not self.inner_landed and len(self.missing) == 3 and self._listener is not None:
            self.inner_landed = True
            self._listener.inner_landed(self)
        return original(self, part)

    original = Fetch.part_landed
    return replaced(Fetch, "part_landed", part_landed)


def gate_and_up_are_not_told() -> AbstractContextManager[None]:
    """The listener hears of nothing before the last matrix."""

    def part_landed(self: Fetch, part: int) -> bool:
        listener, self._listener = self._listener, None
        try:
            return original(self, part)
        finally:
            self._listener = listener

    original = Fetch.part_landed
    return replaced(Fetch, "part_landed", part_landed)


def end_of_a_fetch_is_not_told() -> AbstractContextManager[None]:
    """The listener does not hear that a fetch has landed or failed."""
    return replaced(Fetch, "tell_end", lambda self: None)


# --- the layers ---


def used_expert_counts_as_fresh() -> AbstractContextManager[None]:
    """An expert's bytes are re-arranged for the kernels again in its next use."""

    def unpin(
        self: Residents,
        layer: int,
        experts: list[LoadedExpert],
        *,
        used: bool,
        arranged: Collection[int] | None = None,
    ) -> None:
        original(self, layer, experts, used=False)

    original = Residents.unpin
    return replaced(Residents, "unpin", unpin)


def expert_is_left_out() -> AbstractContextManager[None]:
    """One of the experts that land while others are computed is forgotten."""

    def collect(self: LayerRun) -> None:
        original(self)
        if len(self._ready) > 2:
            loaded = self._ready.pop()
            self._store.residents.unpin(self._layer, [loaded], used=False)

    original = LayerRun._collect
    return replaced(LayerRun, "_collect", collect)


# --- guesses ---


@contextmanager
def threshold_is_out_of_reach() -> Iterator[None]:
    """A guess must be more than certain."""
    modules = (mer.sched.predictors.markov, mer.sched.predictors.gate)
    with patch.object(modules[0], "bar", lambda *_: 1.01), patch.object(modules[1], "bar", lambda *_: 1.01):
        yield


@contextmanager
def threshold_is_nothing() -> Iterator[None]:
    """Every expert that was ever seen is a guess."""
    modules = (mer.sched.predictors.markov, mer.sched.predictors.gate)
    with patch.object(modules[0], "bar", lambda *_: 0.0), patch.object(modules[1], "bar", lambda *_: 0.0):
        yield
