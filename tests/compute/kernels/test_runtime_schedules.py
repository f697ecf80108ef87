"""The protocol of the compute threads under every order of events: its own code, with threads that a test schedules.

`follow` and what it calls run here as Python functions, each thread as a greenlet that may be interrupted before every
access to shared memory. Who goes on is drawn by hypothesis; a thread that is never drawn is one without a core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import Any

import greenlet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.compute.kernels import runtime as _runtime
from mer.compute.kernels.system_calls import FUTEX, SCHED_YIELD, WRITE
from mer.compute.kernels.words import BARRIER, COUNTER, FUNCTION, ROW_WORDS

runtime: Any = _runtime  # whose functions and primitives are exchanged for Python's
_CONTROL = 0x1000
_ROWS = 0x100000
_FUNCTIONS = (
    "_epoch", "_row", "_state", "_wake", "_get_up", "_sleep", "_wait", "_run_phase", "_following", "_prepare_phase",
    "_work",
)  # fmt: skip
_WAIT, _WAKE = 128, 129


class Deadlock(AssertionError):
    """Every thread sleeps, and the program has not finished."""


class World:
    """Memory, a clock, futexes and threads, all of them simulated.

    Args:
        units: of each phase, how many units its row has.
        n_threads: threads, each of which `choose` may let go on.
        choose: given a number, returns which of so many threads goes on.
    """

    def __init__(self, units: list[int], n_threads: int, choose: Callable[[int], int]) -> None:
        self.memory: dict[int, int] = {}
        self.units, self.n_threads, self._choose = units, n_threads, choose
        self.done: list[list[int]] = [[] for _ in units]  # units of each phase that are finished
        self.finished = 0
        self.now_ns = 0
        self.asleep: dict[int, int] = {}  # {thread: address it sleeps on}
        self.names: dict[str, Any] = {name: getattr(runtime, name).py_func for name in _FUNCTIONS}
        for index in range(len(units)):
            row = _ROWS + 8 * ROW_WORDS * index
            self.memory[row + 8 * FUNCTION] = index
            self.memory[row + 8 * BARRIER] = 1
            self.memory[row + 8 * COUNTER] = 12345  # as an earlier program left it
        self.threads = [greenlet.greenlet(self._follow) for _ in range(n_threads)]
        self._hub = greenlet.getcurrent()

    def _follow(self, thread: int) -> None:
        runtime.follow.py_func(_CONTROL, thread, self.n_threads)

    def pass_on(self) -> None:
        """Let the schedule decide who goes on; the trio thread, which is not scheduled, just does."""
        if greenlet.getcurrent() is not self._hub:
            self._hub.switch()

    def step(self) -> None:
        """Let one thread go on, up to its next access."""
        awake = [i for i, thread in enumerate(self.threads) if i not in self.asleep and not thread.dead]
        if not awake:
            raise Deadlock(f"asleep: {self.asleep}, done: {[len(done) for done in self.done]} of {self.units}")
        thread = awake[self._choose(len(awake))]
        self.threads[thread].switch(thread)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Let threads go on until a condition holds."""
        for _ in range(200_000):
            if condition():
                return
            self.step()
        raise AssertionError("no end in 200,000 steps")

    def idle(self) -> None:
        """Let threads go on for a while, at most until all of them sleep."""
        for _ in range(self._choose(150)):
            if len(self.asleep) < self.n_threads:
                self.step()

    # --- what kernels are made of ---

    def load(self, address: int, index: int = 0) -> int:
        return self.memory.get(address + 8 * index, 0)

    def atomic_load(self, address: int) -> int:
        self.pass_on()
        return self.memory.get(address, 0)

    def store(self, address: int, value: int) -> None:
        self.memory[address] = value

    def atomic_add(self, address: int, value: int) -> int:
        self.pass_on()
        before = self.memory.get(address, 0)
        self.memory[address] = before + value
        return before

    def compare_exchange(self, address: int, expected: int, new: int) -> int:
        self.pass_on()
        if self.memory.get(address, 0) != expected:
            return 0
        self.memory[address] = new
        return 1

    def clock_ns(self, _room: int) -> int:
        self.now_ns += 60_000  # so that threads sleep after a few looks
        return self.now_ns

    def pause(self) -> None:
        pass

    def syscall(self, number: int, a: int, b: int, c: int, *_rest: int) -> int:
        self.pass_on()
        if number == SCHED_YIELD:
            pass
        elif number == WRITE:
            self.finished += 1
        elif number == FUTEX and b == _WAIT:
            if self.memory.get(a, 0) == c:
                thread = next(i for i, it in enumerate(self.threads) if it is greenlet.getcurrent())
                self.asleep[thread] = a
                self.pass_on()
        elif number == FUTEX and b == _WAKE:
            for thread, address in list(self.asleep.items()):
                if address == a:
                    del self.asleep[thread]
        return 0

    def call_step(self, index: int, row: int, _thread: int, _n_threads: int) -> None:
        """Claim units of a phase, and find that all phases before it are done and none behind it has begun."""
        while True:
            unit = self.atomic_add(row + 8 * COUNTER, 1)
            if unit >= self.units[index]:
                return
            assert all(len(done) == n for done, n in zip(self.done[:index], self.units, strict=False))
            self.pass_on()  # the unit takes its time
            assert not any(self.done[index + 1 :])
            self.done[index].append(unit)


