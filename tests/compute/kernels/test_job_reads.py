"""Reads from within a job: which slot they get, and what a wait makes of what comes, on a ring that the test plays."""

from __future__ import annotations

import ctypes
import errno
import time
from collections.abc import Sequence
from typing import Any, cast

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from numba import types

from mer.compute.cpu.program import Program
from mer.compute.kernels import job_reads
from mer.compute.kernels.dispatch import dispatch
from mer.compute.kernels.entry import EXPERT_BIT, TABLE, TableWords
from mer.compute.kernels.job_reads import AWAIT, END, await_reads, next_turn
from mer.compute.kernels.step import Step, nogil_function
from mer.compute.kernels.step import step as kernel_step
from mer.compute.kernels.words import COUNTER, ROW_WORDS
from mer.io.arena import Arena
from mer.io.extents import PROJECTIONS, ExpertExtents, ExpertMap, ExpertPart
from mer.io.ggml import GGMLType
from mer.io.loan.loan import Loan
from mer.io.loan.ranks import Ranks
from mer.io.loan.words import (
    BEGUN_NS,
    GIVE_UP_NS,
    IN_FLIGHT,
    MAX_LOGGED,
    N_LOGGED,
    N_PARTS,
    NEXT,
    PENDING,
    RESULT,
    SERIAL,
    TOKEN_BIT,
    VICTIM,
)
from mer.io.ring import RingAddresses
from mer.sched.policies.lfru import LFRU
from mer.testing.simreads import SimReads

N_LAYERS, N_EXPERTS = 5, 7

keep = nogil_function(types.void(*[types.int64] * 3))(job_reads.keep.py_func)
log_read = nogil_function(types.int64(*[types.int64] * 4))(job_reads.log_read.py_func)
submit = nogil_function(types.void(types.int64))(job_reads.submit.py_func)


@kernel_step(TableWords)
def idle(_row: int, _thread: int, _n_threads: int) -> None:
    """Do nothing with a table."""


def experts(kinds: npt.NDArray[np.int64], n_matrices: int = 3) -> ExpertMap:
    """Return experts of which those of kind 0 are larger than those of kind 1, with gates at odd offsets."""
    layers, offset = [], 0
    for layer in range(N_LAYERS):
        row = []
        for expert in range(N_EXPERTS):
            parts = []
            for projection in PROJECTIONS[-n_matrices:]:
                n_bytes = 16 * (4000 if kinds[layer, expert] == 0 else 40)
                parts.append(ExpertPart(projection, GGMLType.Q8_0, 16, 1, 0, offset + 300, n_bytes))
                offset += 131072
            row.append(ExpertExtents(layer, expert, tuple(parts)))
        layers.append(tuple(row))
    return ExpertMap(tuple(layers))


class PlayedRing:
    """A ring in plain memory, whose kernel takes nothing: its descriptor is not one."""

    depth = 8

    def __init__(self) -> None:
        self.words = np.zeros(4, np.int32)  # submission tail, completion head and tail
        self.sqes = np.zeros((16, 64), np.uint8)
        self.cqes = np.zeros((16, 16), np.uint8)
        self.adopted: list[tuple[int, int | None]] = []

    def lend(self) -> bool:
        return True

    def ring_addresses(self) -> RingAddresses:
        word = int(self.words.ctypes.data)
        return RingAddresses(
            fileno=-1,
            sq_tail=word,
            sq_mask=15,
            sqes=int(self.sqes.ctypes.data),
            cq_head=word + 4,
            cq_tail=word + 8,
            cq_mask=15,
            cqes=int(self.cqes.ctypes.data),
        )

    def filenos(self) -> tuple[int, ...]:
        return (33,)

    def take_back(self) -> None:
        pass

    def complete(self, token: int, result: int) -> None:
        tail = int(self.words[2])
        self.cqes[tail & 15, :8].view(np.int64)[0] = token
        self.cqes[tail & 15, 8:12].view(np.int32)[0] = result
        self.words[2:3] += np.int32(1)  # may wrap around


