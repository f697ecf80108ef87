"""Fetches of experts on a simulated disk with faults, and on a real one: right bytes, no slot lost or used twice."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import numpy as np
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.errors import ConfigError, EngineClosed, ReadError
from mer.io.arena import Arena
from mer.io.extents import ExpertExtents, ExpertMap, ExpertPart, SlotClasses, aligned_hull
from mer.io.fetch import Fetch, Fetcher
from mer.io.ggml import GGMLType
from mer.io.pool import BufferPool, SlotState
from mer.io.reader import Reader, ThreadReader
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simdisk import DiskProfile, SimDisk, content, open_sim_disk

LAYERS, EXPERTS = 2, 6
FREE, FILLING, READY, PINNED, QUARANTINED = SlotState


def make_experts(seed: int = 0) -> tuple[ExpertMap, list[int]]:
    """Return experts of uneven sizes at odd offsets of two files, and the files' sizes: they end with the last part."""
    rng = random.Random(seed)
    ends = [rng.randrange(5000), rng.randrange(5000)]
    layers = []
    for layer in range(LAYERS):
        experts = []
        for expert in range(EXPERTS):
            parts = []
            for projection in ("gate", "up", "down"):
                file, n_bytes = rng.randrange(2), rng.randrange(1, 20_000)
                parts.append(ExpertPart(projection, GGMLType.Q4_0, 16, 1, file, ends[file], n_bytes))
                ends[file] += n_bytes + rng.choice([0, 0, 1, 4096])
            experts.append(ExpertExtents(layer, expert, (parts[0], parts[1], parts[2])))
        layers.append(tuple(experts))
    used = [0, 0]
    for extents in (extents for row in layers for extents in row):
        for part in extents.parts:
            used[part.file] = max(used[part.file], part.offset + part.n_bytes)
    return ExpertMap(tuple(layers)), used


