"""What every reader must do: one set of tests for threads, direct and buffered, io_uring, and the simulated disk."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import trio

from mer.errors import ConfigError, EngineClosed, ReadError
from mer.io.arena import map_anonymous
from mer.io.pool import Priority
from mer.io.reader import ReadOperation
from mer.testing.simdisk import content
from tests._lib.extents import read_extent
from tests.io.lab import (
    CHUNK,
    ClosableReader,
    Lab,
    Landings,
    RunLab,
    Scenario,
    assert_right,
    operation,
    refuse_direct,
    ring_lab,
    run_real,
    run_simulated,
    thread_lab,
)

ReaderScenario: TypeAlias = Callable[[ClosableReader], Awaitable[None]]
Run: TypeAlias = Callable[[ReaderScenario, Sequence[int]], None]

DEMAND, READ_AHEAD, PREFETCH = Priority


@pytest.fixture(params=["direct", "buffered", "io_uring", "simulated"])
def run_lab(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunLab:
    """Return a function that runs a scenario on a reader of files of given sizes, whose bytes are `content(0, ...)`."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)

    def run(
        scenario: Scenario, sizes: Sequence[int], *, n_mirrors: int = 0, n_threads: int = 4, **settings: Any
    ) -> None:
        settings = {"chunk_bytes": CHUNK, "n_threads": n_threads} | settings

        async def checked(lab: Lab) -> None:
            assert [mode.direct for mode in lab.reader.modes] == [request.param != "buffered"] * len(sizes)
            await scenario(lab)
            s = lab.reader.statistics()
            assert s.started == s.landed + s.failed + s.cancelled + s.in_flight
            assert s.landed == sum(each.landed for each in s.by_priority)

        if request.param == "simulated":
            run_simulated(checked, sizes, n_mirrors, settings)
        else:
            lab = ring_lab if request.param == "io_uring" else thread_lab
            run_real(lab, tmp_path, checked, sizes, n_mirrors, settings)

    return run


@pytest.fixture
def run(run_lab: RunLab) -> Run:
    """Return a function that runs a scenario which needs a reader and no faults."""

    def run(scenario: ReaderScenario, sizes: Sequence[int]) -> None:
        async def with_reader(lab: Lab) -> None:
            await scenario(lab.reader)

        run_lab(with_reader, sizes)

    return run


EXTENTS = [
    (0, 0, 1),
    (0, 0, 4096),
    (0, 1, 4096),
    (0, 4095, 2),
    (0, 4097, 100_003),
    (0, 12_345, 3 * CHUNK),
    (0, CHUNK - 1, CHUNK + 2),
    (0, 299_999, 1),  # the last byte
    (0, 290_000, 10_000),  # the tail, whose hull passes the end
    (1, 0, 5),
    (1, 4, 1),
    (2, 0, 8192),
    (0, 777, 0),
]
SIZES = [300_000, 5, 8192]


def test_any_extent_arrives(run: Run) -> None:
    got: dict[tuple[int, int, int], np.ndarray] = {}

    async def scenario(reader: ClosableReader) -> None:
        async def read(extent: tuple[int, int, int]) -> None:
            got[extent] = await read_extent(reader, *extent)

        async with trio.open_nursery() as nursery:
            for extent in EXTENTS:
                nursery.start_soon(read, extent)

    run(scenario, SIZES)
    for extent in EXTENTS:
        assert got[extent].shape == (extent[2],)
        assert got[extent].flags.writeable
        assert (got[extent] == content(0, *extent)).all()


@pytest.mark.parametrize(
    ("file", "offset", "n_bytes"),
    [(0, 299_999, 2), (0, 300_000, 1), (0, 5_000_000, 10), (1, 0, 6), (2, 8192, 1), (0, 0, 400_000)],
)
def test_a_file_that_ends_too_early_is_an_error(run: Run, file: int, offset: int, n_bytes: int) -> None:
    async def scenario(reader: ClosableReader) -> None:
        with pytest.raises(ReadError, match="file truncated") as caught:
            await read_extent(reader, file, offset, n_bytes)
        assert caught.value.errno is None
        assert (await read_extent(reader, 0, 5, 9000) == content(0, 0, 5, 9000)).all()
        statistics = reader.statistics()
        assert (statistics.started, statistics.landed, statistics.failed) == (2, 1, 1)

    run(scenario, SIZES)