def in_world(world: World, patch: pytest.MonkeyPatch) -> None:
    """Let the runtime's code work on a world."""
    for name, function in world.names.items():
        patch.setattr(runtime, name, function)
    for name, primitive in {
        "load_i64": world.load, "store_i64": world.store, "atomic_load": world.atomic_load,
        "atomic_load_i64": world.atomic_load, "atomic_add": world.atomic_add, "clock_ns": world.clock_ns,
        "compare_exchange": world.compare_exchange, "pause": world.pause, "syscall6": world.syscall,
        "call_step": world.call_step,
    }.items():  # fmt: skip
        patch.setattr(runtime, name, primitive)


def run_programs(
    units: list[int],
    teams: list[int],
    n_threads: int,
    choose: Callable[[int], int],
    kind: type[World] = World,
    wrong: Mapping[str, Callable[..., None]] = MappingProxyType({}),
) -> None:
    """Run the same program with one team after another, then stop the threads; `wrong` replaces functions."""
    with pytest.MonkeyPatch.context() as patch:
        world = kind(units, n_threads, choose)
        world.names.update(wrong)
        in_world(world, patch)
        runtime.prepare.py_func(_CONTROL, n_threads)
        for number, team in enumerate(teams):
            world.idle()
            for done in world.done:
                done.clear()
            runtime.start.py_func(_CONTROL, _ROWS, len(units), team)
            world.run_until(lambda number=number: world.finished == number + 1)  # type: ignore[misc]
            assert [sorted(done) for done in world.done] == [list(range(n)) for n in units]
        assert world.finished == len(teams)
        runtime.stop.py_func(_CONTROL)
        world.run_until(lambda: all(thread.dead for thread in world.threads))


@settings(max_examples=150, deadline=None)
@given(
    units=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    n_threads=st.integers(1, 4),
    data=st.data(),
)
def test_any_schedule_runs_every_unit_once_and_ends(units: list[int], n_threads: int, data: st.DataObject) -> None:
    teams = data.draw(st.lists(st.integers(1, n_threads), min_size=1, max_size=3), "teams")
    random = Random(data.draw(st.integers(0, 2**32), "seed of the schedule"))
    # one thread may be far more likely to go on than another: then that one is kept from its core
    weights = data.draw(st.lists(st.sampled_from([1, 1, 30]), min_size=n_threads, max_size=n_threads), "weights")
    run_programs(units, teams, n_threads, lambda n: random.choices(range(n), (weights * n)[:n])[0])


@pytest.mark.parametrize("n_threads", [2, 3])
def test_threads_that_sleep_are_woken_for_the_next_program(n_threads: int) -> None:
    turn = 0

    def in_turns(n: int) -> int:
        nonlocal turn
        turn += 1
        return turn % n

    run_programs([2, 3], [1, n_threads, 1, n_threads], n_threads, in_turns)


def _sleep_unheard(control: int, line: int, _epoch: int, _thread: int) -> None:
    """Sleep without a last look at whether there is something to do."""
    runtime.atomic_add(control + runtime.SLEEPING, 1)
    runtime.compare_exchange(line + runtime.ASLEEP, 0, 1)
    while runtime.atomic_load(line + runtime.ASLEEP) != 0:
        runtime.syscall6(FUTEX, line + runtime.ASLEEP, _WAIT, 1, 0, 0, 0)


def _get_up_untold(control: int, asleep: int) -> None:
    """Note that a thread sleeps no longer, and do not tell it."""
    if runtime.compare_exchange(asleep, 1, 0):
        runtime.atomic_add(control + runtime.SLEEPING, -1)


class Impatient(World):
    """Whoever leaves a phase believes that it is the last inside."""

    def atomic_load(self, address: int) -> int:
        value = super().atomic_load(address)
        if address == _CONTROL + runtime.STATE and value & runtime.MAX_THREADS > 1:
            value = self.memory[address] = value & ~runtime.MAX_THREADS | 1
        return value


@pytest.mark.parametrize(
    ("world", "name", "wrong"),
    [
        (Impatient, "_prepare_phase", None),
        (World, "_sleep", _sleep_unheard),
        (World, "_get_up", _get_up_untold),
        (World, "_prepare_phase", lambda _rows, _index, _length: None),
    ],
    ids=["ends phases early", "sleeps unheard", "wakes nobody", "leaves claims as they were"],
)
def test_a_seeded_bug_is_found(world: type[World], name: str, wrong: Callable[..., None] | None) -> None:
    def found(seed: int) -> bool:
        random = Random(seed)
        try:
            run_programs([2, 3, 1], [2, 1, 2], 2, random.randrange, world, {} if wrong is None else {name: wrong})
        except AssertionError:
            return True
        return False

    assert any(found(seed) for seed in range(200))