@attrs.frozen
class Rig:
    ring: PlayedRing
    arena: Arena
    reads: Loan

    def make_resident(self, layer: int, expert: int, slot: int) -> None:
        self.reads.addresses[layer, expert] = self.arena.address(slot) + 300 + np.array([0, 4096, 9000])

    def lend(self, kept: Sequence[tuple[int, int]]) -> None:
        """Lend all slots but those kept; none is free."""
        assert self.reads.lend([False] * len(self.reads.free), kept)

    def lend_slots(self, slot: int, n: int) -> None:
        """Lend the slots from one on: those of the first n experts of layer 4, who leave in this order."""
        for number in range(n):
            self.make_resident(4, number, slot + number)
        self.lend([])


class Wait:
    """The rows of a wait for some experts of layer 3, and of the two steps that work on them."""

    def __init__(self, it: Rig, n: int) -> None:
        self.words = np.zeros(3, np.int64)  # end, stop, again
        self.program, address = Program(), int(self.words.ctypes.data)
        control = it.reads.address
        self.program.add(await_reads.row(control=control, end=address, stop=address + 8, layer=3, table=1000, steps=2))
        self.program.add(next_turn.row(again=address + 16))
        for _ in range(3):
            self.program.add(idle.row(table=7, n_entries=7))
        self.program.rows[0, AWAIT.first : AWAIT.n_handed + 1] = int(it.reads.control[N_LOGGED]) - n, n, 0

    def run(self) -> tuple[int, int, int, list[tuple[int, int]]]:
        """Run the steps; return `end`, `stop`, `again`, and the table and its entries in the rows behind."""
        self.program.rows[:2, COUNTER] = 0
        steps: tuple[Step, ...] = await_reads, next_turn
        for row, step in enumerate(steps):
            function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(step.address)
            for thread in (1, 0):  # only who comes first does anything
                function(self.program.address + 8 * ROW_WORDS * row, thread, 2)
        tables = self.program.rows[2:5, [TABLE.table, TABLE.n_entries]].tolist()
        end, stop, again = self.words.tolist()
        return end, stop, again, [(table, n) for table, n in tables]


def rig(ranks: Ranks | None = None, kinds: npt.NDArray[np.int64] | None = None, n_matrices: int = 3) -> Rig:
    """Return a rig with 40 slots of each of two classes; all experts are of the first one unless `kinds` says else."""
    kinds = np.zeros((N_LAYERS, N_EXPERTS), np.int64) if kinds is None else kinds
    where = experts(kinds, n_matrices)
    classes = where.slot_classes(4096)
    arena = Arena([40, 40], [262144, 16384])
    if ranks is None:
        ranks = Ranks(np.ones((N_LAYERS, N_EXPERTS)), np.ones(N_LAYERS), np.ones(N_LAYERS))
    ring = PlayedRing()
    reads = Loan(where, classes, arena, cast(Any, ring), np.zeros((N_LAYERS, N_EXPERTS, 3), np.int64), ranks)
    return Rig(ring, arena, reads)


@pytest.mark.parametrize("seed", range(12))
def test_the_resident_leaves_that_the_policy_would_choose(seed: int) -> None:
    """One after the other, in any layer, and never one that must stay or is of another class."""
    rng = np.random.default_rng(seed + 100)
    kinds = rng.integers(0, 2, (N_LAYERS, N_EXPERTS))
    kinds[0, :2] = 0, 1
    policy = LFRU(N_LAYERS, N_EXPERTS, kinds=kinds)
    it = rig(policy.ranks, kinds)
    reads = it.reads
    resident = {(layer, int(expert)) for layer in range(N_LAYERS) for expert in rng.permutation(N_EXPERTS)[:5]}
    for place, (layer, expert) in enumerate(sorted(resident)):
        it.make_resident(layer, expert, place % 40 + 40 * int(kinds[layer, expert]))
        policy.insert((layer, expert))
    for visit in range(30):
        policy.use(visit % N_LAYERS, rng.permutation(N_EXPERTS)[:3].tolist())
    layer = 29 % N_LAYERS  # the one used last
    stays = set(sorted(resident)[::6])
    it.lend(sorted(stays)[::2])
    for other, expert in sorted(stays)[1::2]:
        keep(reads.address, other, expert)
    missing = [expert for expert in range(N_EXPERTS) if (layer, expert) not in resident]
    for expert in missing:
        kind = int(kinds[layer, expert])
        want = policy.victim(layer, lambda key: key not in stays, kind=kind)
        if want is None:
            assert log_read(reads.address, layer, expert, 1) == 0
            continue
        before = reads.addresses[want].copy()
        base = int(before[0]) - 300
        assert log_read(reads.address, layer, expert, 1) == base
        assert divmod(int(reads.log[int(reads.control[N_LOGGED]) - 1, VICTIM]), N_EXPERTS) == want
        logged = reads.log[int(reads.control[N_LOGGED]) - 1].tolist()
        reads.control[N_LOGGED] -= 1
        reads.addresses[want] = before
        assert SimReads(reads, cast(Any, None), it.arena)._log(layer, expert, 1) == base
        assert reads.log[int(reads.control[N_LOGGED]) - 1, :5].tolist() == logged[:5]
        assert (reads.addresses[want] == 0).all()
        policy.remove(want)
    assert reads.control[N_LOGGED] > 0