def test_landing_is_told_once_in_the_trio_thread_and_never_inside_start(run: Run) -> None:
    landings: list[ReadOperation] = []
    all_landed = trio.Event()
    starting = True

    def on_landed(landed: ReadOperation) -> None:
        assert not starting
        assert threading.current_thread() is threading.main_thread()
        trio.lowlevel.current_trio_token()
        landings.append(landed)
        if len(landings) == len(operations):
            all_landed.set()

    operations = [operation(0, offset, 50_000, on_landed) for offset in range(0, 200_000, 10_000)]

    async def scenario(reader: ClosableReader) -> None:
        nonlocal starting
        for item in operations:
            reader.start(item)
        statistics = reader.statistics()
        assert (statistics.started, statistics.in_flight, statistics.landed) == (20, 20, 0)
        starting = False
        await all_landed.wait()
        statistics = reader.statistics()
        assert (statistics.started, statistics.in_flight, statistics.landed, statistics.failed) == (20, 0, 20, 0)
        assert statistics.bytes_read == sum(item.length for item in operations)
        assert statistics.latency_p50_s is not None
        assert statistics.latency_p99_s is not None
        assert 0 < statistics.latency_p50_s <= statistics.latency_p99_s
        assert statistics.busy_s > 0
        assert await read_extent(reader, 1, 0, 1) == content(0, 1, 0, 1)  # time for a second call to show

    run(scenario, SIZES)
    assert sorted(map(id, landings)) == sorted(map(id, operations))
    assert all(item.error is None for item in operations)


def test_nothing_is_written_outside_the_buffer(run: Run) -> None:
    memory = np.frombuffer(map_anonymous(9 * 4096), dtype=np.uint8)
    memory[:] = 0xA5
    landed = trio.Event()

    async def scenario(reader: ClosableReader) -> None:
        item = operation(0, 40_000, 25_000, lambda _: landed.set(), memory=memory[4096 : 8 * 4096].data)
        assert item.length == 7 * 4096
        reader.start(item)
        await landed.wait()

    run(scenario, SIZES)
    assert (memory[4096 + 40_000 % 4096 :][:25_000] == content(0, 0, 40_000, 25_000)).all()
    assert (memory[:4096] == 0xA5).all()
    assert (memory[8 * 4096 :] == 0xA5).all()


def test_malformed_operations_are_refused_and_not_counted(run: Run) -> None:
    page = np.frombuffer(map_anonymous(3 * 4096), dtype=np.uint8)
    frozen = page[:4096].view()
    frozen.flags.writeable = False
    cases: list[dict[str, Any]] = [
        {"start": 512},
        {"start": -4096},
        {"length": 4000, "buffer": page[:4000]},
        {"buffer": page[8 : 4096 + 8]},
        {"buffer": page[:8192]},
        {"buffer": page[:8192:2]},
        {"buffer": page[:4096].view(np.int8)},
        {"buffer": frozen},
        {"needed": 0},
        {"needed": 4097},
    ]

    async def scenario(reader: ClosableReader) -> None:
        for case in cases:
            fields: dict[str, Any] = {
                "start": 0,
                "length": 4096,
                "needed": 4096,
                "buffer": page[:4096],
            } | case
            with pytest.raises(ValueError, match=r"cannot read|the buffer|must be multiples"):
                reader.start(ReadOperation(file=0, **fields, on_landed=lambda _: None))
        assert reader.statistics().started == 0

    run(scenario, SIZES)


