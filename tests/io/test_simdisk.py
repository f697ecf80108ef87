"""What the simulated disk does beyond the Reader protocol: bytes, clock, faults, and that a seed repeats them."""

from __future__ import annotations

import errno

import attrs
import numpy as np
import pytest
import trio
from trio.testing import MockClock

from mer.errors import ReadError
from mer.testing.simdisk import DiskProfile, content, open_sim_disk
from tests.io.lab import Landings, assert_right

SIZE = 1 << 20
PAGE = 4096


def test_content_is_a_function_of_the_position() -> None:
    whole = content(0, 1, 0, 1000)
    for offset in (0, 1, 7, 8, 9, 500):
        for n_bytes in (0, 1, 8, 100):
            assert (content(0, 1, offset, n_bytes) == whole[offset : offset + n_bytes]).all()
    assert np.mean(whole == content(0, 0, 0, 1000)) < 0.05
    assert np.mean(whole == content(1, 1, 0, 1000)) < 0.05


async def run_some(
    profile: DiskProfile, n: int = 40, seed: int = 1
) -> list[tuple[int, float, ReadError | None, bytes]]:
    """Read many pages at once, and return which landed when, and with what, in the order of the landings."""
    async with open_sim_disk([SIZE], profile=profile, seed=seed) as disk:
        landings = Landings()
        landed_s: list[float] = []
        reads = [landings.operation(number * PAGE, PAGE) for number in range(n)]
        began_s = trio.current_time()
        for read in reads:
            disk.start(read)
        for number in range(n):
            while len(landings.seen) <= number:
                await landings._changed.wait()
            landed_s.append(trio.current_time() - began_s)
        return [
            (read.start, at, read.error, read.buffer.tobytes())
            for read, at in zip(landings.seen, landed_s, strict=True)
        ]


def plain(result: list[tuple[int, float, ReadError | None, bytes]]) -> list[tuple[int, float, str, bytes]]:
    return [(start, at, str(error), data) for start, at, error, data in result]


async def test_a_seed_repeats_everything(autojump_clock: MockClock) -> None:
    bad = DiskProfile(jitter=5, stall_rate=0.1, error_rate=0.2, error_numbers=(5, 11, 110), flip_rate=0.3)
    first, again, other = [plain(await run_some(bad, seed=seed)) for seed in (1, 1, 2)]
    assert [entry[0] for entry in first] == [entry[0] for entry in again]
    assert [entry[1] for entry in first] == pytest.approx([entry[1] for entry in again])
    assert [entry[2:] for entry in first] == [entry[2:] for entry in again]
    assert [entry[0] for entry in first] != [entry[0] for entry in other]


async def test_reads_overtake_each_other_with_jitter_and_not_without(autojump_clock: MockClock) -> None:
    smooth = [start for start, *_ in await run_some(DiskProfile(jitter=0))]
    rough = [start for start, *_ in await run_some(DiskProfile(jitter=20))]
    assert smooth == sorted(smooth)
    assert rough != smooth
    assert sorted(rough) == smooth


async def test_stalls_take_500_times_the_latency(autojump_clock: MockClock) -> None:
    profile = DiskProfile(latency_s=1e-3, jitter=0, bytes_per_s=float("inf"), stall_rate=0.2)
    waits = sorted(at for _, at, _, _ in await run_some(profile, n=4))
    assert set(np.round(waits, 6)) <= {1e-3, 0.5}
    assert (await run_some(attrs.evolve(profile, stall_rate=1.0), n=4))[-1][1] == pytest.approx(0.5)


async def test_random_errors_have_the_numbers_that_were_asked_for(autojump_clock: MockClock) -> None:
    profile = DiskProfile(error_rate=0.5, error_numbers=(errno.EIO, errno.EAGAIN, errno.ESTALE))
    numbers = [error.errno for _, _, error, _ in await run_some(profile) if error is not None]
    assert set(numbers) == {errno.EIO, errno.EAGAIN, errno.ESTALE}
    assert 8 < len(numbers) < 32


async def test_a_flipped_bit_is_one_bit(autojump_clock: MockClock) -> None:
    for start, _, error, data in await run_some(DiskProfile(flip_rate=1.0)):
        assert error is None
        wrong = np.frombuffer(data, np.uint8) ^ content(1, 0, start, PAGE)
        assert np.bitwise_count(wrong).sum() == 1


async def test_a_byte_range_can_fail_hang_and_heal_on_one_copy_or_all(autojump_clock: MockClock) -> None:
    async with open_sim_disk([SIZE, SIZE], n_threads=1) as disk:
        landings = Landings()
        disk.fail(0, PAGE, 2 * PAGE, number=errno.ENODEV, times=2)
        disk.hang(1, 0, 1, times=1)
        for expected in (errno.ENODEV, errno.ENODEV, None):
            disk.start(read := landings.operation(PAGE + 5, 10))
            await landings.wait(read)
            assert (read.error.errno if read.error else None) == expected
        disk.start(beside := landings.operation(2 * PAGE, 10))
        await landings.wait(beside)
        assert_right(beside)
        disk.start(stuck := landings.operation(0, 10, file=1))
        await trio.sleep(50_000)
        assert landings.seen[-1] is beside
        assert disk.in_flight == (stuck,)
        assert disk.stalled_s(stuck) == pytest.approx(50_000)
        disk.let_return()
        await landings.wait(stuck)
        assert_right(stuck)
        disk.fail(0, 0, SIZE)
        disk.heal()
        disk.start(read := landings.operation(0, 100))
        await landings.wait(read)
        assert_right(read)


async def test_a_frozen_disk_ends_nothing_and_overlapping_memory_is_refused(autojump_clock: MockClock) -> None:
    async with open_sim_disk([SIZE]) as disk:
        landings = Landings()
        disk.freeze()
        read = landings.operation(0, 2 * PAGE)
        disk.start(read)
        assert (read.buffer != content(0, 0, 0, 2 * PAGE)).all()  # scribbled over
        twin = landings.operation(0, PAGE)
        twin.buffer = read.buffer[PAGE:]
        with pytest.raises(AssertionError, match="share memory"):
            disk.start(twin)
        await trio.sleep(1000)
        assert landings.seen == []
        disk.thaw()
        await landings.wait(read)
        assert_right(read)
