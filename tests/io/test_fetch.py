"""Fetches of experts on a simulated disk, and on a real one: right bytes, no slot lost or used twice."""

from __future__ import annotations

import random
from pathlib import Path

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.errors import ConfigError, EngineClosed, FileSuspended, ReadError
from mer.io.arena import Arena
from mer.io.extents import aligned_hull
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.pool import BufferPool, Priority
from mer.io.thread_reader import ThreadReader
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simdisk import DiskProfile, content, open_sim_disk
from tests._lib.landing import gate_up_landed, landed
from tests.io.rig import (
    EXPERTS,
    FILLING,
    FREE,
    LAYERS,
    QUARANTINED,
    READY,
    hull_bytes,
    lease,
    make_experts,
    make_rig,
    one_size,
    open_rig,
    wait_for_slot,
)

# --- what arrives ---


@pytest.mark.parametrize("seed", range(4))
async def test_all_experts_arrive_where_the_addresses_say(autojump_clock: MockClock, seed: int) -> None:
    async with open_rig(LAYERS * EXPERTS, seed=seed, profile=DiskProfile(jitter=20), chunk_bytes=8192) as (rig, disk):
        fetches = [rig.start(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        for fetch in fetches:
            await landed(fetch)
            assert rig.pool.state(fetch.slot) is READY
            assert fetch.done
            assert fetch.inner_landed
            assert fetch.error is None
        for fetch in fetches:
            rig.check_bytes(fetch)
        assert set(rig.done) == set(fetches)
        assert len(rig.done) == len(fetches)
        statistics = rig.fetcher.statistics()
        expected = sum(hull_bytes(extents) for row in rig.experts.experts for extents in row)
        assert statistics.bytes_read == disk.statistics().bytes_read == expected
        rig.check_conservation()


async def test_all_experts_arrive_from_a_real_disk(tmp_path: Path) -> None:
    experts, sizes = make_experts()
    paths = [tmp_path / "0", tmp_path / "1"]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        content(0, number, 0, size).tofile(path)
    with ThreadReader(paths, chunk_bytes=8192) as reader:
        rig = make_rig(reader, experts, LAYERS * EXPERTS)
        fetches = [rig.start(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        for fetch in fetches:
            await gate_up_landed(fetch)
            rig.check_bytes(fetch, (0, 1))
            await landed(fetch)
            rig.check_bytes(fetch)
        assert rig.fetcher.statistics().bytes_read == reader.statistics().bytes_read
        rig.check_conservation()


async def test_misses_start_all_their_reads_at_once_gate_and_up_first(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, disk):
        wanted = [(0, 3), (0, 1), (1, 5), (0, 0)]
        for key in wanted:
            rig.start(*key)
        hulls = [
            (part.file, *aligned_hull(part.offset, part.n_bytes, 4096)[:2])
            for layer, expert in wanted
            for part in rig.experts.experts[layer][expert].parts
        ]
        assert disk.log == hulls
        assert rig.fetcher.statistics().reads_in_flight == 12


async def test_gate_and_up_can_be_used_before_down_has_landed(autojump_clock: MockClock) -> None:
    async with open_rig(profile=DiskProfile(jitter=0, bytes_per_s=1e6)) as (rig, _):
        fetch = rig.start(1, 2)
        await gate_up_landed(fetch)
        assert fetch.inner_landed
        assert not fetch.done
        assert rig.inner == [fetch]
        assert rig.pool.state(fetch.slot) is FILLING
        rig.check_bytes(fetch, (0, 1))
        await landed(fetch)
        rig.check_bytes(fetch)
        assert (rig.inner, rig.done) == ([fetch], [fetch])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
async def test_inner_is_told_after_the_first_of_two_matrices(autojump_clock: MockClock, order: tuple[int, int]) -> None:
    async with open_rig(n_threads=2, experts=make_experts(3, n_matrices=2)) as (rig, disk):
        for index in order:
            part = rig.part(0, 0, index)
            disk.hang(part.file, part.offset, part.offset + part.n_bytes)
        fetch = rig.start(0, 0)
        hanging = list(disk._hanging)
        told = []
        for index in order:
            disk._hanging[:] = [hanging[index]]
            disk.let_return()
            await trio.sleep(1e-3)
            told.append((rig.inner == [fetch], fetch.inner_landed, fetch.done))
        first = order == (0, 1)
        assert told == [(first, first, False), (first, True, True)]
        rig.check_bytes(fetch)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1), (2, 1, 0), (1, 2, 0)], ids=str)
async def test_inner_is_told_once_gate_and_up_are_there_and_down_is_not(
    autojump_clock: MockClock, order: tuple[int, int, int]
) -> None:
    async with open_rig(n_threads=3) as (rig, disk):
        for index in range(3):
            part = rig.part(0, 0, index)
            disk.hang(part.file, part.offset, part.offset + part.n_bytes)
        fetch = rig.start(0, 0)
        hanging = list(disk._hanging)
        woken = False

        async def wait() -> None:
            nonlocal woken
            await gate_up_landed(fetch)
            woken = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            landed: set[int] = set()
            for index in order:
                disk._hanging[:] = [hanging[index]]
                disk.let_return()
                await trio.sleep(1e-3)
                landed.add(index)
                assert woken is fetch.inner_landed is (landed >= {0, 1})
        assert rig.inner == ([fetch] if order[2] == 2 else [])
        assert rig.done == [fetch]
        rig.check_bytes(fetch)


# --- single flight ---


async def test_an_expert_on_its_way_cannot_be_started_again(autojump_clock: MockClock) -> None:
    async with open_rig(2) as (rig, disk):
        first = rig.start(0, 4)
        assert rig.fetcher.in_flight(0, 4) is first
        spare = lease(rig.pool)
        assert spare is not None
        with pytest.raises(RuntimeError, match="expert 4 of layer 0 is on its way already"):
            rig.fetcher.start(0, 4, spare)
        assert rig.pool.state(spare) is FILLING
        assert len(disk.log) == 3
        await landed(first)
        assert rig.fetcher.in_flight(0, 4) is None
        assert rig.fetcher.statistics().started == 1
        assert rig.done == [first]


async def test_a_slot_must_be_leased(autojump_clock: MockClock) -> None:
    async with open_rig(2) as (rig, disk):
        with pytest.raises(RuntimeError, match="slot 0 is FREE"):
            rig.fetcher.start(0, 0, 0)
        fetch = rig.start(0, 0)
        await landed(fetch)
        with pytest.raises(RuntimeError, match="is READY"):
            rig.fetcher.start(0, 1, fetch.slot)
        assert len(disk.log) == 3
        rig.check_conservation()


async def test_a_closed_reader_leaves_the_slot_with_the_caller(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, disk):
        disk.close()
        slot = lease(rig.pool)
        assert slot is not None
        with pytest.raises(EngineClosed):
            rig.fetcher.start(0, 0, slot)
        assert rig.pool.state(slot) is FILLING
        assert rig.fetcher.in_flight(0, 0) is None
        assert rig.fetcher.statistics().started == 0


async def test_what_does_not_fit_together_is_refused(autojump_clock: MockClock) -> None:
    experts, sizes = make_experts()
    classes = one_size(experts)
    (size,) = classes.slot_bytes
    async with open_sim_disk(sizes) as disk:
        with pytest.raises(ConfigError, match="pool has 2 slots and the arena 3"):
            Fetcher(BufferPool((2,)), Arena((3,), (size,)), classes, experts, disk)
        with pytest.raises(ConfigError, match=rf"need slots of \({size},\) bytes, the arena has \({size - 4096},"):
            Fetcher(BufferPool((2,)), Arena((2,), (size - 4096,)), classes, experts, disk)
        with pytest.raises(ConfigError, match="slot 1 has class 0 in the pool, 1 in the arena"):
            Fetcher(BufferPool((2,)), Arena((1, 1), (size, size)), classes, experts, disk)
        with pytest.raises(ConfigError, match="file 0 is read at multiples of 4096 bytes"):
            Fetcher(BufferPool((2,)), Arena((2,), (size,)), attrs.evolve(classes, alignment=512), experts, disk)
        for deadline_s in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError, match="is not positive; try 30"):
                make_rig(disk, experts, read_deadline_s=deadline_s)
        small = attrs.evolve(classes, slot_bytes=(size - 4096,))
        fetcher = Fetcher(BufferPool((1,)), Arena((1,), small.slot_bytes), small, experts, disk)
        big = next(e for row in experts.experts for e in row if e.layout(4096).n_bytes == size)
        lease(fetcher._pool)
        with pytest.raises(RuntimeError, match=f"needs {size} bytes, slot 0 has {size - 4096}"):
            fetcher.start(big.layer, big.expert, 0)
        assert disk.log == []


