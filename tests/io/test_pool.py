"""The buffer pool against a model in plain lists, under cancellation at every step, and in its single rules."""

from __future__ import annotations

from collections import Counter, deque
from typing import TypeAlias

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.errors import ConfigError
from mer.io.pool import BufferPool, SlotState
from mer.testing.cancel import Subject, cancel_at_every_step

FREE, FILLING, READY, PINNED, QUARANTINED = SlotState


def counts(pool: BufferPool) -> dict[SlotState, int]:
    s = pool.statistics()
    by_state = dict(zip(SlotState, (s.free, s.filling, s.ready, s.pinned, s.quarantined), strict=True))
    assert sum(by_state.values()) == s.n_slots == pool.n_slots
    assert by_state == dict.fromkeys(SlotState, 0) | Counter(pool.state(slot) for slot in range(pool.n_slots))
    return by_state


# --- the model ---

STEPS = {  # name: (allowed states, resulting state); pin and unpin are counted apart
    "landed": ({FILLING}, READY),
    "release": ({READY, FILLING}, FREE),
    "quarantine": ({FILLING}, QUARANTINED),
    "reclaim": ({QUARANTINED}, FREE),
    "pin": ({READY, PINNED}, PINNED),
    "unpin": ({PINNED}, READY),
}


@attrs.define(eq=False)
class Task:
    """A task that leases; the model's view of it and the real one."""

    n: int
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    slots: list[int] | None = None  # what the pool gave


@attrs.define
class Model:
    """What the pool must do: strict first come, first served, whole requests."""

    n_slots: int
    used: dict[int, SlotState] = attrs.Factory(dict)
    pins: Counter[int] = attrs.Factory(Counter)
    line: deque[Task] = attrs.Factory(deque)
    granted: list[Task] = attrs.Factory(list)
    unassigned: int = 0  # slots granted to tasks that have not run yet, so that their numbers are not known

    @property
    def free(self) -> int:
        return self.n_slots - len(self.used) - self.unassigned

    def serve(self) -> None:
        while self.line and self.line[0].n <= self.free:
            task = self.line.popleft()
            self.unassigned += task.n
            self.granted.append(task)

    def learn(self) -> None:
        """Take over the slots' numbers from the tasks that must have them by now."""
        for task in self.granted:
            assert task.slots is not None, "a request that fits is still parked"
            assert len(task.slots) == len(set(task.slots)) == task.n
            for slot in task.slots:
                assert slot not in self.used, "a slot in two leases"
                self.used[slot] = FILLING
            self.unassigned -= task.n
        self.granted.clear()
        for task in self.line:
            assert task.slots is None, "a request was served out of turn"


Op: TypeAlias = tuple[str, int]

numbers = st.integers(0, 11)
ops = st.one_of(
    st.tuples(st.sampled_from(["lease", "lease", "lease_nowait", "cancel"]), numbers),
    st.tuples(st.sampled_from(["release", "release", "landed", "pin", "unpin", "quarantine", "reclaim"]), numbers),
    st.tuples(st.just("settle"), st.just(0)),
)