def test_a_closed_reader_refuses(run: Run) -> None:
    async def scenario(reader: ClosableReader) -> None:
        await read_extent(reader, 0, 0, 10)
        reader.close()
        reader.close()
        with pytest.raises(EngineClosed, match="closed"):
            await read_extent(reader, 0, 0, 10)

    run(scenario, SIZES)


def test_a_cancelled_wait_leaves_the_read_to_land(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        with trio.CancelScope() as scope:
            scope.cancel()
            await read_extent(lab.reader, 0, 3, 100_000)
        assert scope.cancelled_caught
        lab.reader.start(other := landings.operation(0, 10))
        assert lab.reader.statistics().in_flight == 2
        lab.go_on()
        await landings.wait(other)
        while lab.reader.statistics().in_flight:
            await read_extent(lab.reader, 0, 0, 10)
        assert lab.reader.statistics().failed == 0

    run_lab(scenario, SIZES)


# --- priorities ---

BIG = [40 * CHUNK]


def chunk_starts(lab: Lab, after: int = 0) -> list[int]:
    """Return which chunks of file 0 were read, as numbers, in the order in which their reads began."""
    assert all(start % CHUNK == 0 for _, _, start, _ in lab.reads)
    return [start // CHUNK for _, _, start, _ in lab.reads[after:]]


def test_chunks_are_read_by_priority_and_then_in_the_order_of_the_starts(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        asked = [
            (0, DEMAND),
            (10, PREFETCH),
            (20, READ_AHEAD),
            (12, PREFETCH),
            (30, DEMAND),
            (22, READ_AHEAD),
            (32, DEMAND),
        ]
        reads = [landings.operation(at * CHUNK, 2 * CHUNK, priority=priority) for at, priority in asked]
        landings.call(lab.reader.start, reads[0])
        await lab.begun(1)
        for read in reads[1:]:
            landings.call(lab.reader.start, read)
        queued = [each.queued_bytes // CHUNK for each in lab.reader.statistics().by_priority]
        assert queued == [5, 4, 4]
        lab.go_on()
        await landings.wait(*reads)
        assert chunk_starts(lab) == [0, 1, 30, 31, 32, 33, 20, 21, 22, 23, 10, 11, 12, 13]
        for read in reads:
            assert_right(read)
        s = lab.reader.statistics()
        assert [each.landed for each in s.by_priority] == [3, 2, 2]
        assert [each.queued_bytes for each in s.by_priority] == [0, 0, 0]
        assert all(each.latency_p50_s is not None for each in s.by_priority)

    run_lab(scenario, BIG, n_threads=1)


@pytest.mark.parametrize("limit", [1, 2])
def test_prefetches_leave_threads_to_demand(run_lab: RunLab, limit: int) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        guess = landings.operation(0, 8 * CHUNK, priority=PREFETCH)
        wanted = landings.operation(20 * CHUNK, (4 - limit) * CHUNK)
        lab.reader.start(guess)
        await lab.begun(limit)
        lab.reader.start(wanted)
        await lab.begun(4)
        assert sorted(chunk_starts(lab)) == [*range(limit), *range(20, 24 - limit)]
        ahead = landings.operation(10 * CHUNK, 3 * CHUNK, priority=READ_AHEAD)
        lab.reader.start(ahead)
        lab.go_on()
        await landings.wait(guess, wanted, ahead)
        assert sorted(chunk_starts(lab)) == [*range(8), *range(10, 13), *range(20, 24 - limit)]

    run_lab(scenario, BIG, n_threads=4, prefetch_threads=limit)


def test_a_promoted_operation_overtakes_and_is_not_read_twice(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        first = landings.operation(0, 3 * CHUNK, priority=PREFETCH)
        second = landings.operation(10 * CHUNK, 2 * CHUNK, priority=PREFETCH)
        third = landings.operation(20 * CHUNK, 2 * CHUNK, priority=PREFETCH)
        demand = landings.operation(30 * CHUNK, 2 * CHUNK)
        lab.reader.start(first)
        await lab.begun(1)
        for read in (second, third, demand):
            lab.reader.start(read)
        landings.call(lab.reader.promote, third, DEMAND)
        landings.call(lab.reader.promote, first, READ_AHEAD)
        landings.call(lab.reader.promote, first, READ_AHEAD)
        assert (third.priority, first.priority) == (DEMAND, READ_AHEAD)
        for read, lower in ((third, READ_AHEAD), (first, PREFETCH)):
            with pytest.raises(ValueError, match="cannot be lowered to"):
                lab.reader.promote(read, lower)
        lab.go_on()
        await landings.wait(first, second, third, demand)
        assert chunk_starts(lab) == [0, 20, 21, 30, 31, 1, 2, 10, 11]
        assert [each.landed for each in lab.reader.statistics().by_priority] == [2, 1, 1]
        lab.reader.promote(second, DEMAND)  # too late
        await read_extent(lab.reader, 0, 0, 1)
        assert len(landings.seen) == 4

    run_lab(scenario, BIG, n_threads=1)


def test_a_promotion_makes_room_for_another_prefetch(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        first = landings.operation(0, CHUNK, priority=PREFETCH)
        second = landings.operation(10 * CHUNK, CHUNK, priority=PREFETCH)
        lab.reader.start(first)
        lab.reader.start(second)
        await lab.begun(1)
        lab.reader.promote(first, DEMAND)
        await lab.begun(2)
        lab.go_on()
        await landings.wait(first, second)

    run_lab(scenario, BIG, n_threads=2)


# --- cancellation ---


def test_a_cancelled_operation_lands_once_and_what_was_not_begun_goes_unread(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        begun = landings.operation(0, 3 * CHUNK)
        waiting = landings.operation(10 * CHUNK, 2 * CHUNK, priority=READ_AHEAD)
        wanted = landings.operation(20 * CHUNK, 2 * CHUNK, priority=PREFETCH)
        lab.reader.start(begun)
        await lab.begun(1)
        lab.reader.start(waiting)
        lab.reader.start(wanted)
        for read in (waiting, waiting, begun):
            landings.call(lab.reader.cancel, read)
        await landings.wait(waiting)
        assert landings.seen == [waiting]
        lab.go_on()
        await landings.wait(begun, wanted)
        assert chunk_starts(lab) == [0, 20, 21]
        for read in (waiting, begun):
            assert read.cancelled
            assert read.error is not None
            assert "cancelled" in read.error.reason
        assert_right(wanted)
        lab.reader.cancel(wanted)  # too late
        await read_extent(lab.reader, 0, 0, 1)
        assert len(landings.seen) == 3
        s = lab.reader.statistics()
        assert (s.started, s.landed, s.cancelled, s.failed) == (4, 2, 2, 0)
        assert s.bytes_read == 2 * CHUNK + 4096

    run_lab(scenario, BIG, n_threads=1)


def test_cancelling_what_is_being_read_to_the_end_changes_nothing(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.pause()
        read = landings.operation(0, 3 * CHUNK)
        lab.reader.start(read)
        await lab.begun(3)
        lab.reader.cancel(read)
        lab.go_on()
        await landings.wait(read)
        assert_right(read)

    run_lab(scenario, BIG, n_threads=3)


# --- reads that hang ---


def test_threads_that_hang_are_replaced_and_the_memory_stays_the_operations(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.hang(0, 0, 4 * CHUNK)
        stuck = landings.operation(0, 4 * CHUNK)
        waiting = landings.operation(10 * CHUNK, 3 * CHUNK)
        lab.reader.start(stuck)
        await lab.begun(2)
        lab.reader.start(waiting)
        assert lab.reader.stalled_s(waiting) == 0
        assert lab.reader.stalled_s(stuck) >= 0
        landings.call(lab.reader.write_off, stuck)
        landings.call(lab.reader.write_off, stuck)
        await landings.wait(waiting)
        assert_right(waiting)
        assert landings.seen == [waiting]
        s = lab.reader.statistics()
        assert (s.written_off, s.in_flight) == (1, 1)
        assert (s.copies[0].threads, s.copies[0].threads_written_off) == (4, 2)
        lab.let_return()
        await landings.wait(stuck)
        assert stuck.cancelled  # half of it was never read
        for begin in (0, CHUNK):
            assert (stuck.buffer[begin : begin + CHUNK] == content(0, 0, begin, CHUNK)).all()
        again = landings.operation(0, 4 * CHUNK)
        lab.reader.start(again)
        await landings.wait(again)
        assert_right(again)
        s = lab.reader.statistics()
        assert (s.copies[0].threads, s.copies[0].threads_written_off) == (2, 0)

    run_lab(scenario, BIG, n_threads=2)


def test_when_the_replacements_hang_too_others_fail_until_a_read_returns(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        lab.hang(0, 0, 2 * CHUNK)
        first, second = (landings.operation(at * CHUNK, CHUNK) for at in (0, 1))
        waiting, late = (landings.operation(at * CHUNK, CHUNK) for at in (10, 11))
        for number, read in enumerate((first, second), 1):
            lab.reader.start(read)
            await lab.begun(number)
            if read is second:
                lab.reader.start(waiting)
            landings.call(lab.reader.write_off, read)
        landings.call(lab.reader.start, late)
        await landings.wait(waiting, late)
        for read in (waiting, late):
            assert read.error is not None
            assert "every thread hangs" in read.error.reason
            assert not read.cancelled
        assert lab.reader.statistics().copies[0].threads == 2
        lab.let_return()
        await landings.wait(first, second)
        assert_right(first)
        assert_right(second)
        again = landings.operation(10 * CHUNK, CHUNK)
        lab.reader.start(again)
        await landings.wait(again)
        assert_right(again)
        assert len(lab.reads) == 3
        assert lab.reader.statistics().copies[0].threads == 1

    run_lab(scenario, BIG, n_threads=1)


# --- mirrors ---


def test_a_chunk_that_fails_on_one_copy_is_read_from_another(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        landings = Landings()
        for copy in (0, 1):
            lab.fail(0, copy * 5 * CHUNK, copy * 5 * CHUNK + 1, copy=copy)
        lab.fail(0, 9 * CHUNK, 9 * CHUNK + 1)
        good = landings.operation(0, 8 * CHUNK)
        bad = landings.operation(8 * CHUNK, 4 * CHUNK)
        lab.reader.start(good)
        await landings.wait(good)
        assert_right(good)
        lab.reader.start(bad)
        await landings.wait(bad)
        assert bad.error is not None
        assert bad.error.offset == 9 * CHUNK
        assert sorted(copy for copy, _, start, _ in lab.reads if start == 9 * CHUNK) == [0, 1, 2]
        s = lab.reader.statistics()
        assert [len(copy.paths) for copy in s.copies] == [1, 1, 1]
        assert sum(copy.failures for copy in s.copies) == len(lab.reads) - sum(c.bytes_read for c in s.copies) // CHUNK
        assert sum(copy.reads for copy in s.copies) == len(lab.reads)
        assert all(copy.in_force for copy in s.copies)

    run_lab(scenario, BIG, n_mirrors=2, n_threads=2)


# --- settings ---


def test_settings_out_of_range(run_lab: RunLab) -> None:
    async def scenario(lab: Lab) -> None:
        raise AssertionError("opened")

    for settings, reason in (
        ({"n_threads": 0}, "at least 1 thread"),
        ({"prefetch_threads": 0}, "at least 1 thread"),
        ({"chunk_bytes": 0}, "multiple of 4096"),
        ({"chunk_bytes": 5000}, "multiple of 4096"),
    ):
        with pytest.raises((ConfigError, ExceptionGroup)) as caught:
            run_lab(scenario, BIG, **settings)
        assert reason in repr(caught.value)
