"""The buffer pool against a model in plain lists, and in its single rules."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.io.pool import BufferPool, Priority, SlotState, Ticket, demand_reserve

FREE, FILLING, READY, PINNED, QUARANTINED = SlotState
DEMAND, READ_AHEAD, PREFETCH = Priority


def counts(pool: BufferPool) -> dict[SlotState, int]:
    s = pool.statistics()
    by_state = dict(zip(SlotState, (s.free, s.filling, s.ready, s.pinned, s.quarantined), strict=True))
    assert sum(by_state.values()) == s.n_slots == pool.n_slots
    assert by_state == dict.fromkeys(SlotState, 0) | Counter(pool.state(slot) for slot in range(pool.n_slots))
    return by_state


@attrs.define(eq=False)
class Line:
    """A pool whose grants are written down, and whose owner gives up READY slots in the order in which they landed."""

    pool: BufferPool
    granted: list[Ticket] = attrs.Factory(list)
    keeps: set[int] = attrs.Factory(set)  # slots that the owner does not give up
    landed: list[int] = attrs.Factory(list)

    def evict(self, ticket: Ticket) -> int | None:
        for slot in self.landed:
            if slot not in self.keeps and self.pool.state(slot) is READY and self.pool.kind(slot) == ticket.kind:
                self.landed.remove(slot)
                return slot
        return None

    def ask(self, priority: Priority = DEMAND, kind: int = 0) -> Ticket:
        ticket = Ticket((0, 0), kind, priority, self.granted.append, self.evict)
        self.pool.request(ticket)
        return ticket

    def land(self, ticket: Ticket) -> int:
        assert ticket.slot is not None
        self.pool.landed(ticket.slot)
        self.landed.append(ticket.slot)
        self.pool.serve()
        return ticket.slot


# --- single rules ---


def test_a_pool_without_kinds_has_no_slots() -> None:
    statistics = BufferPool([], reserve=()).statistics()
    assert (statistics.n_slots, statistics.free, statistics.permits) == (0, 0, 0)


@pytest.mark.parametrize(
    ("slot_counts", "reserve"), [([0], 1), ([3, 0], 1), ([-1], 1), ([3], 0), ([3, 3], (1, 0)), ([3, 3], (1,))]
)
def test_refuses_kinds_without_slots_and_no_reserve(slot_counts: list[int], reserve: int | tuple[int]) -> None:
    with pytest.raises(ConfigError, match="at least 1 slot"):
        BufferPool(slot_counts, reserve=reserve)


def test_all_misses_get_their_slots_at_once() -> None:
    line = Line(BufferPool([5]))
    tickets = [line.ask() for _ in range(5)]
    assert line.granted == tickets
    assert sorted(t.slot for t in tickets if t.slot is not None) == [0, 1, 2, 3, 4]
    assert counts(line.pool)[FILLING] == 5


def test_misses_take_evictable_slots_at_once() -> None:
    line = Line(BufferPool([3]))
    old = [line.land(line.ask()) for _ in range(3)]
    assert [line.ask().slot for _ in range(3)] == old
    assert counts(line.pool)[FILLING] == 3


def test_first_come_first_served_and_never_overtaken() -> None:
    line = Line(BufferPool([1]))
    holder = line.ask()
    waiting = [line.ask() for _ in range(3)]
    assert [t.slot for t in waiting] == [None] * 3
    slot = line.land(holder)
    assert line.granted == [holder, waiting[0]]
    line.pool.release(slot)  # its read failed
    assert line.granted == [holder, *waiting[:2]]
    late = line.ask()
    line.pool.release(slot)
    assert line.granted == [holder, *waiting]
    assert late.slot is None


def test_demand_goes_before_speculation_that_waited_longer() -> None:
    line = Line(BufferPool([2], reserve=1))
    first, second = line.ask(), line.ask()
    guess, ahead, demand = line.ask(PREFETCH), line.ask(READ_AHEAD), line.ask()
    line.land(first)
    assert demand.slot is not None
    assert (ahead.slot, guess.slot) == (None, None)
    line.land(second)  # one READY slot is the reserve
    assert (ahead.slot, guess.slot) == (None, None)
    line.land(demand)
    assert ahead.slot is not None
    assert guess.slot is None


@pytest.mark.parametrize("reserve", [1, 2, 4])
@pytest.mark.parametrize("priority", [READ_AHEAD, PREFETCH])
def test_speculation_leaves_demand_its_reserve(reserve: int, priority: Priority) -> None:
    line = Line(BufferPool([4], reserve=reserve))
    guesses = [line.ask(priority) for _ in range(9)]
    assert sum(t.slot is not None for t in guesses) == 4 - reserve
    assert line.pool.statistics().permits == 0
    assert all(line.ask().slot is not None for _ in range(reserve))


def test_every_kind_has_a_reserve_of_its_own() -> None:
    assert demand_reserve((100, 9, 3), 4) == (4, 2, 1)
    pool = BufferPool((100, 9, 3), reserve=(4, 2, 1))
    assert [pool.permits(kind) for kind in range(3)] == [96, 7, 2]


def test_permits_follow_what_is_pinned_and_set_aside() -> None:
    line = Line(BufferPool([4], reserve=1))
    assert line.pool.permits(0) == 3
    slot = line.land(line.ask())
    assert line.pool.permits(0) == 3  # it can be given up
    line.pool.pin(slot)
    assert line.pool.permits(0) == 2
    stuck = line.ask()
    assert line.pool.permits(0) == 1
    assert stuck.slot is not None
    line.pool.quarantine(stuck.slot)
    assert line.pool.permits(0) == 1
    assert line.pool.usable(0) == 3
    line.pool.reclaim(stuck.slot)
    line.pool.unpin(slot)
    assert line.pool.permits(0) == 3


def test_unpinning_serves_the_line() -> None:
    line = Line(BufferPool([1]))
    slot = line.land(line.ask())
    line.pool.pin(slot)
    line.pool.pin(slot)
    waiting = line.ask()
    line.pool.unpin(slot)
    assert waiting.slot is None
    line.pool.unpin(slot)
    assert waiting.slot == slot


def test_an_owner_that_keeps_a_slot_gives_it_when_asked_again() -> None:
    line = Line(BufferPool([1]))
    slot = line.land(line.ask())
    line.keeps.add(slot)
    waiting = line.ask()
    assert waiting.slot is None
    line.keeps.clear()
    line.pool.serve()
    assert waiting.slot == slot


def test_kinds_have_their_own_slots_and_lines() -> None:
    line = Line(BufferPool([1, 2]))
    assert [line.pool.kind(slot) for slot in range(3)] == [0, 1, 1]
    line.ask(kind=0)
    blocked = line.ask(kind=0)
    small = [line.ask(kind=1) for _ in range(2)]
    assert blocked.slot is None
    assert sorted(t.slot for t in small if t.slot is not None) == [1, 2]
    line.land(small[0])
    assert blocked.slot is None, "a slot of another kind was given"


def test_withdrawing_lets_the_next_one_in() -> None:
    pool = BufferPool([1])
    granted: list[Ticket] = []
    first, picky, modest = (Ticket((0, expert), 0, DEMAND, granted.append, lambda _: 0) for expert in range(3))
    picky.evict = lambda _: None
    pool.request(first)
    pool.landed(0)
    pool.request(picky)
    pool.request(modest)
    assert granted == [first]
    pool.withdraw(picky)
    assert granted == [first, modest]
    with pytest.raises(RuntimeError, match="not in line"):
        pool.withdraw(picky)
    assert pool.statistics().waiting == (0, 0, 0)


def test_promotion_joins_the_end_of_demand() -> None:
    line = Line(BufferPool([2], reserve=1))
    running = [line.ask(), line.ask()]
    guess, before = line.ask(PREFETCH), line.ask()
    line.pool.promote(guess)
    after = line.ask()
    line.land(running[0])
    line.land(running[1])
    assert line.granted == [*running, before, guess]
    assert after.slot is None
    with pytest.raises(RuntimeError, match="demand already"):
        line.pool.promote(after)
    with pytest.raises(RuntimeError, match="demand already"):
        line.pool.promote(guess)


def test_a_grant_that_asks_for_more_keeps_the_order() -> None:
    pool = BufferPool([2])
    granted: list[str] = []

    def chain(ticket: Ticket) -> None:
        granted.append("first")
        pool.request(Ticket((0, 1), 0, DEMAND, lambda _: granted.append("second")))
        granted.append("asked")

    pool.request(Ticket((0, 0), 0, DEMAND, chain))
    assert granted == ["first", "asked", "second"]


def test_a_granted_ticket_is_not_put_in_line_again() -> None:
    line = Line(BufferPool([2]))
    ticket = line.ask()
    with pytest.raises(RuntimeError, match="has slot"):
        line.pool.request(ticket)


@pytest.mark.parametrize("action", ["landed", "pin", "unpin", "release", "quarantine", "reclaim"])
def test_transitions_that_do_not_fit_change_nothing(action: str) -> None:
    line = Line(BufferPool([2]))
    with pytest.raises(RuntimeError, match="FREE"):
        getattr(line.pool, action)(0)
    with pytest.raises(RuntimeError, match="not one of"):
        getattr(line.pool, action)(2)
    assert counts(line.pool)[FREE] == 2


# --- the model ---

STEPS = {  # name: (allowed states, resulting state); pin and unpin are counted apart
    "landed": ({FILLING}, READY),
    "release": ({READY, FILLING}, FREE),
    "quarantine": ({FILLING}, QUARANTINED),
    "reclaim": ({QUARANTINED}, FREE),
    "pin": ({READY, PINNED}, PINNED),
    "unpin": ({PINNED}, READY),
}

Op: TypeAlias = tuple[str, int]
numbers = st.integers(0, 11)
ops = st.one_of(
    st.tuples(st.sampled_from(["demand", "demand", "ahead", "guess", "withdraw", "promote"]), numbers),
    st.tuples(st.sampled_from(["release", "landed", "landed", "pin", "unpin", "quarantine", "reclaim"]), numbers),
)


class Model:
    """What the pool must do, over a list of slots and one list of waiting tickets in order of arrival."""

    def __init__(self, slot_counts: list[int], reserve: int) -> None:
        self.kinds = [kind for kind, n in enumerate(slot_counts) for _ in range(n)]
        self.states = [FREE] * len(self.kinds)
        self.pins: Counter[int] = Counter()
        self.reserve = reserve
        self.waiting: list[Ticket] = []
        self.expected: list[Ticket] = []

    def available(self, kind: int) -> int:
        return sum(k == kind and s in (FREE, READY) for k, s in zip(self.kinds, self.states, strict=True))

    def serve(self) -> None:
        """Grant to the first of the most urgent line whose request can be met, over and over."""
        while True:
            heads: dict[tuple[Priority, int], Ticket] = {}
            for ticket in self.waiting:
                heads.setdefault((ticket.priority, ticket.kind), ticket)
            for (priority, kind), head in sorted(heads.items(), key=lambda item: item[0]):
                if self.available(kind) > (0 if priority is DEMAND else self.reserve):
                    self.waiting.remove(head)
                    self.expected.append(head)
                    slots = list(zip(self.kinds, self.states, strict=True))
                    slot = slots.index((kind, FREE if (kind, FREE) in slots else READY))
                    self.states[slot] = FILLING  # which one of equals is the pool's choice; put right by the caller
                    break
            else:
                return


@given(
    slot_counts=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    reserve=st.integers(1, 3),
    program=st.lists(ops, max_size=60),
)
def test_against_the_model(slot_counts: list[int], reserve: int, program: list[Op]) -> None:
    pool = BufferPool(slot_counts, reserve=reserve)
    line = Line(pool)
    model = Model(slot_counts, reserve)
    tickets: list[Ticket] = []
    for name, number in program:
        slot = number % pool.n_slots
        if name in ("demand", "ahead", "guess"):
            priority = {"demand": DEMAND, "ahead": READ_AHEAD, "guess": PREFETCH}[name]
            ticket = Ticket((0, number), number % len(slot_counts), priority, line.granted.append, line.evict)
            tickets.append(ticket)
            model.waiting.append(ticket)
            pool.request(ticket)
        elif name in ("withdraw", "promote"):
            if not tickets:
                continue
            ticket = tickets[number % len(tickets)]
            if ticket not in model.waiting or (name == "promote" and ticket.priority is DEMAND):
                with pytest.raises(RuntimeError):
                    getattr(pool, name)(ticket)
                continue
            model.waiting.remove(ticket)
            if name == "promote":
                model.waiting.append(ticket)
            getattr(pool, name)(ticket)
        else:
            allowed, result = STEPS[name]
            if model.states[slot] not in allowed:
                with pytest.raises(RuntimeError):
                    getattr(pool, name)(slot)
                continue
            if name in ("pin", "unpin"):
                model.pins[slot] += 1 if name == "pin" else -1
                result = PINNED if model.pins[slot] else READY
            model.states[slot] = result
            if name == "landed":
                line.landed.append(slot)
            elif slot in line.landed and result is FREE:
                line.landed.remove(slot)
            getattr(pool, name)(slot)
            if name == "landed":
                pool.serve()
        model.serve()
        assert line.granted == model.expected, "not who should have been granted a slot, or not in that order"
        assert counts(pool) == dict.fromkeys(SlotState, 0) | Counter(model.states)
        filling = [t.slot for t in line.granted if t.slot is not None]
        model.states = [pool.state(s) for s in range(pool.n_slots)]
        assert all(pool.kind(t.slot) == t.kind for t in line.granted if t.slot is not None)
        assert len(filling) == len(line.granted)
        assert [pool.permits(kind) for kind in range(len(slot_counts))] == [
            max(0, model.available(kind) - reserve) for kind in range(len(slot_counts))
        ]
        waiting = Counter(t.priority for t in model.waiting)
        assert pool.statistics().waiting == tuple(waiting[priority] for priority in Priority)


@given(st.lists(st.tuples(st.booleans(), numbers), max_size=80))
def test_no_slot_is_in_two_leases(program: list[tuple[bool, int]]) -> None:
    line = Line(BufferPool([3]))
    holders: dict[int, Ticket] = {}
    seen = 0
    for asks, number in program:
        if asks:
            line.ask(Priority(number % 3))
        elif holders:
            slot = sorted(holders)[number % len(holders)]
            del holders[slot]
            line.pool.release(slot)
        for ticket in line.granted[seen:]:
            assert ticket.slot is not None
            assert ticket.slot not in holders, "a slot in two leases"
            holders[ticket.slot] = ticket
        seen = len(line.granted)