# --- abandoned ---


async def test_an_abandoned_fetch_keeps_its_slot_until_what_was_begun_has_landed(autojump_clock: MockClock) -> None:
    async with open_rig(2, n_threads=2) as (rig, disk):
        disk.freeze()
        fetch = rig.start(0, 1)
        rig.fetcher.abandon(fetch)
        assert (fetch.done, fetch.inner_landed, fetch.error, fetch.missing) == (True, False, None, frozenset(range(3)))
        for call in (rig.fetcher.abandon, rig.fetcher.hold):
            with pytest.raises(RuntimeError, match="not in flight"):
                call(fetch)
        assert rig.pool.state(fetch.slot) is QUARANTINED
        assert rig.fetcher.in_flight(0, 1) is None
        again = rig.start(0, 1)
        assert again.slot != fetch.slot
        assert lease(rig.pool) is None
        await wait_all_tasks_blocked()
        assert len(disk.in_flight) == 5  # down was not begun
        assert rig.pool.state(fetch.slot) is QUARANTINED
        disk.thaw()
        await landed(again)
        assert rig.pool.state(fetch.slot) is FREE
        rig.check_conservation()
        s = rig.fetcher.statistics()
        assert (s.abandoned, s.landed, s.reads_landed, s.reads_cancelled) == (1, 1, 5, 1)
        assert rig.done == [again]


