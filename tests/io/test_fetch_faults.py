"""Reads that fail or hang: when they are tried again, what a fetch makes of it, and what becomes of its slot."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.errors import EngineClosed, FileSuspended, ReadError, ReadTimeout
from mer.io.extents import PROJECTIONS, ExpertExtents, ExpertMap, ExpertPart
from mer.io.fetch import Fetch
from mer.io.ggml import GGMLType
from mer.io.patient import DELAYS_S, TRANSIENT
from mer.io.reader import start_extent
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simdisk import DiskProfile, SimDisk, content, open_sim_disk
from tests._lib.extents import read_extent
from tests._lib.landing import gate_up_landed, landed
from tests.io.rig import (
    DEMAND,
    FILLING,
    FREE,
    PREFETCH,
    QUARANTINED,
    READY,
    Rig,
    big_experts,
    lease,
    make_rig,
    open_rig,
)

INSTANT = DiskProfile(latency_s=0, jitter=0, bytes_per_s=float("inf"))
N_BYTES = 5 * 4096


class Starts:
    """When each read of a range was begun; made before the fetch."""

    def __init__(self, disk: SimDisk) -> None:
        self.times_s: list[tuple[tuple[int, int], float]] = []
        begin = disk._begin_read

        def note(chunk: object, now_s: float) -> None:
            begin(chunk, now_s)  # type: ignore[arg-type]
            _, file, start, _ = disk.chunk_log[-1]
            self.times_s.append(((file, start), now_s))

        disk._begin_read = note  # type: ignore[method-assign]

    def of(self, rig: Rig, expert: int, part: int) -> list[float]:
        extents = rig.part(0, expert, part)
        return [at for key, at in self.times_s if key == (extents.file, extents.offset)]


def break_part(
    rig: Rig, disk: SimDisk, expert: int, index: int, *, number: int = errno.EIO, times: int | None = None
) -> None:
    part = rig.part(0, expert, index)
    disk.fail(part.file, part.offset, part.offset + part.n_bytes, number=number, times=times)


def hang_part(rig: Rig, disk: SimDisk, expert: int, index: int) -> None:
    part = rig.part(0, expert, index)
    disk.hang(part.file, part.offset, part.offset + part.n_bytes, times=1)


async def outcome(fetch: Fetch) -> ReadError:
    with pytest.raises(ReadError) as caught:
        await landed(fetch)
    return caught.value


# --- trying again ---


def test_the_policy_is_what_the_documentation_says() -> None:
    assert DELAYS_S == (0.005, 0.010, 0.050)
    assert {os.strerror(number) for number in TRANSIENT} == {
        "Resource temporarily unavailable",
        "Interrupted system call",
        "Input/output error",
        "Device or resource busy",
        "Cannot allocate memory",
        "Connection timed out",
    }


@pytest.mark.parametrize("number", sorted(TRANSIENT))
@pytest.mark.parametrize("index", range(3))
async def test_a_transient_error_is_tried_again_after_5_10_and_50_ms(
    autojump_clock: MockClock, number: int, index: int
) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        starts = Starts(disk)
        break_part(rig, disk, 2, index, number=number)
        began_s = trio.current_time()
        fetch = rig.start(0, 2)
        error = await outcome(fetch)
        assert [at - began_s for at in starts.of(rig, 2, index)] == pytest.approx([0, 0.005, 0.015, 0.065], abs=1e-9)
        for other in {0, 1, 2} - {index}:
            assert len(starts.of(rig, 2, other)) == 1  # only what failed is read again
        part = rig.part(0, 2, index)
        assert (error.errno, error.offset, error.n_bytes, error.tries) == (number, part.offset, N_BYTES, 4)
        assert str(error.path) == "sim-2"
        assert "failed 4 times" in str(error)
        assert error is not fetch.error
        assert rig.done_s == [pytest.approx(began_s + 0.065)]
        assert rig.pool.state(fetch.slot) is FREE
        s = rig.fetcher.statistics()
        assert (s.retried, s.failed, s.reads_failed, s.reads_landed) == (3, 1, 4, 2)
        rig.check_conservation()


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_what_works_in_the_end_leaves_no_trace_but_the_count(autojump_clock: MockClock, times: int) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 1, times=times)
        fetch = rig.start(0, 0)
        began_s = trio.current_time()
        await landed(fetch)
        assert trio.current_time() - began_s == pytest.approx(sum(DELAYS_S[:times]))
        rig.check_bytes(fetch)
        s = rig.fetcher.statistics()
        assert (s.retried, s.landed, s.failed) == (times, 1, 0)
        assert s.files[0].failures_in_a_row == 0
        rig.check_conservation()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ESTALE, errno.ENODEV, errno.EBADF])
async def test_other_errors_are_final(autojump_clock: MockClock, number: int) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 0, number=number)
        began_s = trio.current_time()
        error = await outcome(rig.start(0, 0))
        assert trio.current_time() == began_s
        assert (error.errno, error.tries) == (number, 1)
        assert rig.fetcher.statistics().retried == 0


async def test_truncation_is_final(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        disk.sizes[1] = 3 * N_BYTES - 1
        error = await outcome(rig.start(0, 1))
        assert (error.errno, error.tries) == (None, 1)
        assert "truncated" in error.reason
        assert rig.fetcher.statistics().retried == 0


async def test_an_abandoned_fetch_is_not_tried_again_and_its_slot_is_free_at_once(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 0)
        fetch = rig.start(0, 0)
        await trio.sleep(0.012)  # the second retry is due in 3 ms
        assert disk.in_flight == ()
        rig.fetcher.abandon(fetch)
        assert rig.pool.state(fetch.slot) is FREE
        n_reads = len(disk.log)
        await trio.sleep(10)
        assert len(disk.log) == n_reads
        rig.check_conservation()


async def test_a_promotion_holds_for_the_reads_that_are_tried_again(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 0, times=1)
        fetch = rig.start(0, 0, PREFETCH)
        await trio.sleep(0.001)
        rig.fetcher.promote(fetch, DEMAND)
        disk.freeze()
        await trio.sleep(0.01)
        (again,) = disk.in_flight
        assert again.priority is DEMAND
        disk.thaw()
        await landed(fetch)


async def test_a_reader_that_closes_between_two_tries_ends_the_fetch(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 0)
        fetch = rig.start(0, 0)
        await trio.sleep(0.001)
        disk.close()
        error = await outcome(fetch)
        assert (error.errno, error.tries) == (errno.EIO, 1)
        assert rig.pool.state(fetch.slot) is FREE
        assert rig.fetcher.statistics().retried == 0
        rig.check_conservation()


async def test_without_its_run_a_fetcher_tries_nothing_again(autojump_clock: MockClock) -> None:
    experts, sizes = big_experts(N_BYTES)
    async with open_sim_disk(sizes, profile=INSTANT) as disk:
        rig = make_rig(disk, experts)
        break_part(rig, disk, 0, 0, times=1)
        fetch = rig.start(0, 0)
        await trio.sleep(100)
        assert not fetch.done
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.fetcher.run)
            await landed(fetch)
            nursery.cancel_scope.cancel()
        rig.check_bytes(fetch)


# --- what a failure does to the fetch ---


async def test_a_failed_part_fails_its_fetch_at_once_and_alone(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=DiskProfile(jitter=0), n_threads=2, chunk_bytes=4096) as (
        rig,
        disk,
    ):
        break_part(rig, disk, 2, 0, number=errno.ESTALE, times=1)
        up = rig.part(0, 2, 1)
        disk.hang(up.file, up.offset, up.offset + 1, times=1)
        fetch, other = rig.start(0, 2), rig.start(0, 3)
        raised: list[ReadError] = []

        async def wait() -> None:
            raised.append(await outcome(fetch))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            with pytest.raises(ReadError, match="Stale file handle"):
                await gate_up_landed(fetch)
        assert [error.errno for error in raised] == [errno.ESTALE] * 2
        assert raised[0] is not raised[1]
        assert rig.done == [fetch]
        assert not fetch.inner_landed
        assert rig.fetcher.in_flight(0, 2) is None
        assert rig.pool.state(fetch.slot) is QUARANTINED  # the read of up still writes into it
        await landed(other)
        rig.check_bytes(other)
        down = rig.part(0, 2, 2)
        assert [entry for entry in disk.chunk_log if entry[1:3] == (down.file, down.offset)] == []  # cancelled
        disk.let_return()
        await wait_all_tasks_blocked()
        assert rig.pool.state(fetch.slot) is FREE
        again = rig.start(0, 2)
        await landed(again)
        rig.check_bytes(again)
        s = rig.fetcher.statistics()
        assert (s.started, s.landed, s.failed, s.reads_landed, s.reads_failed, s.reads_cancelled) == (3, 2, 1, 6, 1, 2)
        assert s.bytes_read == disk.statistics().bytes_read == 6 * N_BYTES
        rig.check_conservation()


async def test_gate_and_up_can_have_been_used_when_down_fails(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        break_part(rig, disk, 0, 2)
        fetch = rig.start(0, 0)
        await gate_up_landed(fetch)
        rig.check_bytes(fetch, (0, 1))
        assert rig.pool.state(fetch.slot) is FILLING
        await outcome(fetch)
        assert rig.inner == rig.done == [fetch]


# --- hold and let_go ---


@pytest.mark.parametrize("ending", ["fails", "is abandoned", "hangs"])
async def test_a_held_slot_outlasts_its_fetch(autojump_clock: MockClock, ending: str) -> None:
    async with open_rig(1, experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        if ending == "fails":
            break_part(rig, disk, 0, 2, number=errno.ESTALE)
            disk.profile = DiskProfile(jitter=0, bytes_per_s=1e6)
        else:
            hang_part(rig, disk, 0, 2)
        fetch = rig.start(0, 0)
        await gate_up_landed(fetch)
        rig.fetcher.hold(fetch)
        rig.fetcher.hold(fetch)
        if ending == "is abandoned":
            rig.fetcher.abandon(fetch)
            assert (fetch.error, fetch.missing, rig.done) == (None, frozenset({2}), [])
        else:
            await outcome(fetch)
            assert rig.done == [fetch]
        assert fetch.done
        disk.let_return()
        await trio.sleep(1000)
        assert disk.in_flight == ()
        assert rig.pool.state(fetch.slot) is QUARANTINED
        rig.check_bytes(fetch, (0, 1))  # nobody else has got the memory
        rig.fetcher.let_go(fetch)
        assert rig.pool.state(fetch.slot) is QUARANTINED
        rig.fetcher.let_go(fetch)
        assert rig.pool.state(fetch.slot) is FREE
        with pytest.raises(RuntimeError, match="nobody holds"):
            rig.fetcher.let_go(fetch)
        rig.check_conservation()


async def test_letting_go_before_the_last_read_is_back_leaves_the_slot_to_it(autojump_clock: MockClock) -> None:
    async with open_rig(1, experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        hang_part(rig, disk, 0, 2)
        fetch = rig.start(0, 0)
        await gate_up_landed(fetch)
        rig.fetcher.hold(fetch)
        rig.fetcher.abandon(fetch)
        rig.fetcher.let_go(fetch)
        assert rig.pool.state(fetch.slot) is QUARANTINED
        disk.let_return()
        await wait_all_tasks_blocked()
        assert rig.pool.state(fetch.slot) is FREE


async def test_holding_changes_nothing_for_a_fetch_that_lands(autojump_clock: MockClock) -> None:
    async with open_rig(profile=DiskProfile(jitter=0, bytes_per_s=1e6)) as (rig, _):
        fetch = rig.start(0, 0)
        with pytest.raises(RuntimeError, match="the inner matrices of expert 0 of layer 0 have not landed"):
            rig.fetcher.hold(fetch)
        await gate_up_landed(fetch)
        rig.fetcher.hold(fetch)
        await landed(fetch)
        assert rig.pool.state(fetch.slot) is READY
        rig.fetcher.let_go(fetch)
        assert rig.pool.state(fetch.slot) is READY
        with pytest.raises(RuntimeError, match="not in flight"):
            rig.fetcher.hold(fetch)


def test_cancelling_whoever_holds_at_any_step_loses_no_slot() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_rig(1, experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
            break_part(rig, disk, 0, 2, times=4)

            async def body() -> None:
                fetch = rig.start(0, 0)
                held = False
                try:
                    await gate_up_landed(fetch)
                    rig.fetcher.hold(fetch)
                    held = True
                    await trio.sleep(0.1)  # a job, during which down fails
                    await outcome(fetch)
                finally:
                    if not fetch.done:
                        rig.fetcher.abandon(fetch)
                    if held:
                        rig.fetcher.let_go(fetch)

            await subject.run(body)
            await trio.sleep(1)
            assert rig.pool.statistics().free == 1
            disk.heal()
            await landed(rig.start(0, 0))
            rig.check_conservation()

    assert cancel_at_every_step(scenario) >= 3


# --- reads that hang ---


@pytest.mark.parametrize("deadline_s", [30.0, 2.5])
async def test_a_read_that_hangs_fails_its_fetch_at_the_deadline(autojump_clock: MockClock, deadline_s: float) -> None:
    async with open_rig(2, experts=big_experts(N_BYTES), profile=INSTANT, read_deadline_s=deadline_s) as (rig, disk):
        hang_part(rig, disk, 0, 1)
        await trio.sleep(7)
        fetch = rig.start(0, 0)
        began_s = trio.current_time()
        with pytest.raises(ReadTimeout, match=f"no answer for {deadline_s:.0f}|no answer for 2.50 s") as caught:
            await landed(fetch)
        assert trio.current_time() - began_s == pytest.approx(deadline_s, abs=1e-5)
        part = rig.part(0, 0, 1)
        assert (caught.value.offset, caught.value.n_bytes) == (part.offset, part.n_bytes)
        assert rig.done == [fetch]
        assert rig.pool.state(fetch.slot) is QUARANTINED
        copy = disk.statistics().copies[0]
        assert (copy.threads, copy.threads_written_off, disk.statistics().written_off) == (5, 1, 1)
        await trio.sleep(1000)
        assert rig.pool.state(fetch.slot) is QUARANTINED
        again = rig.start(0, 0)
        await landed(again)
        rig.check_bytes(again)
        disk.let_return()
        await wait_all_tasks_blocked()
        assert rig.pool.state(fetch.slot) is FREE
        rig.check_bytes(again)
        s = rig.fetcher.statistics()
        assert (s.deadline_failures, s.failed, s.landed, s.reads_in_flight) == (1, 1, 1, 0)
        assert s.bytes_read == disk.statistics().bytes_read == 6 * N_BYTES
        rig.check_conservation()


@pytest.mark.parametrize("returns", [True, False])
async def test_while_the_process_was_stopped_nothing_was_hanging(mock_clock: MockClock, returns: bool) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        hang_part(rig, disk, 0, 1)
        fetch = rig.start(0, 0)
        await wait_all_tasks_blocked()
        mock_clock.jump(100)
        await wait_all_tasks_blocked()
        assert not fetch.done
        if returns:
            disk.let_return()
            await wait_all_tasks_blocked()
            await landed(fetch)
            rig.check_bytes(fetch)
        for _ in range(28):
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
        assert fetch.error is None
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert isinstance(fetch.error, ReadTimeout) is not returns
        disk.let_return()


async def test_stops_do_not_count_wherever_they_fall(mock_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        hang_part(rig, disk, 0, 1)
        fetch = rig.start(0, 0)
        await wait_all_tasks_blocked()
        for seconds in (1, 1, 26, 1, 1, 40, 1):  # the first stop ends before the deadline, the second behind it
            mock_clock.jump(seconds)
            await wait_all_tasks_blocked()
        assert fetch.error is None
        for _ in range(23):
            assert fetch.error is None
            mock_clock.jump(1)
            await wait_all_tasks_blocked()
        with pytest.raises(ReadTimeout, match=r"no answer for 30\.00 s"):
            await landed(fetch)
        disk.let_return()


async def test_waiting_behind_other_reads_is_not_hanging(autojump_clock: MockClock) -> None:
    slow = DiskProfile(latency_s=0, jitter=0, bytes_per_s=N_BYTES / 25)  # 25 s for one matrix, 75 s for an expert
    async with open_rig(experts=big_experts(N_BYTES), profile=slow, n_threads=1) as (rig, disk):
        fetches = [rig.start(0, expert) for expert in range(4)]
        for fetch in fetches:
            await landed(fetch)
            rig.check_bytes(fetch)
        assert rig.fetcher.statistics().deadline_failures == 0
        assert disk.statistics().written_off == 0


async def test_a_read_of_many_chunks_is_not_hanging_while_they_come(autojump_clock: MockClock) -> None:
    slow = DiskProfile(latency_s=0, jitter=0, bytes_per_s=4096 / 25)
    async with open_rig(experts=big_experts(N_BYTES), profile=slow, n_threads=1, chunk_bytes=4096) as (rig, disk):
        fetch = rig.start(0, 0)
        await trio.sleep(6 * 25 + 1)  # one chunk of up has been read
        assert fetch.missing == {1, 2}
        disk.hang(0, 0, 3 * N_BYTES)
        began_s = trio.current_time() - 1 + 25  # when the third chunk begins
        with pytest.raises(ReadTimeout):
            await landed(fetch)
        assert trio.current_time() - began_s == pytest.approx(30, abs=1e-5)


async def test_each_hanging_read_has_its_own_deadline(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT, n_threads=2) as (rig, disk):
        for expert in range(4):
            hang_part(rig, disk, expert, 0)
        began_s = trio.current_time()
        fetches = []
        for expert, delay_s in enumerate((0, 11, 0, 0)):
            await trio.sleep(delay_s)
            fetches.append(rig.start(0, expert))  # the third waits for the threads of the first and the second
        for fetch, due_s in zip(fetches, (30, 41, 60, 71), strict=True):
            assert isinstance(await outcome(fetch), ReadTimeout)
            assert trio.current_time() - began_s == pytest.approx(due_s, abs=1e-4)
        assert rig.fetcher.statistics().deadline_failures == 4
        last = rig.start(0, 5)  # all threads hang, and so do all that replaced them
        assert "every thread hangs" in (await outcome(last)).reason
        disk.let_return()
        await trio.sleep(1)
        assert rig.pool.statistics().quarantined == 0
        assert disk.statistics().copies[0].threads == 2
        rig.check_conservation()


async def test_a_hanging_read_of_an_abandoned_fetch_gives_its_thread_back(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(N_BYTES), profile=INSTANT, n_threads=1) as (rig, disk):
        hang_part(rig, disk, 0, 0)
        fetch = rig.start(0, 0)
        rig.fetcher.abandon(fetch)
        waiting = rig.start(0, 1)
        began_s = trio.current_time()
        await landed(waiting)
        assert trio.current_time() - began_s == pytest.approx(30, abs=1e-4)
        assert rig.fetcher.statistics().deadline_failures == 0
        assert rig.pool.state(fetch.slot) is QUARANTINED


# --- files that are left alone ---


async def fail_fetches(rig: Rig, expert: int, n: int) -> None:
    for _ in range(n):
        await outcome(rig.start(0, expert))


async def test_a_file_that_keeps_failing_is_left_alone_and_then_probed(autojump_clock: MockClock) -> None:
    async with open_rig(3, experts=big_experts(N_BYTES), profile=INSTANT) as (rig, disk):
        disk.fail(1, 0, 3 * N_BYTES, number=errno.ENODEV)
        await fail_fetches(rig, 1, 4)
        assert rig.fetcher.refusal(0, 1) is None
        await fail_fetches(rig, 1, 1)
        slot = lease(rig.pool)
        assert slot is not None
        for cool_down_s in (1, 2, 4, 8, 16, 32, 60, 60):
            refusal = rig.fetcher.refusal(0, 1)
            assert refusal is not None
            with pytest.raises(
                FileSuspended, match="fetches in a row failed with this file; it is tried again in"
            ) as e:
                rig.fetcher.start(0, 1, slot)
            assert str(e.value) == str(refusal)
            assert str(e.value.path) == "sim-1"
            assert e.value.next_try_s == pytest.approx(cool_down_s)
            assert rig.pool.state(slot) is FILLING
            good = rig.start(0, 0)  # another file
            await landed(good)
            rig.pool.release(good.slot)
            await trio.sleep(cool_down_s - 1e-3)
            assert rig.fetcher.refusal(0, 1) is not None
            await trio.sleep(1e-3)
            disk.freeze()
            probe = rig.start(0, 1)
            assert rig.fetcher.refusal(0, 1) is not None  # one at a time
            disk.thaw()
            await outcome(probe)
        s = rig.fetcher.statistics()
        assert (s.breaker_openings, s.refused, s.files[1].closed, s.files[0].closed) == (9, 8, False, True)
        assert s.files[1].failures_in_a_row == 13
        disk.heal()
        await trio.sleep(60)
        probe = rig.start(0, 1)
        await landed(probe)
        rig.pool.release(probe.slot)
        s = rig.fetcher.statistics()
        assert (s.files[1].closed, s.files[1].failures_in_a_row) == (True, 0)
        rig.check_conservation()


async def test_any_file_of_an_expert_can_be_left_alone(autojump_clock: MockClock) -> None:
    """In a split model each matrix may lie in a file of its own."""
    parts = [ExpertPart(name, GGMLType.Q4_0, 16, 1, file, 0, N_BYTES) for file, name in enumerate(PROJECTIONS)]
    experts = ExpertMap(((ExpertExtents(0, 0, tuple(parts)),),))
    for bad in range(3):
        async with open_rig(1, experts=(experts, [N_BYTES] * 3), profile=INSTANT) as (rig, disk):
            disk.fail(bad, 0, N_BYTES, number=errno.ENODEV)
            await fail_fetches(rig, 0, 5)
            refusal = rig.fetcher.refusal(0, 0)
            assert refusal is not None
            assert str(refusal.path) == f"sim-{bad}"


@pytest.mark.parametrize("ending", ["abandoned", "failed elsewhere"])
async def test_a_probe_that_finds_nothing_out_makes_room_for_another(autojump_clock: MockClock, ending: str) -> None:
    experts, sizes = big_experts(N_BYTES)
    async with open_rig(3, experts=(experts, sizes), profile=INSTANT) as (rig, disk):
        disk.fail(1, 0, 3 * N_BYTES, number=errno.ENODEV)
        await fail_fetches(rig, 1, 5)
        disk.heal()
        await trio.sleep(1)
        disk.freeze()
        probe = rig.start(0, 1)
        assert rig.fetcher.refusal(0, 1) is not None
        if ending == "abandoned":
            rig.fetcher.abandon(probe)
        else:
            rig.fetcher._fail(probe, 0, ReadError("sim-0", 0, 1, "of another file"))
        assert rig.fetcher.refusal(0, 1) is None
        disk.thaw()
        await landed(rig.start(0, 1))


async def test_reads_that_land_in_between_keep_a_file_in_use(autojump_clock: MockClock) -> None:
    async with open_rig(3, experts=big_experts(N_BYTES), profile=DiskProfile(jitter=0), n_threads=1) as (rig, disk):
        break_part(rig, disk, 1, 2, number=errno.ENODEV)
        await fail_fetches(rig, 1, 20)  # gate and up land every time
        assert rig.fetcher.statistics().files[1].closed


# --- reads of dense weights ---


async def test_extents_are_tried_again_too(autojump_clock: MockClock) -> None:
    async with open_sim_disk([100_000], profile=INSTANT) as disk:
        disk.fail(0, 5000, 5001, times=3)
        began_s = trio.current_time()
        assert (await read_extent(disk, 0, 5, 90_000) == content(0, 0, 5, 90_000)).all()
        assert trio.current_time() - began_s == pytest.approx(0.065)
        disk.fail(0, 5000, 5001, times=4)
        with pytest.raises(ReadError, match="failed 4 times") as caught:
            await read_extent(disk, 0, 5, 90_000)
        assert (caught.value.tries, caught.value.errno) == (4, errno.EIO)
        disk.fail(0, 5000, 5001, number=errno.ENODEV, times=1)
        with pytest.raises(ReadError) as caught:
            await read_extent(disk, 0, 5, 90_000)
        assert caught.value.tries == 1
        disk.fail(0, 5000, 5001)
        pending = start_extent(disk, 0, 5, 90_000)
        await trio.sleep(1)  # nobody waits: nothing is tried again
        assert disk.in_flight == ()
        disk.close()
        with pytest.raises(EngineClosed):
            await pending.wait()
