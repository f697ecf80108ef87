"""The buffer pool against plain lists: who is granted a slot, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import attrs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mer.io.pool import BufferPool, Priority, SlotState, Ticket

FREE, FILLING, READY, PINNED, QUARANTINED = SlotState


@attrs.define(eq=False)
class Asked:
    """A request: the model's view of it beside the real one."""

    ticket: Ticket
    returns: bool  # gives its slot back while it is told of it, as when a read is refused
    layer: int  # whose expert it is for
    kind: int
    priority: Priority


class PoolMachine(RuleBasedStateMachine):
    """Slots go to demand before speculation, in the order of the requests, and as soon as they can.

    The model keeps states in a list and requests in lists. Which of several slots is given is the pool's business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[Priority, int], list[Asked]] = {}
        self.granted: list[Asked] = []  # by the pool, in order, since the model was last brought up to date
        self.kept: set[tuple[int, int]] = set()  # slots that their owner does not give up for a layer's experts
        self.evicting: list[int] = []  # slots given up since then
        self.pins: Counter[int] = Counter()

    @initialize(
        counts=st.lists(st.integers(1, 3), min_size=1, max_size=2), reserve=st.integers(1, 2), favour=st.booleans()
    )
    def open(self, counts: list[int], reserve: int, favour: bool) -> None:
        self.pool = BufferPool(counts, reserve=reserve)
        self.reserve = reserve
        if favour:  # layer 1: nothing leaves for layer 0
            self.kept = {(slot, 0) for slot in range(sum(counts))}
        self.states = [FREE] * sum(counts)
        self.kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
        self.lines = {(priority, kind): [] for priority in Priority for kind in range(len(counts))}

    # --- the owner ---

    def give_up(self, ticket: Ticket) -> int | None:
        """Be the tickets' `evict`: give up the last READY slot that is not kept."""
        for slot in reversed(range(len(self.kinds))):
            ready = self.pool.state(slot) is READY and self.kinds[slot] == ticket.kind
            if ready and (slot, ticket.key[0]) not in self.kept:
                return slot
        return None

    def told(self, asked: Asked) -> None:
        """Be a ticket's `on_granted`."""
        self.granted.append(asked)
        if asked.returns:
            assert asked.ticket.slot is not None
            self.pool.release(asked.ticket.slot)

    # --- the model ---

    def of_kind(self, kind: int, states: Collection[SlotState]) -> list[int]:
        return [slot for slot, state in enumerate(self.states) if self.kinds[slot] == kind and state in states]

    def evictable(self, asked: Asked) -> list[int]:
        return [slot for slot in self.of_kind(asked.kind, [READY]) if (slot, asked.layer) not in self.kept]

    def next_grant(self) -> Asked | None:
        """Return whose turn it is, of those that can have a slot now."""
        for (priority, kind), line in self.lines.items():
            headroom = len(self.of_kind(kind, [FREE, READY])) - self.reserve
            allowed = priority is Priority.DEMAND or headroom > 0
            if line and allowed and (self.of_kind(kind, [FREE]) or self.evictable(line[0])):
                return line[0]
        return None

    def update(self) -> None:
        """Check what the pool has granted against what it had to grant, and bring the model up to date."""
        granted, self.granted = self.granted, []
        for asked in granted:
            due = self.next_grant()
            assert due is not None, "a request was granted that had to wait"
            assert due is asked, "a request was granted out of turn"
            self.lines[asked.priority, asked.kind].pop(0)
            slot = asked.ticket.slot
            assert slot is not None
            assert self.kinds[slot] == asked.kind
            free = self.of_kind(asked.kind, [FREE])
            assert slot in (free or self.evictable(asked)), "a slot in two leases"
            self.states[slot] = FREE if asked.returns else FILLING
        assert self.next_grant() is None, "somebody waits for a slot that is there"

    # --- requests ---

    @rule(
        kind=st.integers(0, 1),
        wishes=st.lists(st.tuples(st.integers(0, 1), st.sampled_from(Priority)), min_size=1, max_size=4),
        returns=st.sampled_from([False, False, False, True]),
    )
    def request(self, kind: int, wishes: list[tuple[int, Priority]], returns: bool) -> None:
        for layer, priority in wishes:
            self.ask(layer, min(kind, max(self.kinds)), priority, returns)

    def ask(self, layer: int, kind: int, priority: Priority, returns: bool) -> None:
        ticket = Ticket((layer, 0), kind, priority, lambda _: self.told(asked), self.give_up)
        asked = Asked(ticket, returns, layer, kind, priority)
        self.lines[priority, kind].append(asked)
        self.pool.request(ticket)
        self.update()

    def waiting(self, *priorities: Priority) -> list[Asked]:
        return [asked for (priority, _), line in self.lines.items() if priority in priorities for asked in line]

    @precondition(lambda self: self.waiting(*Priority))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        heads = [line[0] for line in self.lines.values() if line]
        asked = data.draw(st.sampled_from(heads) | st.sampled_from(self.waiting(*Priority)))
        self.lines[asked.priority, asked.kind].remove(asked)
        self.pool.withdraw(asked.ticket)
        self.update()

    @precondition(lambda self: self.waiting(*list(Priority)[1:]))
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.waiting(*list(Priority)[1:])))
        self.lines[asked.priority, asked.kind].remove(asked)
        asked.priority = Priority.DEMAND
        self.lines[asked.priority, asked.kind].append(asked)
        self.pool.promote(asked.ticket)
        self.update()

    # --- slots ---

    @rule(data=st.data(), n=st.integers(1, 4))
    def steps(self, data: st.DataObject, n: int) -> None:
        """Move slots on, in any way that their states allow."""
        for _ in range(n):
            self.step(data)

    def step(self, data: st.DataObject) -> None:
        steps = [
            (name, slot)
            for name, (allowed, _) in STEPS.items()
            for slot, state in enumerate(self.states)
            if state in allowed
        ]
        if not steps:
            return
        name, slot = data.draw(st.sampled_from(steps))
        _, to = STEPS[name]
        self.pins[slot] += {"pin": 1, "unpin": -1}.get(name, 0)
        self.states[slot] = PINNED if name == "unpin" and self.pins[slot] else to
        getattr(self.pool, name)(slot)
        if name == "landed":
            self.pool.serve()  # its owner does
        self.update()

    @rule(slot=st.integers(0, 3), layer=st.integers(0, 1))
    def keep(self, slot: int, layer: int) -> None:
        """Let the owner change its mind about a slot."""
        if (slot, layer) in self.kept:
            self.kept.remove((slot, layer))
            self.pool.serve()
        else:
            self.kept.add((slot, layer))
        self.update()

    @invariant()
    def same(self) -> None:
        if not self.lines:
            return
        assert [self.pool.state(slot) for slot in range(len(self.states))] == self.states
        statistics, by_state = self.pool.statistics(), Counter(self.states)
        counted = (statistics.free, statistics.filling, statistics.ready, statistics.pinned, statistics.quarantined)
        assert counted == tuple(by_state[state] for state in SlotState)
        assert statistics.waiting == tuple(len(self.waiting(priority)) for priority in Priority)
        permits = [max(0, len(self.of_kind(kind, [FREE, READY])) - self.reserve) for kind in range(max(self.kinds) + 1)]
        assert [self.pool.permits(kind) for kind in range(len(permits))] == permits
        assert statistics.permits == sum(permits)


STEPS = {  # name: (allowed states, resulting state); pins are counted
    "landed": ({FILLING}, READY),
    "release": ({READY, FILLING}, FREE),
    "quarantine": ({FILLING}, QUARANTINED),
    "reclaim": ({QUARANTINED}, FREE),
    "pin": ({READY, PINNED}, PINNED),
    "unpin": ({PINNED}, READY),
}