async def run_against_model(n_slots: int, program: list[Op]) -> None:
    pool = BufferPool(n_slots)
    model = Model(n_slots)
    tasks: list[Task] = []
    unsettled: set[str] = set()  # what has been done since all tasks were last given their turn

    async def lease(task: Task) -> None:
        with task.scope:
            task.slots = await pool.lease(task.n)

    async def settle() -> None:
        await wait_all_tasks_blocked()
        unsettled.clear()
        model.learn()
        by_state = counts(pool)
        assert by_state == dict.fromkeys(SlotState, 0) | Counter(model.used.values()) | {FREE: model.free}
        assert {slot for slot in range(n_slots) if pool.state(slot) is not FREE} == set(model.used)
        statistics = pool.statistics()
        assert statistics.tasks_waiting == len(model.line)
        assert statistics.slots_wanted == sum(task.n for task in model.line)

    async def work(nursery: trio.Nursery) -> None:
        for name, number in program:
            if "lease" in unsettled or (name == "lease_nowait" and unsettled):
                await settle()  # the order in which trio runs new tasks is not defined
            if name == "settle":
                await settle()
            elif name == "lease":
                task = Task(number % n_slots + 1)
                tasks.append(task)
                model.line.append(task)
                model.serve()
                nursery.start_soon(lease, task)
            elif name == "lease_nowait":
                n = number % n_slots + 1
                if model.line or n > model.free:
                    with pytest.raises(trio.WouldBlock):
                        pool.lease_nowait(n)
                else:
                    model.granted.append(Task(n, slots=pool.lease_nowait(n)))
                    model.unassigned += n
                    model.learn()
            elif name == "cancel":
                if tasks:
                    task = tasks[-1 - number % len(tasks)]
                    task.scope.cancel()
                    if task in model.line:
                        model.line.remove(task)
                        model.serve()
            elif (slot := number % n_slots) in model.used or not unsettled:
                allowed, result = STEPS[name]
                if model.used.get(slot, FREE) not in allowed:
                    before = counts(pool)
                    with pytest.raises(RuntimeError, match=f"slot {slot}"):
                        getattr(pool, name)(slot)
                    assert counts(pool) == before
                else:
                    getattr(pool, name)(slot)
                    model.pins[slot] += (name == "pin") - (name == "unpin")
                    model.used[slot] = PINNED if model.pins[slot] else result
                    if result is FREE:
                        del model.used[slot]
                        model.serve()
            if name != "settle":
                unsettled.add(name)
        await settle()
        while model.used:  # give everything back: everyone in line must come through in the end
            for slot in list(model.used):
                drain(pool, model, slot)
            await settle()
        assert not model.line

    with trio.fail_after(60):  # on the mock clock: only a task that is never woken takes that long
        async with trio.open_nursery() as nursery:
            await work(nursery)
    assert counts(pool)[FREE] == n_slots
    assert all(task.slots is not None or task.scope.cancelled_caught for task in tasks)


def drain(pool: BufferPool, model: Model, slot: int) -> None:
    state = model.used.pop(slot, FREE)
    for _ in range(model.pins.pop(slot, 0)):
        pool.unpin(slot)
    if state is QUARANTINED:
        pool.reclaim(slot)
    elif state is not FREE:
        pool.release(slot)
    model.serve()


@given(st.integers(1, 5), st.lists(ops, max_size=40))
def test_pool_does_what_the_model_does(n_slots: int, program: list[Op]) -> None:
    trio.run(run_against_model, n_slots, program, clock=MockClock(autojump_threshold=0))


# --- cancellation ---


@pytest.mark.parametrize("wanted", [1, 2])
def test_cancelling_a_lease_at_any_step_loses_nothing_and_wakes_the_next(wanted: int) -> None:
    async def scenario(subject: Subject) -> None:
        pool = BufferPool(2)
        first = await pool.lease(2)
        held: list[int] = []
        later: list[int] = []

        async def body() -> None:
            slots = await pool.lease(wanted)
            try:
                held.extend(slots)
                await trio.sleep(1)
            finally:
                for slot in slots:
                    pool.release(slot)

        async def give_back() -> None:
            for slot in first:
                await trio.sleep(1)
                pool.release(slot)

        async def next_in_line() -> None:
            await trio.sleep(0.5)
            with trio.fail_after(60):
                later.extend(await pool.lease(2))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_back)
            nursery.start_soon(next_in_line)
            finished = await subject.run(body)
        assert len(later) == 2
        assert finished <= (len(held) == wanted)
        assert counts(pool) == {FREE: 0, FILLING: 2, READY: 0, PINNED: 0, QUARANTINED: 0}
        assert pool.statistics().tasks_waiting == 0

    assert cancel_at_every_step(scenario) >= 3


def test_cancelling_a_lease_that_need_not_wait_loses_nothing() -> None:
    async def scenario(subject: Subject) -> None:
        pool = BufferPool(2)

        async def body() -> None:
            for slot in await pool.lease(2):
                pool.release(slot)

        await subject.run(body)
        assert counts(pool)[FREE] == 2

    assert cancel_at_every_step(scenario) >= 2


