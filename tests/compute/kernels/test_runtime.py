"""Programs on real threads: every unit is done once, no phase begins early, and nobody waits for who does not come."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mer.compute.cpu.program import Memory, Program
from mer.compute.cpu.team import Team
from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.ir import atomic_add, atomic_load, load_i32, load_i64, pause, store_i32, store_i64
from mer.compute.kernels.runtime import MAX_THREADS, run_alone
from mer.compute.kernels.step import step
from mer.compute.kernels.words import BARRIER, ROW_WORDS, Words, columns
from mer.errors import ConfigError
from tests._lib.steps import row_of

THREADS = [1, 2, 3, 4]


class CountWords(Words):
    """counts (int32), n."""

    counts: int
    n: int


COUNT = columns(CountWords)


@step(CountWords)
def count(row: int, _thread: int, _n_threads: int) -> None:
    """Count each of n items once."""
    counts, n = load_i64(row, COUNT.counts), load_i64(row, COUNT.n)
    while True:
        item = claim_unit(row)
        if item >= n:
            return
        atomic_add(counts + 4 * item, 1)


class PublishWords(Words):
    """slots (int32), n, round."""

    slots: int
    n: int
    round: int


PUBLISH = columns(PublishWords)


@step(PublishWords)
def publish(row: int, _thread: int, _n_threads: int) -> None:
    """Write the number of the round to n slots."""
    slots, n, number = load_i64(row, PUBLISH.slots), load_i64(row, PUBLISH.n), load_i64(row, PUBLISH.round)
    while True:
        item = claim_unit(row)
        if item >= n:
            return
        store_i32(slots, item, np.int32(number))


class CompareWords(Words):
    """slots (int32), n, round, failures (int32)."""

    slots: int
    n: int
    round: int
    failures: int


COMPARE = columns(CompareWords)


@step(CompareWords)
def compare(row: int, _thread: int, _n_threads: int) -> None:
    """Let n units look at n slots for the number of the round."""
    slots, n = load_i64(row, COMPARE.slots), load_i64(row, COMPARE.n)
    number, failures = load_i64(row, COMPARE.round), load_i64(row, COMPARE.failures)
    while True:
        if claim_unit(row) >= n:
            return
        for slot in range(n):
            if load_i32(slots, slot) != number:
                atomic_add(failures, 1)


class HoldFirstWords(Words):
    """done (int32, how many are), n."""

    done: int
    n: int


HOLD_FIRST = columns(HoldFirstWords)


@step(HoldFirstWords)
def hold_first(row: int, _thread: int, _n_threads: int) -> None:
    """Count n units done; the first is held until all others are."""
    done, n = load_i64(row, HOLD_FIRST.done), load_i64(row, HOLD_FIRST.n)
    while True:
        item = claim_unit(row)
        if item >= n:
            return
        if item == 0:
            while atomic_load(done) < n - 1:
                pause()
        atomic_add(done, 1)


class SignWords(Words):
    """signatures (int32 for each thread), n."""

    signatures: int
    n: int


SIGN = columns(SignWords)


@step(SignWords)
def sign(row: int, thread: int, _n_threads: int) -> None:
    """Let whoever takes one of n units write that it was there."""
    signatures, n = load_i64(row, SIGN.signatures), load_i64(row, SIGN.n)
    while claim_unit(row) < n:
        store_i32(signatures, thread, np.int32(1))


class CountdownWords(Words):
    """left, again (int64)."""

    left: int
    again: int


COUNTDOWN = columns(CountdownWords)


@step(CountdownWords)
def countdown(row: int, _thread: int, _n_threads: int) -> None:
    """Take one from an int64 and write -1 to another as long as it is not zero, else 0."""
    if claim_unit(row) == 0:
        left = load_i64(load_i64(row, COUNTDOWN.left), 0) - 1
        store_i64(load_i64(row, COUNTDOWN.left), left)
        store_i64(load_i64(row, COUNTDOWN.again), -2 if left > 0 else 0)


STEPS = (count, publish, compare, hold_first, sign, countdown)


@contextmanager
def team(n_threads: int) -> Iterator[Team]:
    for each in STEPS:
        each.compile()
    it = Team(n_threads)
    it.open()
    try:
        yield it
    finally:
        it.close()


def run(it: Team, program: Program, n_threads: int | None = None) -> None:
    it.start(program, n_threads)
    it.block()


@pytest.mark.parametrize("n_threads", THREADS)
def test_every_unit_of_every_row_is_done_once(n_threads: int) -> None:
    memory = Memory(4 * 100)
    counts = memory.ints(memory.address, 100)
    program = Program()
    with team(n_threads) as it:
        for length in (1, 2, 63, 64, 65, 300):  # a program grows beyond its first 64 rows
            program.clear()
            for number in range(length):
                program.add(row_of(count, memory.address, 1 + number % 100))
                if number % 3 == 0:
                    program.barrier()
            assert program.length == length
            for _ in range(2):  # what was claimed before is there to claim again
                counts[:] = 0
                run(it, program)
                want = np.bincount(np.concatenate([np.arange(1 + number % 100) for number in range(length)]))
                assert np.array_equal(counts[: len(want)], want)
                assert not counts[len(want) :].any()


@pytest.mark.parametrize("n_threads", THREADS)
def test_no_phase_begins_before_the_one_before_is_done(n_threads: int) -> None:
    memory = Memory(4096)
    slots, failures = memory.cut(4 * 16), memory.cut(4)
    program = Program()
    with team(n_threads) as it:
        for repeat in range(20):
            program.clear()
            for number in range(100):
                program.add(row_of(publish, slots, 16, 1000 * repeat + number))
                program.barrier()
                program.add(row_of(compare, slots, 16, 1000 * repeat + number, failures))
                program.barrier()
            run(it, program)
    assert memory.ints(failures, 1)[0] == 0


@pytest.mark.parametrize("n_threads", THREADS)
def test_a_program_has_finished_when_all_of_it_is_done(n_threads: int) -> None:
    memory = Memory(4096)
    slots = memory.cut(4 * 16)
    program = Program()
    with team(n_threads) as it:
        for number in range(1, 300):
            program.clear()
            program.add(row_of(publish, slots, 16, number))
            run(it, program)
            assert (memory.ints(slots, 16) == number).all()


@pytest.mark.parametrize("n_threads", [2, 3])
def test_a_thread_that_is_held_up_holds_up_only_the_unit_it_has(n_threads: int) -> None:
    memory = Memory(64)
    program = Program()
    program.add(row_of(hold_first, memory.address, 1000))
    program.barrier()
    program.add(row_of(count, memory.address + 4, 1))
    with team(n_threads) as it:
        run(it, program)
    assert memory.ints(memory.address, 2).tolist() == [1000, 1]


def test_nobody_waits_for_a_thread_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Team._follow

    def follow_but_one(it: Team, control: int, number: int) -> None:
        if number != 1:
            follow(it, control, number)

    monkeypatch.setattr(Team, "_follow", follow_but_one)
    memory = Memory(4 * 10)
    program = Program()
    for _ in range(100):
        program.add(row_of(count, memory.address, 10))
        program.barrier()
    with team(3) as it:
        run(it, program)
    assert (memory.ints(memory.address, 10) == 100).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_only_as_many_threads_as_a_program_is_given_take_part(n_threads: int) -> None:
    memory = Memory(4096)
    done, signatures = memory.cut(4), memory.cut(4 * 4)
    program = Program()
    with team(4) as it:
        for size in (n_threads, 4, n_threads):  # those who were left out come back, and go again
            program.clear()
            memory.bytes[:] = 0
            for _ in range(200):
                program.add(row_of(sign, signatures, 40))
                program.barrier()
            if size > 1:
                program.add(row_of(hold_first, done, 2))  # takes two threads
            run(it, program, size)
            assert not memory.ints(signatures, 4)[size:].any()
            assert memory.ints(signatures, 4)[:size].any()


@pytest.mark.parametrize("n_threads", THREADS)
def test_a_barriers_word_leaves_rows_out_or_runs_them_again(n_threads: int) -> None:
    memory = Memory(4096)
    left, again, far, counts = memory.cut(8), memory.cut(8), memory.cut(8), memory.cut(4 * 8)
    program = Program()
    program.add(row_of(count, counts, 1))
    program.barrier()
    program.add(row_of(count, counts + 4, 5))
    program.add(row_of(countdown, left, again))
    program.barrier(again)
    program.add(row_of(count, counts + 4 * 6, 1))
    program.barrier(far)
    program.add(row_of(count, counts + 4 * 7, 1))
    with team(n_threads) as it:
        for rounds, skip, last in ((1, 0, 1), (7, 1, 0), (3, 1 << 40, 0)):
            memory.bytes[:] = 0
            memory.view(left, 8).view(np.int64)[0] = rounds
            memory.view(far, 8).view(np.int64)[0] = skip
            run(it, program)
            assert memory.ints(counts, 8).tolist() == [1, *[rounds] * 5, 1, last]


@pytest.mark.parametrize("n_threads", THREADS)
def test_threads_end_when_closed(n_threads: int) -> None:
    def alive() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("mer-cpu-")]

    with team(n_threads) as it:
        assert len(alive()) == n_threads
        program = Program()
        memory = Memory(64)
        program.add(row_of(count, memory.address, 1))
        run(it, program)
    assert alive() == []
    with team(n_threads):
        pass
    assert alive() == []


def test_closing_waits_for_the_program_that_runs() -> None:
    memory = Memory(4096)
    counts = memory.cut(4096)
    program = Program()
    for _ in range(500):
        program.add(row_of(count, counts, 1000))
        program.barrier()
    with team(2) as it:
        it.start(program)
    assert (memory.ints(counts, 1000) == 500).all()


def test_more_threads_than_the_state_can_count_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"4096 compute threads; at most {MAX_THREADS}"):
        Team(MAX_THREADS + 1)


def test_a_program_runs_on_the_calling_thread_alone() -> None:
    memory = Memory(64)
    left, again = memory.cut(8), memory.cut(8)
    memory.view(left, 8).view(np.int64)[0] = 3
    counts = memory.cut(8)
    program = Program()
    program.add(row_of(count, counts, 1))
    program.add(row_of(countdown, left, again))
    program.barrier(again)
    program.add(row_of(count, counts + 4, 1))
    run_alone(program.address, program.length)
    assert memory.ints(counts, 2).tolist() == [3, 1]


def test_a_barrier_belongs_to_the_step_before_it_and_a_cleared_program_has_none() -> None:
    program = Program()
    program.barrier()
    program.add(row_of(count, 1, 7))
    assert program.rows[0, BARRIER] == 0
    program.barrier()
    assert program.rows[0, BARRIER] == 1
    program.clear()
    program.add(row_of(count, 2, 7))
    assert program.rows[0].tolist()[:4] == [count.address, 0, 0, 2]
    assert program.rows.shape[1] == ROW_WORDS


@pytest.mark.parametrize("n_threads", [1, 2])
def test_steps_of_another_program_run_as_if_they_had_been_added(n_threads: int) -> None:
    memory = Memory(4096)
    slots, failures, counts = memory.cut(64), memory.cut(4), memory.cut(4 * 100)
    part, program = Program(), Program()
    for _ in range(40):
        part.add(row_of(publish, slots, 16, 7))
        part.barrier()
        part.add(row_of(compare, slots, 16, 7, failures))
        part.add(row_of(count, counts, 100))
        part.barrier()
    with team(n_threads) as it:
        for repeat in range(1, 4):
            program.clear()
            program.add(row_of(publish, slots, 16, 1))
            program.barrier()
            for _ in range(2):
                program.extend(part.rows[: part.length])
            run(it, program)
            assert (memory.ints(counts, 100) == 80 * repeat).all()
    assert memory.ints(failures, 1)[0] == 0
