"""Programs on real threads: every step runs on every thread, and nothing passes a barrier early."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mer.compute.cpu import Team
from mer.compute.kernels.ir import atomic_add, load_i32, load_i64, store_i32
from mer.compute.kernels.runtime import run_alone
from mer.compute.kernels.step import ARG0, COUNTER, ENTRY, ROW_WORDS, step
from mer.compute.program import Memory, Program

THREADS = [1, 2, 3, 4]


@step
def count(row: int, _thread: int, _n_threads: int) -> None:
    """Add one to the int32 at an address."""
    atomic_add(load_i64(row, ARG0), 1)


@step
def claim(row: int, _thread: int, _n_threads: int) -> None:
    """Count each of n items once, with the row's work counter. Arguments: int32 counts, n."""
    counts, n = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    while True:
        item = atomic_add(row + 8 * COUNTER, 1)
        if item >= n:
            return
        atomic_add(counts + 4 * item, 1)


@step
def publish(row: int, thread: int, _n_threads: int) -> None:
    """Write this thread's number of the round. Arguments: int32 slots, round."""
    store_i32(load_i64(row, ARG0), thread, np.int32(load_i64(row, ARG0 + 1)))


@step
def compare(row: int, _thread: int, n_threads: int) -> None:
    """Count the threads whose slot is not of this round. Arguments: int32 slots, round, int32 failures."""
    slots, number, failures = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    for other in range(n_threads):
        if load_i32(slots, other) != number:
            atomic_add(failures, 1)


class Threads:
    """A team of threads that runs programs one after another."""

    def __init__(self, n_threads: int) -> None:
        self.team = Team(n_threads)

    def run(self, program: Program) -> None:
        program.rows[: program.length, COUNTER] = 0
        self.team.start(program)
        self.team.block()


@contextmanager
def team(n_threads: int) -> Iterator[Threads]:
    for each in (count, claim, publish, compare):
        each.compile()
    it = Threads(n_threads)
    it.team.open()
    try:
        yield it
    finally:
        it.team.close()


@pytest.mark.parametrize("n_threads", THREADS)
def test_every_step_runs_once_on_every_thread(n_threads: int) -> None:
    memory = Memory(64)
    counter = memory.ints(memory.cut(4), 1)
    program = Program()
    with team(n_threads) as it:
        for length in (1, 2, 63, 64, 65, 300):  # a program grows beyond its first 64 rows
            program.clear()
            for number in range(length):
                program.add(count, int(counter.ctypes.data))
                if number % 3 == 0:
                    program.barrier()
            assert program.length == length
            counter[0] = 0
            it.run(program)
            assert counter[0] == length * n_threads


@pytest.mark.parametrize("n_threads", THREADS)
def test_nobody_passes_a_barrier_before_all_have_reached_it(n_threads: int) -> None:
    memory = Memory(4096)
    slots, failures = memory.cut(4 * 16), memory.cut(4)
    program = Program()
    with team(n_threads) as it:
        for repeat in range(20):
            program.clear()
            for number in range(100):
                program.add(publish, slots, 1000 * repeat + number)
                program.barrier()
                program.add(compare, slots, 1000 * repeat + number, failures)
                program.barrier()
            it.run(program)
    assert memory.ints(failures, 1)[0] == 0


@pytest.mark.parametrize("n_threads", THREADS)
def test_the_end_of_a_program_is_a_barrier(n_threads: int) -> None:
    memory = Memory(4096)
    slots = memory.cut(4 * 16)
    program = Program()
    with team(n_threads) as it:
        for number in range(1, 300):
            program.clear()
            program.add(publish, slots, number)
            it.run(program)
            assert (memory.ints(slots, n_threads) == number).all()


@pytest.mark.parametrize("n_threads", THREADS)
def test_items_are_claimed_exactly_once(n_threads: int) -> None:
    memory = Memory(4 * 5000)
    counts = memory.cut(4 * 5000)
    program = Program()
    with team(n_threads) as it:
        for _ in range(3):
            program.clear()
            program.add(claim, counts, 5000)
            program.add(claim, counts, 5000)
            it.run(program)
    assert (memory.ints(counts, 5000) == 6).all()


@pytest.mark.parametrize("n_threads", THREADS)
def test_threads_end_when_closed(n_threads: int) -> None:
    def alive() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("mer-cpu-")]

    with team(n_threads) as it:
        assert len(alive()) == n_threads
        program = Program()
        memory = Memory(64)
        program.add(count, memory.address)
        it.run(program)
    assert alive() == []
    with team(n_threads):
        pass
    assert alive() == []


def test_closing_waits_for_the_program_that_runs() -> None:
    memory = Memory(4096)
    counts = memory.cut(4096)
    program = Program()
    for _ in range(500):
        program.add(claim, counts, 1000)
        program.barrier()
    with team(2) as it:
        it.team.start(program)
    assert (memory.ints(counts, 1000) == 500).all()


def test_a_program_runs_on_the_calling_thread_alone() -> None:
    memory = Memory(64)
    program = Program()
    for _ in range(3):
        program.add(count, memory.address)
        program.barrier()
    run_alone(program.address, program.length)
    assert memory.ints(memory.address, 1)[0] == 3


def test_a_barrier_belongs_to_the_step_before_it_and_a_cleared_program_has_none() -> None:
    program = Program()
    program.barrier()
    program.add(count, 1)
    assert program.rows[0, 1] == 0
    program.barrier()
    assert program.rows[0, 1] == 1
    program.clear()
    program.add(count, 2)
    assert program.rows[0].tolist()[:4] == [count.address, 0, 0, 2]
    assert program.rows.shape[1] == ROW_WORDS
    with pytest.raises(IndexError):  # what lies behind is the entry's
        program.add(count, *range(ENTRY - ARG0 + 1))


@pytest.mark.parametrize("n_threads", [1, 2])
def test_steps_of_another_program_run_as_if_they_had_been_added(n_threads: int) -> None:
    memory = Memory(4096)
    slots, failures, counts = memory.cut(64), memory.cut(4), memory.cut(4 * 100)
    part, program = Program(), Program()
    for _ in range(40):
        part.add(publish, slots, 7)
        part.barrier()
        part.add(compare, slots, 7, failures)
        part.add(claim, counts, 100)
    with team(n_threads) as it:
        for repeat in range(1, 4):
            program.clear()
            program.add(publish, slots, 1)
            program.barrier()
            for _ in range(2):
                program.extend(part.rows[: part.length])
            it.run(program)
            assert (memory.ints(counts, 100) == 80 * repeat).all()
    assert memory.ints(failures, 1)[0] == 0