def test_the_log_says_what_has_left_for_what() -> None:
    it = rig()
    it.lend_slots(9, 2)
    assert [log_read(it.reads.address, 1, expert, 10 * expert) for expert in range(3)] == [
        it.arena.address(9),
        it.arena.address(10),
        0,
    ]
    given = it.reads.take_back()
    assert [(read.expert, read.slot, read.victim, read.begun_s) for read in given] == [
        (0, 9, (4, 0), 0.0),
        (1, 10, (4, 1), 1e-8),
    ]
    assert not any(read.landed or read.arranged for read in given)
    assert {token for read in given for token in read.tokens} == {None}
    for read in given:
        part = it.reads.experts[1, read.expert, 1:].reshape(3, 6)
        assert list(read.addresses) == [it.arena.address(read.slot) + int(words[4] + words[5]) for words in part]


def test_as_long_as_a_class_has_free_slots_nobody_leaves_for_its_experts() -> None:
    kinds = np.zeros((N_LAYERS, N_EXPERTS), np.int64)
    kinds[:, 1::2] = 1
    it = rig(kinds=kinds)
    for expert in range(4):
        it.make_resident(4, expert, expert + 40 * (expert % 2))
    assert it.reads.lend([True, False], [])
    assert log_read(it.reads.address, 0, 0, 0) == 0
    assert log_read(it.reads.address, 0, 1, 0) == it.arena.address(41)


def test_experts_that_are_fresh_stay() -> None:
    it = rig()
    it.reads.addresses[:] = -1
    it.lend([])
    assert log_read(it.reads.address, 0, 0, 0) == 0
    assert (it.reads.addresses == -1).all()


def test_a_job_reads_no_more_than_can_be_logged() -> None:
    it = rig()
    it.lend_slots(0, 1)
    it.reads.control[N_LOGGED] = MAX_LOGGED
    assert log_read(it.reads.address, 0, 0, 0) == 0


def test_what_the_kernel_does_not_take_is_left_to_the_reader() -> None:
    """The ring's tail is as before, and a wait gives up."""
    it = rig()
    it.ring.words[0] = 41
    it.lend_slots(0, 2)
    for expert in (5, 6):
        assert log_read(it.reads.address, 3, expert, 0)
    submit(it.reads.address)
    assert it.ring.words[0] == 41
    assert (it.reads.control[NEXT], it.reads.control[IN_FLIGHT]) == (0, 0)
    assert it.ring.sqes[41 & 15, :2].tolist() == [22, 0]
    part, sqe = it.reads.experts[3, 5, 1:].reshape(3, 6)[1], it.ring.sqes[42 & 15]
    assert sqe[4:8].view(np.int32).tolist() == [33]
    assert sqe[8:24].view(np.int64).tolist() == [part[1], it.arena.address(0) + part[4]]
    assert sqe[24:32].view(np.int32).tolist() == [part[2], 0]
    assert sqe[32:40].view(np.int64)[0] == TOKEN_BIT + 4 * it.reads.control[SERIAL] + 1
    it.reads.log[0, BEGUN_NS] = time.monotonic_ns()
    it.reads.control[GIVE_UP_NS] = 5_000_000
    assert Wait(it, 2).run()[:2] == (END, 4)
    assert it.reads.waited_s > 0