async def test_a_fetch_that_is_done_cannot_be_abandoned(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, _):
        fetch = rig.start(0, 1)
        await landed(fetch)
        with pytest.raises(RuntimeError, match="not in flight"):
            rig.fetcher.abandon(fetch)
        assert rig.pool.state(fetch.slot) is READY


async def test_an_abandoned_fetch_that_fails_gives_its_slot_back(autojump_clock: MockClock) -> None:
    async with open_rig(profile=DiskProfile(error_rate=1.0)) as (rig, disk):
        fetch = rig.start(0, 1)
        rig.fetcher.abandon(fetch)
        await trio.sleep(10)
        assert rig.pool.statistics().free == 8
        s = rig.fetcher.statistics()
        assert (s.failed, s.abandoned, s.reads_failed, s.reads_started, s.bytes_read) == (0, 1, 3, 3, 0)
        assert len(disk.log) == 3  # nothing is tried again for it


# --- cancellation ---


def test_cancelling_a_user_at_any_step_loses_no_slot() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_rig(1, profile=DiskProfile(bytes_per_s=1e6), chunk_bytes=4096, n_threads=1) as (rig, _):
            taken = lease(rig.pool)
            assert taken is not None

            async def give_back(taken: int) -> None:
                await trio.sleep(1)
                rig.pool.release(taken)

            async def body() -> None:
                slot = await wait_for_slot(rig.pool)
                fetch = rig.fetcher.start(1, 3, slot)
                held = False
                try:
                    await gate_up_landed(fetch)
                    rig.fetcher.hold(fetch)
                    held = True
                    rig.check_bytes(fetch, (0, 1))
                    await landed(fetch)
                    rig.check_bytes(fetch)
                finally:
                    if fetch.done:
                        rig.pool.release(slot)
                    else:
                        rig.fetcher.abandon(fetch)
                    if held:
                        rig.fetcher.let_go(fetch)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_back, taken)
                await subject.run(body)
            with trio.fail_after(60):
                slot = await wait_for_slot(rig.pool)
                fetch = rig.fetcher.start(0, 0, slot)
                await landed(fetch)
            rig.check_bytes(fetch)
            rig.check_conservation()

    assert cancel_at_every_step(scenario) >= 4


