"""Accounting of the slots that reads land in: their states, and the line of tickets for them."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence

import attrs

from mer.errors import ConfigError


class Priority(enum.IntEnum):
    """Of a read, and of the slot that it needs; the smaller goes first."""

    DEMAND = 0  # the running layer computes with it
    READ_AHEAD = 1  # a layer that comes next is certain to need it
    PREFETCH = 2  # a guess


class SlotState(enum.IntEnum):
    """States of a slot; every slot is in exactly one."""

    FREE = 0
    FILLING = 1  # leased: reads into it are about to start or in flight
    READY = 2  # holds its bytes, used by nobody right now
    PINNED = 3  # holds its bytes, planned or used by at least one batch
    QUARANTINED = 4  # its bytes are not needed, but the kernel may still write into it


def keeps_all(_: Ticket) -> None:
    """Evict nothing."""


@attrs.define(eq=False)
class Ticket:
    """A place in line for one slot.

    Attributes:
        key: (layer, expert) that the slot is for.
        kind: class of slots that the expert fits.
        priority: of the read that the slot is for.
        on_granted: called once, with the ticket, when its slot has become FILLING; synchronous, possibly before
            `request` has returned.
        evict: called with the ticket when no slot is free: evicts the expert of a READY slot of the ticket's kind and
            returns that slot, or None if the owner of the READY slots keeps them all.
        slot: the slot, once granted.
    """

    key: tuple[int, int]
    kind: int
    priority: Priority
    on_granted: Callable[[Ticket], None]
    evict: Callable[[Ticket], int | None] = keeps_all
    slot: int | None = None


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A snapshot of a BufferPool; `free + filling + ready + pinned + quarantined == n_slots`."""

    n_slots: int
    free: int
    filling: int
    ready: int
    pinned: int
    quarantined: int
    waiting: tuple[int, ...]  # tickets in line, by priority
    permits: int  # slots that speculation could take now