def complete(it: Rig, read: int, result: int) -> None:
    number, part = divmod(read, int(it.reads.control[N_PARTS]))
    it.ring.complete(TOKEN_BIT + 4 * (int(it.reads.control[SERIAL]) + number) + part, result)
    it.reads.control[IN_FLIGHT] += 1


@pytest.mark.parametrize("first_index", [0, 2**31 - 2, -3])
@pytest.mark.parametrize("wrong", [None, 300 + 63999, 0, -errno.EIO], ids=["whole", "short", "end", "error"])
def test_a_wait_ends_with_what_is_there_or_the_first_read_that_is_not_whole(
    wrong: int | None, first_index: int
) -> None:
    it = rig()
    it.ring.words[1:3] = first_index
    it.lend_slots(0, 2)
    serial = int(it.reads.control[SERIAL])
    for expert in (5, 6):
        assert log_read(it.reads.address, 3, expert, 1000)
    it.reads.control[NEXT] = 6
    needed = int(it.reads.experts[3, 5, 4])
    results = dict.fromkeys(range(6), needed) | {2: needed + 900, 5: needed if wrong is None else wrong}
    for read in (3, 5, 0, 1, 4, 2):
        complete(it, read, results[read])
    wait = Wait(it, 2)
    if wrong is None:
        assert wait.run() == (0, 0, 0, [(1000, 2), (1000, 2), (7, 7)])
    else:
        assert wait.run()[:2] == (END, 4)
    assert it.ring.words[1] == it.ring.words[2]
    assert it.reads.control[IN_FLIGHT] == 0
    whole, other = it.reads.take_back()
    assert whole.landed
    assert whole.arranged == other.arranged == (wrong is None)
    assert whole.results == (needed, needed, needed + 900)
    assert whole.ended_s > whole.begun_s == 1e-6
    assert other.landed == (wrong is None)
    assert other.results == (needed, needed, results[5])
    assert other.tokens == tuple(TOKEN_BIT + 4 * (serial + 1) + part for part in range(3))


def test_experts_have_their_turn_as_they_land_and_in_order() -> None:
    """The second of four lands last: first the first, then nothing until the second, then all; at last one fails."""
    it = rig()
    it.lend_slots(0, 6)
    assert log_read(it.reads.address, 2, 0, 1)  # of the layer before
    for expert in range(5):
        assert log_read(it.reads.address, 3, expert, 1)
    it.reads.control[NEXT] = 18
    needed, entry = int(it.reads.experts[3, 0, 4]), 64
    wait = Wait(it, 5)
    for read in (3, 4, 5, 9, 10, 11):
        complete(it, read, needed)
    assert wait.run() == (0, 0, -4, [(1000, 1), (1000, 1), (7, 7)])
    for read in (6, 7, 8, 12, 13, 14):
        complete(it, read, needed)
    assert wait.run() == (0, 0, -4, [(1000 + entry, 3), (1000 + entry, 3), (7, 7)])
    complete(it, 15, needed)
    complete(it, 16, needed - 1)
    assert wait.run()[:2] == (END, 4)
    assert [read.arranged for read in it.reads.take_back()] == [False, True, True, True, True, False]


def test_an_expert_of_two_matrices_has_its_turn_after_two_reads() -> None:
    it = rig(n_matrices=2)
    it.lend_slots(0, 3)
    serial = int(it.reads.control[SERIAL])
    for expert in (5, 6, 2):
        assert log_read(it.reads.address, 3, expert, 1)
    submit(it.reads.address)  # the kernel takes none; but all are prepared
    assert [int(sqe[32:40].view(np.int64)[0]) for sqe in it.ring.sqes[:6]] == [
        TOKEN_BIT + 4 * (serial + number) + part for number in range(3) for part in range(2)
    ]
    it.reads.control[NEXT] = 6
    needed, wait = int(it.reads.experts[3, 5, 4]), Wait(it, 3)
    for read in (0, 1, 2):
        complete(it, read, needed)
    assert wait.run() == (0, 0, -4, [(1000, 1), (1000, 1), (7, 7)])
    for read in (3, 4, 5):
        complete(it, read, needed)
    assert wait.run() == (0, 0, 0, [(1000 + 64, 2), (1000 + 64, 2), (7, 7)])
    for number, taken in enumerate(it.reads.take_back()):
        assert taken.landed
        assert taken.results == (needed, needed)
        assert taken.lengths == tuple(it.reads.experts[3, taken.expert, 1:].reshape(3, 6)[:2, 2].tolist())
        assert taken.tokens == tuple(TOKEN_BIT + 4 * (serial + number) + part for part in range(2))
        assert len(taken.addresses) == 2