def test_a_fetcher_that_is_cancelled_at_any_step_and_run_again_goes_on() -> None:
    async def scenario(subject: Subject) -> None:
        experts, sizes = make_experts()
        async with open_sim_disk(sizes, profile=DiskProfile(error_rate=0.3)) as disk:
            rig = make_rig(disk, experts, 6)
            fetches = [rig.start(0, expert) for expert in range(6)]
            with trio.move_on_after(0.02):
                await subject.run(rig.fetcher.run)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(rig.fetcher.run)
                await trio.sleep(10)
                nursery.cancel_scope.cancel()
            assert all(fetch.done for fetch in fetches)
            rig.check_conservation()
            assert rig.fetcher.statistics().retried > 0

    assert cancel_at_every_step(scenario) >= 2


# --- everything at once ---


async def swarm(seed: int) -> None:
    """Many users of a small pool on a bad disk, some cancelled, some abandoning; then everything must add up."""
    rng = random.Random(seed)
    faults = DiskProfile(
        jitter=rng.choice([0, 1, 30]),
        bytes_per_s=rng.choice([1e6, 2e9]),
        stall_rate=rng.choice([0, 0.1]),
        error_rate=rng.choice([0, 0.05, 0.5]),
        error_numbers=rng.choice([(5,), (11, 116)]),
        hang_rate=rng.choice([0, 0, 0.03]),
    )
    n_slots = rng.randint(1, 6)
    async with open_rig(
        n_slots,
        seed=seed % 5,
        read_deadline_s=rng.choice([0.5, 30]),
        profile=faults,
        mirrors=[faults] * rng.choice([0, 0, 1, 2]),
        n_threads=rng.randint(1, 4),
        chunk_bytes=rng.choice([4096, 8192, 1 << 20]),
    ) as (rig, disk):
        users: dict[Fetch, int] = {}

        async def user(key: tuple[int, int], delay_s: float, patience_s: float, priority: Priority) -> None:
            await trio.sleep(delay_s)
            fetch, held = None, False
            with trio.move_on_after(patience_s):
                slot = await wait_for_slot(rig.pool)
                try:
                    fetch = rig.fetcher.in_flight(*key)
                    if fetch is None:
                        try:
                            fetch = rig.fetcher.start(*key, slot, priority, rig)
                        except FileSuspended:
                            rig.pool.release(slot)
                            return
                    else:
                        rig.pool.release(slot)
                        if priority < fetch.priority:
                            rig.fetcher.promote(fetch, priority)
                    users[fetch] = users.get(fetch, 0) + 1
                    await gate_up_landed(fetch)
                    rig.check_bytes(fetch, (0, 1))
                    if not fetch.done:
                        rig.fetcher.hold(fetch)
                        held = True
                    await landed(fetch)
                    assert rig.pool.state(fetch.slot) is READY
                    rig.check_bytes(fetch)
                except ReadError:
                    assert faults.error_rate or faults.hang_rate
                finally:
                    if fetch is not None and fetch in users:
                        users[fetch] -= 1
                        if not users[fetch]:
                            if not fetch.done:
                                rig.fetcher.abandon(fetch)
                            elif fetch.error is None:
                                rig.pool.release(fetch.slot)
                        if held:
                            rig.fetcher.let_go(fetch)
                    rig.check_conservation()

        with trio.move_on_after(3600) as late:
            async with trio.open_nursery() as nursery:
                for _ in range(rng.randint(1, 25)):
                    key = (rng.randrange(LAYERS), rng.randrange(rng.choice([2, EXPERTS])))
                    delay_s, patience_s = rng.random() * rng.choice([0, 0.1]), rng.expovariate(10)
                    nursery.start_soon(user, key, delay_s, patience_s, rng.choice(list(Priority)))
            await trio.sleep(1000)  # longer than any read takes
        assert not late.cancelled_caught
        s = rig.fetcher.statistics()
        assert s.in_flight == 0
        assert s.reads_in_flight == len(disk.in_flight)
        disk.heal()
        disk.let_return()
        await trio.sleep(1000)
        assert not disk.in_flight
        assert rig.pool.statistics().free == n_slots
        s = rig.fetcher.statistics()
        assert s.bytes_read == disk.statistics().bytes_read
        assert s.reads_in_flight == 0
        assert len(rig.done) == s.landed + s.failed
        rig.check_conservation()


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_swarm(seed: int) -> None:
    trio.run(swarm, seed, clock=MockClock(autojump_threshold=0))