async def test_cancelled_head_lets_all_who_fit_through_at_once() -> None:
    pool = BufferPool(3)
    (slot,) = await pool.lease(1)
    head = trio.CancelScope()
    got: list[str] = []

    async def ask(name: str, n: int, scope: trio.CancelScope) -> None:
        with scope:
            await pool.lease(n)
            got.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "head", 3, head)
        await wait_all_tasks_blocked()
        for name in ("second", "third"):
            nursery.start_soon(ask, name, 1, trio.CancelScope())
            await wait_all_tasks_blocked()
        assert got == []
        head.cancel()
        await wait_all_tasks_blocked()
        assert sorted(got) == ["second", "third"]
        nursery.cancel_scope.cancel()
    assert pool.state(slot) is FILLING


async def test_release_between_a_cancellation_and_the_cancelled_task_is_not_lost() -> None:
    pool = BufferPool(1)
    (slot,) = await pool.lease(1)
    scope = trio.CancelScope()

    async def ask() -> None:
        with scope:
            await pool.lease(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        scope.cancel()
        pool.release(slot)
    assert scope.cancelled_caught
    assert counts(pool)[FREE] == 1


async def test_lease_in_a_cancelled_scope_takes_nothing() -> None:
    pool = BufferPool(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await pool.lease(1)
    assert scope.cancelled_caught
    assert counts(pool)[FREE] == 1


# --- single rules ---


async def test_a_newcomer_does_not_overtake_a_larger_request() -> None:
    pool = BufferPool(3)
    a, b = await pool.lease(2)
    order: list[int] = []

    async def ask(n: int) -> None:
        await pool.lease(n)
        order.append(n)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, 2)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.WouldBlock):  # one slot is free, and spoken for
            pool.lease_nowait(1)
        nursery.start_soon(ask, 1)
        await wait_all_tasks_blocked()
        assert order == []
        pool.release(a)
        await wait_all_tasks_blocked()
        assert order == [2]
        pool.release(b)
    assert order == [2, 1]


async def test_a_released_slot_is_handed_over_before_the_waiter_runs() -> None:
    pool = BufferPool(1)
    (slot,) = await pool.lease(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.lease, 1)
        await wait_all_tasks_blocked()
        pool.release(slot)
        assert pool.state(slot) is FILLING
        with pytest.raises(trio.WouldBlock):
            pool.lease_nowait(1)


async def test_reclaimed_slots_serve_the_line() -> None:
    pool = BufferPool(3)
    slots = await pool.lease(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.lease, 3)
        await wait_all_tasks_blocked()
        for slot in slots:
            assert pool.statistics().tasks_waiting == 1
            pool.quarantine(slot)
            pool.reclaim(slot)
        assert counts(pool)[FILLING] == 3
        nursery.cancel_scope.cancel()


async def test_pins_are_counted() -> None:
    pool = BufferPool(1)
    (slot,) = await pool.lease(1)
    pool.landed(slot)
    pool.pin(slot)
    pool.pin(slot)
    pool.unpin(slot)
    assert pool.state(slot) is PINNED
    with pytest.raises(RuntimeError, match="PINNED"):
        pool.release(slot)
    pool.unpin(slot)
    assert pool.state(slot) is READY
    with pytest.raises(RuntimeError, match="READY"):
        pool.unpin(slot)


@pytest.mark.parametrize("n", [0, -1, 4])
async def test_impossible_leases_are_refused(n: int) -> None:
    pool = BufferPool(3)
    with pytest.raises(ConfigError, match=f"lease {n} slots of a pool of 3"):
        await pool.lease(n)
    with pytest.raises(ConfigError, match=f"lease {n} slots of a pool of 3"):
        pool.lease_nowait(n)


def test_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 slot"):
        BufferPool(0)


@pytest.mark.parametrize("slot", [-1, 2])
def test_unknown_slot(slot: int) -> None:
    pool = BufferPool(2)
    for step in (pool.landed, pool.pin, pool.unpin, pool.release, pool.quarantine, pool.reclaim, pool.state):
        with pytest.raises(RuntimeError, match="not one of the pool's 2 slots"):
            step(slot)