def hull_bytes(extents: ExpertExtents) -> int:
    """Bytes of the pages that an expert touches, counted page by page."""
    return 4096 * sum(
        len(range(part.offset // 4096, (part.offset + part.n_bytes - 1) // 4096 + 1)) for part in extents.parts
    )


def one_size(experts: ExpertMap) -> SlotClasses:
    """Return one class of slots for all experts, however much they differ."""
    needs = [e.layout(4096).n_bytes for row in experts.experts for e in row]
    kinds = tuple((0,) * len(row) for row in experts.experts)
    return SlotClasses(
        alignment=4096, slot_bytes=(max(needs),), n_experts=(len(needs),), needed_bytes=(sum(needs),), kinds=kinds
    )


@attrs.define(eq=False)
class Rig:
    """A fetcher with everything round it."""

    pool: BufferPool
    arena: Arena
    experts: ExpertMap
    fetcher: Fetcher
    done: list[Fetch]

    def start(self, layer: int, expert: int) -> Fetch:
        (slot,) = self.pool.lease_nowait(1)
        return self.fetcher.start(layer, expert, slot)

    def check_bytes(self, fetch: Fetch, parts: Sequence[int] = (0, 1, 2)) -> None:
        base, view = self.arena.address(fetch.slot), self.arena.view(fetch.slot)
        for index in parts:
            part = self.experts.experts[fetch.layer][fetch.expert].parts[index]
            begin = fetch.addresses[index] - base
            assert 0 <= begin <= len(view) - part.n_bytes
            assert (view[begin : begin + part.n_bytes] == content(0, part.file, part.offset, part.n_bytes)).all()

    def check_conservation(self) -> None:
        s, r = self.fetcher.statistics(), self.pool.statistics()
        assert s.started == s.landed + s.failed + s.abandoned + s.in_flight
        assert s.reads_started == s.reads_landed + s.reads_failed + s.reads_in_flight == 3 * s.started
        assert r.free + r.filling + r.ready + r.pinned + r.quarantined == r.n_slots


def make_rig(reader: Reader, experts: ExpertMap, n_slots: int = 8) -> Rig:
    classes = one_size(experts)
    pool, arena, done = BufferPool(n_slots), Arena((n_slots,), classes.slot_bytes), list[Fetch]()
    return Rig(pool, arena, experts, Fetcher(pool, arena, classes, experts, reader, on_done=done.append), done)


@asynccontextmanager
async def open_rig(
    n_slots: int = 8, *, seed: int = 0, profile: DiskProfile | None = None
) -> AsyncIterator[tuple[Rig, SimDisk]]:
    experts, sizes = make_experts(seed)
    async with open_sim_disk(sizes, profile=profile) as disk:
        yield make_rig(disk, experts, n_slots), disk


# --- what arrives ---


@pytest.mark.parametrize("seed", range(4))
async def test_all_experts_arrive_where_the_addresses_say(autojump_clock: MockClock, seed: int) -> None:
    async with open_rig(LAYERS * EXPERTS, seed=seed, profile=DiskProfile(jitter=20)) as (rig, disk):
        fetches = [rig.start(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        for fetch in fetches:
            await fetch.wait()
            assert rig.pool.state(fetch.slot) is READY
            assert fetch.done
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
            await fetch.wait_gate_up()
            rig.check_bytes(fetch, (0, 1))
            await fetch.wait()
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
        await fetch.wait_gate_up()
        assert not fetch.done
        assert rig.pool.state(fetch.slot) is FILLING
        rig.check_bytes(fetch, (0, 1))
        await fetch.wait()
        rig.check_bytes(fetch)


async def test_gate_up_wait_is_not_over_while_one_of_them_is_missing(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, disk):
        disk.freeze()
        fetch = rig.start(0, 0)
        gate, up, down = disk.in_flight
        woken = False

        async def wait() -> None:
            nonlocal woken
            await fetch.wait_gate_up()
            woken = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for landed, expected in ((down, False), (up, False), (gate, True)):
                landed.on_landed(landed)  # in an order the disk's queue would rarely give
                await wait_all_tasks_blocked()
                assert woken is expected
        assert fetch.done


# --- single flight ---


async def test_an_expert_on_its_way_is_joined_and_the_spare_slot_returned(autojump_clock: MockClock) -> None:
    async with open_rig(2) as (rig, disk):
        first = rig.start(0, 4)
        assert rig.fetcher.in_flight(0, 4) is first
        assert rig.start(0, 4) is first
        assert rig.pool.statistics().free == 1
        assert len(disk.log) == 3
        with pytest.raises(RuntimeError, match="already being filled"):
            rig.fetcher.start(0, 4, first.slot)
        await first.wait()
        assert rig.fetcher.in_flight(0, 4) is None
        assert (rig.fetcher.statistics().started, rig.fetcher.statistics().joined) == (1, 1)
        assert rig.done == [first]


async def test_a_slot_must_be_leased(autojump_clock: MockClock) -> None:
    async with open_rig(2) as (rig, disk):
        with pytest.raises(RuntimeError, match="slot 0 is FREE"):
            rig.fetcher.start(0, 0, 0)
        fetch = rig.start(0, 0)
        await fetch.wait()
        with pytest.raises(RuntimeError, match="is READY"):
            rig.fetcher.start(0, 1, fetch.slot)
        assert len(disk.log) == 3
        rig.check_conservation()


# --- failures ---


@pytest.mark.parametrize(("bad", "early"), [(0, True), (1, True), (2, False)])
async def test_a_failed_read_fails_its_fetch_alone(autojump_clock: MockClock, bad: int, *, early: bool) -> None:
    async with open_rig(profile=DiskProfile(jitter=0, bytes_per_s=1e6)) as (rig, disk):
        part = rig.experts.experts[0][2].parts[bad]
        disk.fail(part.file, part.offset, part.offset + 1, times=1)
        fetch, other = rig.start(0, 2), rig.start(1, 2)
        raised: list[ReadError] = []

        async def wait() -> None:
            try:
                await fetch.wait()
            except ReadError as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            if early:
                with pytest.raises(ReadError, match="Input/output error"):
                    await fetch.wait_gate_up()
            else:
                await fetch.wait_gate_up()
                rig.check_bytes(fetch, (0, 1))
            assert rig.pool.state(fetch.slot) is FILLING  # the other reads still go into it
        assert [error.errno for error in raised] == [5, 5]
        assert raised[0] is not raised[1]
        assert rig.pool.state(fetch.slot) is FREE
        assert rig.done[0] is fetch
        assert rig.fetcher.in_flight(0, 2) is None
        await other.wait()
        rig.check_bytes(other)
        again = rig.start(0, 2)
        await again.wait()
        rig.check_bytes(again)
        s = rig.fetcher.statistics()
        assert (s.started, s.landed, s.failed, s.reads_landed, s.reads_failed) == (3, 2, 1, 8, 1)
        assert s.bytes_read == disk.statistics().bytes_read


async def test_a_closed_reader_leaves_the_slot_with_the_caller(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, disk):
        disk.close()
        (slot,) = rig.pool.lease_nowait(1)
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
            Fetcher(BufferPool(2), Arena((3,), (size,)), classes, experts, disk)
        for counts, slot_bytes in (((2,), (size - 4096,)), ((1, 1), (size, size))):
            with pytest.raises(
                ConfigError, match=rf"need slots of \({size},\) bytes, the arena has \({slot_bytes[0]},"
            ):
                Fetcher(BufferPool(2), Arena(counts, slot_bytes), classes, experts, disk)
        with pytest.raises(ConfigError, match="file 0 is read at multiples of 4096 bytes"):
            Fetcher(BufferPool(2), Arena((2,), (size,)), attrs.evolve(classes, alignment=512), experts, disk)
        small = attrs.evolve(classes, slot_bytes=(size - 4096,))
        fetcher = Fetcher(BufferPool(1), Arena((1,), small.slot_bytes), small, experts, disk)
        big = next(e for row in experts.experts for e in row if e.layout(4096).n_bytes == size)
        fetcher._pool.lease_nowait(1)
        with pytest.raises(RuntimeError, match=f"needs {size} bytes, slot 0 has {size - 4096}"):
            fetcher.start(big.layer, big.expert, 0)
        assert disk.log == []


# --- abandoned ---


async def test_an_abandoned_fetch_keeps_its_slot_until_the_last_read_lands(autojump_clock: MockClock) -> None:
    async with open_rig(2) as (rig, disk):
        disk.freeze()
        fetch = rig.start(0, 1)
        reads = disk.in_flight
        rig.fetcher.abandon(fetch)
        for wait in (fetch.wait, fetch.wait_gate_up):
            with pytest.raises(RuntimeError, match="expert 1 of layer 0 was abandoned"), trio.fail_after(60):
                await wait()
        with pytest.raises(RuntimeError, match="not in flight"):
            rig.fetcher.abandon(fetch)
        assert rig.pool.state(fetch.slot) is QUARANTINED
        assert rig.fetcher.in_flight(0, 1) is None
        again = rig.start(0, 1)
        assert again.slot != fetch.slot
        with pytest.raises(trio.WouldBlock):
            rig.pool.lease_nowait(1)
        for number, read in enumerate(reads):
            assert rig.pool.state(fetch.slot) is QUARANTINED, number
            read.on_landed(read)
        assert rig.pool.state(fetch.slot) is FREE
        rig.check_conservation()
        s = rig.fetcher.statistics()
        assert (s.abandoned, s.in_flight, s.reads_landed, s.reads_in_flight) == (1, 1, 3, 3)
        assert rig.done == []


async def test_a_fetch_that_is_done_cannot_be_abandoned(autojump_clock: MockClock) -> None:
    async with open_rig() as (rig, _):
        fetch = rig.start(0, 1)
        await fetch.wait()
        with pytest.raises(RuntimeError, match="not in flight"):
            rig.fetcher.abandon(fetch)
        assert rig.pool.state(fetch.slot) is READY


async def test_an_abandoned_fetch_that_fails_gives_its_slot_back(autojump_clock: MockClock) -> None:
    async with open_rig(profile=DiskProfile(error_rate=1.0)) as (rig, _):
        fetch = rig.start(0, 1)
        rig.fetcher.abandon(fetch)
        await trio.sleep(10)
        assert rig.pool.statistics().free == 8
        s = rig.fetcher.statistics()
        assert (s.failed, s.abandoned, s.reads_failed, s.bytes_read) == (0, 1, 3, 0)


# --- cancellation ---


def test_cancelling_a_user_at_any_step_loses_no_slot() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_rig(1, profile=DiskProfile(bytes_per_s=1e6)) as (rig, _):
            (taken,) = await rig.pool.lease(1)

            async def give_back() -> None:
                await trio.sleep(1)
                rig.pool.release(taken)

            async def body() -> None:
                (slot,) = await rig.pool.lease(1)
                fetch = rig.fetcher.start(1, 3, slot)
                try:
                    await fetch.wait_gate_up()
                    rig.check_bytes(fetch, (0, 1))
                    await fetch.wait()
                    rig.check_bytes(fetch)
                finally:
                    if fetch.done:
                        rig.pool.release(slot)
                    else:
                        rig.fetcher.abandon(fetch)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_back)
                await subject.run(body)
            with trio.fail_after(60):
                (slot,) = await rig.pool.lease(1)
                fetch = rig.fetcher.start(0, 0, slot)
                await fetch.wait()
            rig.check_bytes(fetch)
            rig.check_conservation()

    assert cancel_at_every_step(scenario) >= 4


def test_cancelling_one_waiter_at_any_step_leaves_the_fetch_and_the_others_alone() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_rig(profile=DiskProfile(bytes_per_s=1e6)) as (rig, _):
            fetch = rig.start(0, 5)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch.wait)
                nursery.start_soon(fetch.wait_gate_up)
                await subject.run(fetch.wait)
            assert fetch.done
            assert rig.pool.state(fetch.slot) is READY
            rig.check_bytes(fetch)

    assert cancel_at_every_step(scenario) >= 1


# --- everything at once ---


async def swarm(seed: int) -> None:
    """Many users of a small pool on a bad disk, some cancelled, some abandoning; then everything must add up."""
    rng = random.Random(seed)
    profile = DiskProfile(
        jitter=rng.choice([0, 1, 30]),
        bytes_per_s=rng.choice([1e6, 2e9]),
        stall_rate=rng.choice([0, 0.1]),
        error_rate=rng.choice([0, 0.05, 0.5]),
    )
    n_slots = rng.randint(1, 6)
    async with open_rig(n_slots, seed=seed % 5, profile=profile) as (rig, disk):
        users: dict[Fetch, int] = {}

        async def user(key: tuple[int, int], delay_s: float, patience_s: float) -> None:
            await trio.sleep(delay_s)
            with trio.move_on_after(patience_s):
                (slot,) = await rig.pool.lease(1)
                fetch = rig.fetcher.start(*key, slot)
                users[fetch] = users.get(fetch, 0) + 1
                try:
                    await fetch.wait_gate_up()
                    rig.check_bytes(fetch, (0, 1))
                    await fetch.wait()
                    assert rig.pool.state(fetch.slot) is READY
                    rig.check_bytes(fetch)
                except ReadError:
                    assert profile.error_rate
                finally:
                    users[fetch] -= 1
                    rig.check_conservation()
                    if not users[fetch]:
                        if not fetch.done:
                            rig.fetcher.abandon(fetch)
                        elif fetch.error is None:
                            rig.pool.release(fetch.slot)

        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                for _ in range(rng.randint(1, 25)):
                    key = (rng.randrange(LAYERS), rng.randrange(rng.choice([2, EXPERTS])))
                    nursery.start_soon(user, key, rng.random() * rng.choice([0, 0.1]), rng.expovariate(10))
            await trio.sleep(1000)  # longer than any read takes
            assert not disk.in_flight
        assert rig.pool.statistics().free == n_slots
        assert rig.fetcher.statistics().bytes_read == disk.statistics().bytes_read
        s = rig.fetcher.statistics()
        assert s.in_flight == s.reads_in_flight == 0
        assert len(rig.done) == s.landed + s.failed
        rig.check_conservation()


@given(st.integers(0, 2**32))
def test_swarm(seed: int) -> None:
    trio.run(swarm, seed, clock=MockClock(autojump_threshold=0))


def test_content_is_a_function_of_the_position() -> None:
    whole = content(0, 1, 0, 1000)
    for offset in (0, 1, 7, 8, 9, 500):
        for n_bytes in (0, 1, 8, 100):
            assert (content(0, 1, offset, n_bytes) == whole[offset : offset + n_bytes]).all()
    assert np.mean(whole == content(0, 0, 0, 1000)) < 0.05
    assert np.mean(whole == content(1, 1, 0, 1000)) < 0.05