@pytest.mark.parametrize("obstacle", ["raw", "stop", "no loan", None])
def test_dispatch_reads_what_is_missing_unless_something_stands_against_it(obstacle: str | None) -> None:
    """One token on experts 1, 2 and 6 of layer 1, of which 2 is missing, or there and raw."""
    it = rig()
    it.lend_slots(20, 2)
    for expert in (1, 2, 6):
        it.make_resident(1, expert, expert)
    it.reads.addresses[1, 2] = -1 if obstacle == "raw" else 0
    if obstacle == "stop":
        it.reads.stop()
    ids, areas = np.array([6, 1, 2], np.int32), np.zeros((6, 64), np.int64)
    ends, table, missing, places, order, log = (int(area.ctypes.data) for area in areas)
    words, program, steps = np.zeros(3, np.int64), Program(), 2
    stop = int(words.ctypes.data)
    program.add(
        dispatch.row(
            ids=int(ids.ctypes.data),
            n_pairs=3,
            k=3,
            n_experts=N_EXPERTS,
            addresses=int(it.reads.addresses[1].ctypes.data),
            ends=ends,
            table=table,
            missing=missing,
            steps=steps,
            places=places,
            order=order,
            log=log,
            stop=stop,
            layer=1,
            end=stop + 8,
            skip=stop + 16,
            reads=0 if obstacle == "no loan" else it.reads.address,
        )
    )
    for _ in range(8):
        program.add(idle.row(table=7, n_entries=7))
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(dispatch.address)
    for thread in (1, 0):
        function(program.address, thread, 2)
    assert areas[5].view(np.int32)[:3].tolist() == [6, 1, 2], "the ids are copied"
    if obstacle is not None:
        assert words.tolist()[:2] == [2, END]
        assert it.reads.control[N_LOGGED] == 0
        return
    assert words.tolist() == [0, 0, 0]
    assert it.reads.control[N_LOGGED] == 1
    entries = areas[1].reshape(8, 8)[:2].tolist()
    addresses = it.reads.addresses[1]
    numbers = [1 << EXPERT_BIT, 6 << EXPERT_BIT]
    assert entries == [
        [*addresses[1].tolist(), 1, 0, 0, numbers[0], 0],
        [*addresses[6].tolist(), 1, 2, 2, numbers[1], 0],
    ]
    read = it.reads.take_back()[0]
    assert (read.layer, read.expert, read.victim, read.slot) == (1, 2, (4, 0), 20)
    assert areas[2].reshape(8, 8)[0].tolist() == [*read.addresses, 1, 1, 1, 3 | 2 << EXPERT_BIT, 0]
    assert program.rows[2:4, [TABLE.table, TABLE.n_entries]].tolist() == [[table, 2]] * 2
    assert program.rows[4, AWAIT.first : AWAIT.n_handed + 1].tolist() == [0, 1, 0]
    assert it.reads.used[1].tolist() == [0, *[it.reads.control[SERIAL]] * 2, 0, 0, 0, it.reads.control[SERIAL]]


def test_serials_are_never_used_twice_and_keep_nothing_from_leaving_for_the_next_job() -> None:
    it = rig()
    serials = []
    for turn in range(3):
        it.make_resident(0, 1, 7)
        it.make_resident(0, 2, 8)
        it.lend([(0, 1)] if turn == 0 else [])
        serials.append(int(it.reads.control[SERIAL]))
        assert log_read(it.reads.address, 4, 0, 0) == it.arena.address(8 if turn == 0 else 7)
        assert log_read(it.reads.address, 4, 1, 0) == (0 if turn == 0 else it.arena.address(8))
        assert all(result == PENDING for result in it.reads.log[0, RESULT:].tolist())
        it.reads.take_back()
    assert np.diff(serials).min() >= 2