class BufferPool:
    """Leases slots for reads into them.

    Requests wait in line: demand before read-ahead before prefetch, and first come, first served among the requests
    of one priority and one kind of slots. The call that releases a slot grants it to the head of the line; a later
    request never overtakes. A request takes a free slot, or a READY one whose expert is evicted for it. Speculation
    (every priority but demand) must leave a reserve of slots that are free or READY, so that demand never waits for a
    speculative read to land.

    Everything is synchronous, and a transition that does not fit the slot's state raises RuntimeError and changes
    nothing. To be used from the trio thread alone.

    Args:
        slot_counts: number of slots of each kind, at least 1 each; slots are numbered from 0, kind after kind.
        reserve: slots that speculation leaves to demand, of each kind or of all, at least 1 (a kind with no more slots
            than that has no speculation).

    Raises:
        ConfigError: a kind has no slot, or there is no reserve.
    """

    def __init__(self, slot_counts: Sequence[int], *, reserve: int | Sequence[int] = 1) -> None:
        reserves = (reserve,) * len(slot_counts) if isinstance(reserve, int) else tuple(reserve)
        if min(slot_counts, default=1) < 1:
            raise ConfigError(f"a buffer pool needs at least 1 slot of each kind, not {list(slot_counts)}")
        if len(reserves) != len(slot_counts) or min(reserves, default=1) < 1:
            raise ConfigError(f"demand needs a reserve of at least 1 slot of each kind, not {reserve}")
        self.n_slots, self.n_kinds = sum(slot_counts), len(slot_counts)
        self._reserves = reserves
        self._kinds = [kind for kind, count in enumerate(slot_counts) for _ in range(count)]
        self._states = [SlotState.FREE] * self.n_slots
        self._pins = [0] * self.n_slots
        self._counts = [[count, *[0] * (len(SlotState) - 1)] for count in slot_counts]  # [kind][state]
        self._free: list[list[int]] = [[] for _ in slot_counts]  # stacks: the slot freed last is the warmest
        for slot in reversed(range(self.n_slots)):
            self._free[self._kinds[slot]].append(slot)
        self._lines: list[list[deque[Ticket]]] = [[deque() for _ in slot_counts] for _ in Priority]
        self._n_waiting = 0
        self._serving = False

    def kind(self, slot: int) -> int:
        """Return the class of a slot."""
        return self._kinds[slot]

    @property
    def states(self) -> tuple[SlotState, ...]:
        """The state of every slot."""
        return tuple(self._states)

    def state(self, slot: int) -> SlotState:
        """Return the state of a slot.

        Raises:
            RuntimeError: there is no such slot.
        """
        if not 0 <= slot < self.n_slots:
            raise RuntimeError(f"slot {slot} is not one of the pool's {self.n_slots} slots")
        return self._states[slot]

    def usable(self, kind: int) -> int:
        """Return how many slots of a kind are not quarantined."""
        counts = self._counts[kind]
        return sum(counts) - counts[SlotState.QUARANTINED]

    def request(self, ticket: Ticket) -> None:
        """Put a ticket in line; it is granted at once if nobody is before it and it can have a slot.

        Raises:
            RuntimeError: the ticket was granted before.
        """
        if ticket.slot is not None:
            raise RuntimeError(f"this ticket has slot {ticket.slot} already")
        self._enter_line(ticket)
        self.serve()

    def withdraw(self, ticket: Ticket) -> None:
        """Take a ticket that was not granted out of the line.

        Raises:
            RuntimeError: it is not in line.
        """
        self._leave_line(ticket)
        self.serve()  # tickets behind it may get a slot where it got none: they are for other experts

    def promote(self, ticket: Ticket) -> None:
        """Move a ticket that waits as speculation to the end of the line of demand.

        Raises:
            RuntimeError: it is not in line, or is demand already.
        """
        if ticket.priority is Priority.DEMAND:
            raise RuntimeError("this ticket is demand already")
        self._leave_line(ticket)
        ticket.priority = Priority.DEMAND
        self.request(ticket)

    def serve(self) -> None:
        """Grant what can be granted; for owners whose tickets' `evict` would now answer otherwise."""
        if self._serving or not self._n_waiting:
            return
        self._serving = True
        try:
            progress = True
            while progress:  # a grant may put further tickets in line, before those already passed over
                progress = any(self._serve_head(line) for lines in self._lines for line in lines)
        finally:
            self._serving = False

    def permits(self, kind: int) -> int:
        """Return how many slots of a kind speculation could take now without touching the reserve."""
        counts = self._counts[kind]
        return max(0, counts[SlotState.FREE] + counts[SlotState.READY] - self._reserves[kind])

    def has_free(self, kind: int) -> bool:
        """Return whether a slot of a kind is free, so that nothing must be given up for it."""
        return bool(self._free[kind])

    def refill(self, slot: int) -> None:
        """Note that something else is being read into a slot: READY becomes FILLING."""
        self._move(slot, SlotState.FILLING, SlotState.READY)

    def landed(self, slot: int) -> None:
        """Note that all of a slot's bytes have arrived: FILLING becomes READY.

        The owner is told next, by other means; `serve` is called by it, once it knows what the slot holds.
        """
        self._move(slot, SlotState.READY, SlotState.FILLING)

    def pin(self, slot: int) -> None:
        """Keep a slot from being given up while it is planned or used: READY becomes PINNED; pins are counted."""
        self._move(slot, SlotState.PINNED, SlotState.READY, SlotState.PINNED)
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Take back one `pin`; with the last one PINNED becomes READY."""
        self._move(slot, SlotState.PINNED, SlotState.PINNED)
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            self._move(slot, SlotState.READY, SlotState.PINNED)
            self.serve()

    def release(self, slot: int) -> None:
        """Release a slot that is not in use and that no read writes into: READY or FILLING becomes FREE."""
        self._set_free(slot, SlotState.READY, SlotState.FILLING)

    def quarantine(self, slot: int) -> None:
        """Set aside a slot whose bytes are not needed while reads are in flight: FILLING becomes QUARANTINED."""
        self._move(slot, SlotState.QUARANTINED, SlotState.FILLING)

    def reclaim(self, slot: int) -> None:
        """Release a quarantined slot after its last read has landed: QUARANTINED becomes FREE."""
        self._set_free(slot, SlotState.QUARANTINED)

    def statistics(self) -> PoolStatistics:
        """Return a snapshot of the pool."""
        total = [sum(kind[state] for kind in self._counts) for state in SlotState]
        return PoolStatistics(
            n_slots=self.n_slots,
            free=total[SlotState.FREE],
            filling=total[SlotState.FILLING],
            ready=total[SlotState.READY],
            pinned=total[SlotState.PINNED],
            quarantined=total[SlotState.QUARANTINED],
            waiting=tuple(sum(map(len, lines)) for lines in self._lines),
            permits=sum(self.permits(kind) for kind in range(len(self._counts))),
        )

    def _serve_head(self, line: deque[Ticket]) -> bool:
        """Grant the head of one line a slot and return whether it could have one."""
        if not line:
            return False
        ticket = line[0]
        kind = ticket.kind
        if ticket.priority is not Priority.DEMAND and not self.permits(kind):
            return False
        if self._free[kind]:
            slot = self._free[kind].pop()
            self._move(slot, SlotState.FILLING, SlotState.FREE)
        else:
            given_up = ticket.evict(ticket)
            if given_up is None:
                return False
            slot = given_up
            self._move(slot, SlotState.FILLING, SlotState.READY)
        line.popleft()
        self._n_waiting -= 1
        ticket.slot = slot
        ticket.on_granted(ticket)
        return True

    def _enter_line(self, ticket: Ticket) -> None:
        self._lines[ticket.priority][ticket.kind].append(ticket)
        self._n_waiting += 1

    def _leave_line(self, ticket: Ticket) -> None:
        try:
            self._lines[ticket.priority][ticket.kind].remove(ticket)
        except ValueError:
            raise RuntimeError(f"the ticket for expert {ticket.key} is not in line") from None
        self._n_waiting -= 1

    def _set_free(self, slot: int, *allowed: SlotState) -> None:
        self._move(slot, SlotState.FREE, *allowed)
        self._free[self._kinds[slot]].append(slot)
        self.serve()

    def _move(self, slot: int, to: SlotState, *allowed: SlotState) -> None:
        current = self.state(slot)
        if current not in allowed:
            expected = " or ".join(state.name for state in allowed)
            raise RuntimeError(f"slot {slot} is {current.name}; only a slot that is {expected} can become {to.name}")
        self._states[slot] = to
        counts = self._counts[self._kinds[slot]]
        counts[current] -= 1
        counts[to] += 1


def demand_reserve(slot_counts: Sequence[int], top_k: int) -> tuple[int, ...]:
    """Return the slots of each kind that speculation leaves to demand: a token's experts, at most a quarter of them."""
    return tuple(max(1, min(top_k, count // 4)) for count in slot_counts)
