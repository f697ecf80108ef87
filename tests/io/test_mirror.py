"""Mirrors: what is compared when they are opened, who reads how much, and drives that fail or fall behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.errors import ConfigError, MirrorMismatch, ReadError
from mer.io.files import ModelFile
from mer.io.mirror import BLOCK_BYTES, HEADER_BYTES, N_BLOCKS, sample, verify_mirror
from mer.io.reader import ReadOperation
from mer.io.thread_reader import ThreadReader
from mer.testing.simdisk import DiskProfile, SimDisk, content, open_sim_disk
from tests._lib.extents import read_extent
from tests.io.lab import Landings, assert_right

MIB = 1 << 20


# --- verification ---


@settings(deadline=None)
@given(st.integers(1, 300 << 30))
def test_the_sample_has_the_header_the_end_and_a_block_of_every_stretch(n_bytes: int) -> None:
    starts = sample(n_bytes)
    assert starts == sorted(set(starts))
    assert starts == sample(n_bytes)
    assert all(start % BLOCK_BYTES == 0 and start < n_bytes for start in starts)
    assert len(starts) <= HEADER_BYTES // BLOCK_BYTES + N_BLOCKS + 1
    assert set(range(0, min(n_bytes, HEADER_BYTES), BLOCK_BYTES)) <= set(starts)
    assert starts[-1] + BLOCK_BYTES >= n_bytes
    stretch = n_bytes / N_BLOCKS
    if stretch > 4 * BLOCK_BYTES:
        for number in range(N_BLOCKS):
            begin, end = number * stretch - BLOCK_BYTES, (number + 1) * stretch + BLOCK_BYTES
            assert any(begin <= start < end for start in starts)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    size = 40 * MIB + 5
    original, copy = tmp_path / "original", tmp_path / "copy"
    with original.open("wb") as file:
        file.truncate(size)
    shutil.copy(original, copy)
    return original, copy


def verify(original: Path, copy: Path) -> None:
    left, right = ModelFile(original), ModelFile(copy)
    try:
        verify_mirror(left, right)
    finally:
        left.close()
        right.close()


def test_an_identical_copy_is_accepted(pair: tuple[Path, Path]) -> None:
    verify(*pair)


@pytest.mark.parametrize("at", [0, 5 * MIB + 17, 16 * MIB - 1, "block", "end"])
def test_the_first_difference_is_named(pair: tuple[Path, Path], at: int | str) -> None:
    size = pair[0].stat().st_size
    blocks = [start for start in sample(size) if start > HEADER_BYTES]
    offset = {"block": blocks[3] + 1234, "end": size - 1}.get(str(at), at)
    assert isinstance(offset, int)
    for bad in {offset, size - 1}:
        with pair[1].open("r+b") as file:
            file.seek(bad)
            file.write(b"x")
    with pytest.raises(MirrorMismatch, match=f"copy at byte {offset}: it differs from .*original") as caught:
        verify(*pair)
    assert (caught.value.path, caught.value.offset) == (pair[1], offset)


def test_another_size_is_refused(pair: tuple[Path, Path]) -> None:
    size = pair[0].stat().st_size
    os.truncate(pair[1], size - 7)
    with pytest.raises(MirrorMismatch, match=f"it has {size - 7} bytes, .*original has {size}") as caught:
        verify(*pair)
    assert caught.value.offset == size - 7


def test_the_file_itself_is_no_mirror(pair: tuple[Path, Path]) -> None:
    link = pair[0].with_name("link")
    os.link(pair[0], link)
    with pytest.raises(ConfigError, match=r"link is the file .*original itself"):
        verify(pair[0], link)


async def test_a_reader_refuses_a_bad_mirror_and_leaves_nothing_open(pair: tuple[Path, Path]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    good = pair[0].with_name("good")
    shutil.copy(pair[0], good)
    with pair[1].open("r+b") as file:
        file.write(b"x")
    with pytest.raises(MirrorMismatch):
        ThreadReader([pair[0]], mirrors=[[good], [pair[1]]]).__enter__()
    with pytest.raises(ReadError, match="No such file"):
        ThreadReader([pair[0]], mirrors=[[good], [pair[0].with_name("missing")]]).__enter__()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_split_file_is_read_from_all_drives(tmp_path: Path) -> None:
    sizes = [300_000, 200_000]
    rows = [[tmp_path / f"{copy}-{number}" for number in range(2)] for copy in range(3)]
    for row in rows:
        for number, path in enumerate(row):
            content(0, number, 0, sizes[number]).tofile(path)
    with ThreadReader(rows[0], mirrors=rows[1:], n_threads=2, chunk_bytes=4096) as reader:
        for _ in range(5):
            for number, size in enumerate(sizes):
                assert (await read_extent(reader, number, 1, size - 1) == content(0, number, 1, size - 1)).all()
        s = reader.statistics()
        assert [copy.paths for copy in s.copies] == [tuple(map(str, row)) for row in rows]
        assert sum(copy.bytes_read for copy in s.copies) == s.bytes_read
        assert all(copy.modes == reader.modes for copy in s.copies)
        assert [copy.threads for copy in s.copies] == [2, 2, 2]


# --- shares, on the virtual clock ---

CHUNK = 1 << 15
SIZE = 1 << 40


def profile(bytes_per_s: float, latency_s: float = 0.0) -> DiskProfile:
    return DiskProfile(latency_s=latency_s, jitter=0, bytes_per_s=bytes_per_s)


async def read_many(disk: SimDisk, landings: Landings, n: int, n_bytes: int, depth: int) -> float:
    """Read so many operations, a number of them at a time, and return the seconds that took."""
    began_s = trio.current_time()
    reads: list[ReadOperation] = []
    for number in range(n):
        if number >= depth:
            await landings.wait(reads[number - depth])
        reads.append(landings.operation(number * n_bytes, n_bytes))
        disk.start(reads[-1])
    await landings.wait(*reads)
    for read in reads:
        assert_right(read)
    return trio.current_time() - began_s


@pytest.mark.parametrize(("ours", "theirs"), [(3e8, 3e8), (3e8, 1e8), (1e8, 3e8), (3e8, 0.3e8)])
async def test_shares_follow_the_rates(autojump_clock: MockClock, ours: float, theirs: float) -> None:
    async with open_sim_disk([SIZE], profile=profile(ours), mirrors=[profile(theirs)], chunk_bytes=CHUNK) as disk:
        n, n_bytes = 60, 8 * CHUNK
        took_s = await read_many(disk, Landings(), n, n_bytes, depth=6)
        first, second = disk.statistics().copies
        assert first.bytes_read + second.bytes_read == n * n_bytes
        assert first.bytes_read / (n * n_bytes) == pytest.approx(ours / (ours + theirs), abs=0.04)
        assert took_s == pytest.approx(n * n_bytes / (ours + theirs), rel=0.1)
        assert first.bytes_per_s == pytest.approx(ours, rel=0.1)
        assert second.bytes_per_s == pytest.approx(theirs, rel=0.1)


async def test_a_slow_drive_leaves_the_last_chunks_to_the_others(autojump_clock: MockClock) -> None:
    fast, slow = profile(2e8), profile(2e5)
    async with open_sim_disk([SIZE], profile=fast, mirrors=[slow], chunk_bytes=CHUNK) as disk:
        landings = Landings()
        await read_many(disk, landings, 1, 40 * CHUNK, 1)  # the rates are not known yet: one slow chunk holds it up
        measured = disk.statistics().copies[1].reads
        assert measured == 4
        for _ in range(10):
            took_s = await read_many(disk, landings, 1, 8 * CHUNK, 1)
            assert took_s == pytest.approx(8 * CHUNK / 2e8, rel=0.01)
        assert disk.statistics().copies[1].reads == measured
        await trio.sleep(11)  # what was measured is forgotten
        await read_many(disk, landings, 1, 8 * CHUNK, 1)
        assert disk.statistics().copies[1].reads > measured


@pytest.mark.parametrize("n_waiting", [1, 3])
async def test_a_slow_drive_steps_in_when_the_fast_one_hangs(autojump_clock: MockClock, n_waiting: int) -> None:
    fast, slow = profile(2e8), profile(2e7)
    async with open_sim_disk([SIZE], profile=fast, mirrors=[slow], chunk_bytes=CHUNK, n_threads=2) as disk:
        landings = Landings()
        await read_many(disk, landings, 4, 8 * CHUNK, 2)
        before = disk.statistics().copies[1].reads
        disk.hang(0, 0, SIZE, copy=0)
        stuck = [landings.operation(at * CHUNK, CHUNK) for at in (100, 200)]
        for read in stuck:
            disk.start(read)
        waiting = [landings.operation((300 + i) * CHUNK, CHUNK) for i in range(n_waiting)]
        for read in waiting:
            disk.start(read)
        with trio.fail_after(0.1):
            await landings.wait(*waiting)
        assert disk.statistics().copies[1].reads == before + n_waiting
        disk.let_return()
        await landings.wait(*stuck)


async def test_a_drive_that_fails_is_left_out_probed_and_taken_back(autojump_clock: MockClock) -> None:
    drive = profile(1e9)
    async with open_sim_disk([SIZE], profile=drive, mirrors=[drive], chunk_bytes=CHUNK, n_threads=1) as disk:
        landings = Landings()
        disk.fail(0, 0, SIZE, copy=1)
        await read_many(disk, landings, 10, 4 * CHUNK, 2)
        good, bad = disk.statistics().copies
        assert (good.in_force, bad.in_force, bad.failures, bad.bytes_read) == (True, False, 3, 0)
        assert 1.9 < bad.next_try_s <= 2.0
        for cool_down_s in (2, 4, 8, 16, 32, 60, 60):
            left_out = disk.statistics().copies[1].failures
            await trio.sleep(disk.statistics().copies[1].next_try_s - 1e-3)
            await read_many(disk, landings, 1, CHUNK // 2, 1)
            assert disk.statistics().copies[1].failures == left_out
            await trio.sleep(1e-3)
            await read_many(disk, landings, 10, 4 * CHUNK, 2)
            bad = disk.statistics().copies[1]
            assert bad.failures == left_out + 1  # one probe
            assert bad.next_try_s == pytest.approx(min(2 * cool_down_s, 60), abs=0.1)
        disk.heal()
        await trio.sleep(60)
        await read_many(disk, landings, 10, 4 * CHUNK, 2)
        bad = disk.statistics().copies[1]
        assert (bad.in_force, bad.next_try_s) == (True, 0)
        assert bad.bytes_read > 10 * CHUNK


async def test_a_drive_that_is_left_out_reads_what_no_other_can(autojump_clock: MockClock) -> None:
    drive = profile(1e9)
    async with open_sim_disk([SIZE], profile=drive, mirrors=[drive], chunk_bytes=CHUNK, n_threads=1) as disk:
        landings = Landings()
        disk.fail(0, 0, 100 * CHUNK, copy=1)
        await read_many(disk, landings, 10, 4 * CHUNK, 2)
        assert not disk.statistics().copies[1].in_force
        disk.fail(0, 500 * CHUNK, 501 * CHUNK, copy=0)
        rescued = landings.operation(500 * CHUNK, CHUNK)
        disk.start(rescued)
        with trio.fail_after(0.01):  # not only after the cool-down
            await landings.wait(rescued)
        assert_right(rescued)


async def test_a_drive_whose_threads_all_hang_is_counted_out(autojump_clock: MockClock) -> None:
    drive = profile(1e9)
    async with open_sim_disk([SIZE], profile=drive, mirrors=[drive], chunk_bytes=CHUNK, n_threads=1) as disk:
        landings = Landings()
        disk.hang(0, 0, SIZE, copy=1)
        disk.fail(0, 0, CHUNK, copy=0)
        disk.fail(0, 77 * CHUNK, 78 * CHUNK, copy=0)
        stuck = [landings.operation(0, CHUNK), landings.operation(0, CHUNK)]  # the mirror alone could read them
        for number, read in enumerate(stuck):
            disk.start(read)
            await trio.sleep(100)
            if number == 1:  # meanwhile another chunk comes to wait for the mirror's last thread
                disk.start(lost := landings.operation(77 * CHUNK, CHUNK))
                await trio.sleep(1)
                assert landings.seen == []
            disk.write_off(read)
            bad = disk.statistics().copies[1]
            assert (bad.threads, bad.threads_written_off, bad.in_force) == (2, number + 1, False)
        await landings.wait(lost)
        assert lost.error is not None
        assert lost.error.errno == errno.EIO
        assert landings.seen == [lost]
        again = landings.operation(77 * CHUNK, CHUNK)
        disk.start(again)
        await landings.wait(again)
        assert again.error is not None
        disk.heal()
        await read_many(disk, landings, 3, 8 * CHUNK, 2)
        disk.let_return()
        await landings.wait(*stuck)
        for read in stuck:
            assert_right(read)
        assert disk.statistics().copies[1].threads == 1
        await trio.sleep(4)  # its cool-down
        await read_many(disk, landings, 10, 8 * CHUNK, 2)
        assert disk.statistics().copies[1].bytes_read > 0
