"""What only the reader made of threads does: changing files, faults of the system, threads that hang, and closing."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import mmap
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import trio

from mer.errors import ConfigError, EngineClosed, FileChanged, ReadError
from mer.io.identity import FileIdentity
from mer.io.pool import Priority
from mer.io.reader import ReadOperation
from mer.io.thread_reader import ThreadReader
from mer.testing.simdisk import content
from tests._lib.extents import read_extent
from tests.io.lab import Landings, assert_right, operation, refuse_direct, thread_lab, write_files

SIZE = 300_000

Preadv: TypeAlias = Callable[[int, list[Any], int], int]
real_preadv: Preadv = os.preadv


def patch_preadv(monkeypatch: pytest.MonkeyPatch, fake: Preadv) -> None:
    monkeypatch.setattr(os, "preadv", fake)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def io_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mer-io-")]


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _nothing_left_of_other_tests() -> None:
    join(io_threads())  # a closed reader's threads end, and close their files, in their own time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_files(tmp_path, [SIZE])[0]


# --- files that change ---


async def test_truncated_while_open(path: Path) -> None:
    with ThreadReader([path]) as reader:
        os.truncate(path, 100_000)
        with pytest.raises(ReadError, match=r"truncated.*its size went from 300000 to 100000 bytes") as caught:
            await read_extent(reader, 0, 99_000, 2000)
        assert caught.value.path == path
        assert (await read_extent(reader, 0, 50_000, 50_000) == content(0, 0, 50_000, 50_000)).all()


async def test_replaced_by_name_goes_on_as_it_was_and_says_so_when_it_fails(path: Path) -> None:
    with ThreadReader([path]) as reader:
        other = path.with_name("other")
        other.write_bytes(bytes(10))
        with path.open("r+b") as old:
            os.replace(other, path)
            assert (await read_extent(reader, 0, 1, SIZE - 1) == content(0, 0, 1, SIZE - 1)).all()
            old.truncate(4096)
        with pytest.raises(ReadError, match=r"its size went from .* and its name now leads to another file"):
            await read_extent(reader, 0, 4096, 1)


async def test_deleted(path: Path) -> None:
    with ThreadReader([path]) as reader:
        os.unlink(path)
        assert (await read_extent(reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
        with pytest.raises(ReadError, match=r"truncated.*its name is gone"):
            await read_extent(reader, 0, SIZE, 1)


async def test_written_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadReader([path]) as reader:
        os.utime(path, (1, 1))
        with pytest.raises(ReadError, match="it was written to"):
            await read_extent(reader, 0, SIZE, 1)


async def test_appended_to_is_no_error(path: Path) -> None:
    with ThreadReader([path]) as reader:
        with path.open("ab") as file:
            file.write(bytes(10_000))
        assert (await read_extent(reader, 0, 290_000, 10_000) == content(0, 0, 290_000, 10_000)).all()


# --- faults of the system ---


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "limits",
    [[1], [4095], [512], [4096], [10_000], [1, 1, 1], [8192, 1, 4096, 100]],
    ids=str,
)
async def test_short_reads_go_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, direct: bool, limits: list[int]
) -> None:
    if not direct:
        refuse_direct(monkeypatch)
    with ThreadReader([path], chunk_bytes=65536) as reader:
        assert reader.modes[0].direct is direct
        left = {begin: deque(limits) for begin in range(0, SIZE, 65536)}  # every chunk meets each limit once

        def fake(fd: int, buffers: list[Any], offset: int) -> int:
            assert not direct or (offset % 4096 == 0 and np.frombuffer(buffers[0], np.uint8).ctypes.data % 4096 == 0)
            queue = left[offset // 65536 * 65536]
            n = min(queue.popleft(), len(buffers[0])) if queue else len(buffers[0])
            scratch = bytearray(-(-n // 4096) * 4096)
            got = os.pread(plain, len(scratch), offset)[:n]
            buffers[0][: len(got)] = got
            return len(got)

        plain = os.open(path, os.O_RDONLY)
        patch_preadv(monkeypatch, fake)
        got = await read_extent(reader, 0, 7, SIZE - 7)
        os.close(plain)
    assert (got == content(0, 0, 7, SIZE - 7)).all()
    assert not any(left.values())


@pytest.mark.parametrize("most", [512, 1536, 5000])
@pytest.mark.parametrize("refuses_sectors", [False, True])
async def test_a_drive_may_give_little_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, most: int, *, refuses_sectors: bool
) -> None:
    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        assert offset % 512 == 0
        if refuses_sectors and offset % 4096:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        got = os.pread(plain, min(most, len(buffers[0])), offset)
        buffers[0][: len(got)] = got
        return len(got)

    plain = os.open(path, os.O_RDONLY)
    with ThreadReader([path], chunk_bytes=65536) as reader:
        patch_preadv(monkeypatch, fake)
        if refuses_sectors and most < 4096:
            with pytest.raises(ReadError, match="reads in a row brought nothing"):
                await read_extent(reader, 0, 7, SIZE - 7)
        else:
            assert (await read_extent(reader, 0, 7, SIZE - 7) == content(0, 0, 7, SIZE - 7)).all()
    os.close(plain)


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.EINTR, errno.EINVAL, errno.ESTALE])
async def test_an_error_is_reported_at_once_with_its_place(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    offsets: list[int] = []

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        offsets.append(offset)
        if offset == 65536:
            raise OSError(number, os.strerror(number))
        return real_preadv(fd, buffers, offset)

    with ThreadReader([path], chunk_bytes=65536) as reader:
        patch_preadv(monkeypatch, fake)
        landings = Landings()
        failed = landings.operation(7, SIZE - 7)
        reader.start(failed)
        await landings.wait(failed)
        assert failed.error is not None
        assert (failed.error.errno, failed.error.offset, failed.error.path) == (number, 65536, path)
        assert os.strerror(number) in failed.error.reason
        assert offsets.count(65536) == 1  # trying again is for those who can wait
        assert (await read_extent(reader, 0, 7, 100) == content(0, 0, 7, 100)).all()


async def test_reads_that_bring_nothing_end_in_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        return 1

    with ThreadReader([path]) as reader:
        patch_preadv(monkeypatch, fake)
        with pytest.raises(ReadError, match="reads in a row brought nothing"):
            await read_extent(reader, 0, 0, 100)


async def test_memory_error_in_a_thread_ends_the_operation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        raise MemoryError

    with ThreadReader([path]) as reader:
        patch_preadv(monkeypatch, fake)
        with pytest.raises(ReadError, match="MemoryError"):
            await read_extent(reader, 0, 0, 100)


async def test_a_failed_chunk_spares_the_rest_of_its_operation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        offsets.append(offset)
        raise OSError(errno.ESTALE, "broken")

    with ThreadReader([path], chunk_bytes=4096, n_threads=1) as reader:
        patch_preadv(monkeypatch, fake)
        with pytest.raises(ReadError, match="broken"):
            await read_extent(reader, 0, 0, SIZE)
    assert offsets == [0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
async def test_a_direct_probe_that_fails_leads_to_buffered_reads_and_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    before = open_fds()
    patch_preadv(monkeypatch, fake)
    with caplog.at_level(logging.WARNING, "mer"), ThreadReader([path]) as reader:
        patch_preadv(monkeypatch, real_preadv)
        assert not reader.modes[0].direct
        assert os.strerror(number) in reader.modes[0].reason
        assert (await read_extent(reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
        assert open_fds() == before + 1
    assert [record.name for record in caplog.records] == ["mer.io.files"]
    assert str(path) in caplog.text


def cached_pages(fd: int) -> int:
    """Return how many pages of a file are in the page cache, mincore(2)."""
    with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as memory:
        flags = np.zeros(-(-SIZE // mmap.PAGESIZE), dtype=np.uint8)
        address = np.frombuffer(memory, np.uint8).ctypes.data
        assert (
            ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.c_void_p(address), ctypes.c_size_t(SIZE), ctypes.c_void_p(flags.ctypes.data)
            )
            == 0
        ), os.strerror(ctypes.get_errno())
    return int((flags & 1).sum())


@pytest.mark.parametrize("direct", [True, False])
async def test_the_page_cache_stays_empty(path: Path, monkeypatch: pytest.MonkeyPatch, *, direct: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(fd):
        pytest.skip("this filesystem lives in the page cache")
    if not direct:
        refuse_direct(monkeypatch)
    with ThreadReader([path]) as reader:
        await read_extent(reader, 0, 0, SIZE)
    assert cached_pages(fd) == 0
    os.pread(fd, 4096, 0)
    assert cached_pages(fd) > 0
    os.close(fd)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
async def test_tmpfs() -> None:
    shm = Path("/dev/shm") / f"mer-test-{os.getpid()}"
    try:
        content(0, 0, 0, SIZE).tofile(shm)
        with ThreadReader([shm], chunk_bytes=16384) as reader:
            assert (await read_extent(reader, 0, 12_345, SIZE - 12_345) == content(0, 0, 12_345, SIZE - 12_345)).all()
    finally:
        shm.unlink(missing_ok=True)


# --- order and threads ---


async def test_chunks_are_read_in_the_order_of_the_starts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: list[int] = []

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        offsets.append(offset)
        return real_preadv(fd, buffers, offset)

    landed = trio.Event()
    order: list[int] = []
    starts = [204_800, 0, 102_400]

    def on_landed(item: ReadOperation) -> None:
        order.append(item.start)
        if len(order) == 3:
            landed.set()

    with ThreadReader([path], chunk_bytes=8192, n_threads=1) as reader:
        patch_preadv(monkeypatch, fake)
        for start in starts:
            reader.start(operation(0, start, 20_000, on_landed))
        await landed.wait()
    assert order == starts
    assert offsets == [start + step for start in starts for step in (0, 8192, 16_384)]


async def test_one_operation_is_read_by_all_threads_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(4)

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        barrier.wait(timeout=60)
        return real_preadv(fd, buffers, offset)

    with ThreadReader([path], chunk_bytes=65536, n_threads=4) as reader:
        assert sorted(thread.name for thread in io_threads()) == [f"mer-io-{number}" for number in range(4)]
        assert all(thread.daemon for thread in io_threads())
        patch_preadv(monkeypatch, fake)
        assert (await read_extent(reader, 0, 0, 262_144) == content(0, 0, 0, 262_144)).all()


# --- closing ---


async def test_leaving_ends_threads_and_closes_files(path: Path) -> None:
    before = open_fds()
    with ThreadReader([path, path]) as reader:
        threads = io_threads()
        await read_extent(reader, 1, 0, 100)
        assert open_fds() == before + 2
    join(threads)
    assert open_fds() == before
    with pytest.raises(RuntimeError, match="twice"):
        reader.__enter__()


async def test_close_does_not_wait_for_a_read_that_hangs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        hanging.set()
        assert go_on.wait(timeout=60)
        return real_preadv(fd, buffers, offset)

    before = open_fds()
    landings = Landings()
    with ThreadReader([path], n_threads=1) as reader:
        threads = io_threads()
        patch_preadv(monkeypatch, fake)
        first, second = landings.operation(0, 9000), landings.operation(9000, 9000)
        reader.start(first)
        reader.start(second)
        await trio.to_thread.run_sync(hanging.wait)
    assert landings.seen == []  # never inside a call
    await landings.wait(second)
    assert second.error is not None
    assert "closed before the read began" in second.error.reason
    assert landings.seen == [second]
    assert open_fds() == before + 1  # the hanging read still needs its file
    go_on.set()
    await landings.wait(first)
    assert_right(first)
    join(threads)
    assert open_fds() == before


def test_a_read_may_end_after_the_event_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()
    landed: list[ReadOperation] = []

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        hanging.set()
        assert go_on.wait(timeout=60)
        return real_preadv(fd, buffers, offset)

    async def main() -> None:
        with ThreadReader([path]) as reader:
            patch_preadv(monkeypatch, fake)
            reader.start(operation(0, 0, 9000, landed.append))
            await trio.to_thread.run_sync(hanging.wait)

    before = open_fds()
    trio.run(main)
    threads = io_threads()
    go_on.set()
    join(threads)  # an exception in them would be a warning, and so a failure
    assert landed == []
    assert open_fds() == before


async def test_when_one_thread_dies_none_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(_reader: ThreadReader, chunk: object, error: object) -> bool:
        raise ValueError("for the test")

    before = open_fds()
    failed = trio.Event()
    said: list[str] = []
    unheard: list[str] = []
    late: list[str] = []

    def on_failure(why: str) -> None:
        said.append(why)
        failed.set()

    with ThreadReader([path], n_threads=3) as reader:
        threads = io_threads()
        assert len(threads) == 3
        monkeypatch.setattr(ThreadReader, "_finish", dying)
        with reader.telling(on_failure):
            with reader.telling(unheard.append):
                pass
            reader.start(Landings().operation(0, 100))
            await failed.wait()
        with reader.telling(late.append):
            pass
        assert (unheard, late) == ([], said)
        assert said == ["reading has stopped: ValueError: for the test"]
        join(threads)
        assert open_fds() == before
        with pytest.raises(EngineClosed):
            reader.start(Landings().operation(0, 100))


async def test_idle_threads_keep_no_memory_alive(path: Path) -> None:
    with ThreadReader([path], chunk_bytes=8192) as reader:
        landings = Landings()
        read = landings.operation(0, 100_000)
        reader.start(read)
        await landings.wait(read)
        gone = weakref.ref(read)
        landings.seen.clear()
        del read
        await read_extent(reader, 0, 0, 1)  # whoever landed it is idle by now
        gc.collect()
        assert gone() is None


# --- threads that hang ---


async def test_a_replacement_that_the_system_refuses_leaves_the_others_at_work(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        if offset == 0:
            hanging.set()
            assert go_on.wait(timeout=60)
        return real_preadv(fd, buffers, offset)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = open_fds()
    landings = Landings()
    with caplog.at_level(logging.WARNING, "mer"), ThreadReader([path], n_threads=1) as reader:
        patch_preadv(monkeypatch, fake)
        stuck, waiting = landings.operation(0, 9000), landings.operation(9000 + 4096, 9000)
        reader.start(stuck)
        await trio.to_thread.run_sync(hanging.wait)
        reader.start(waiting)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            reader.write_off(stuck)
        await landings.wait(waiting)
        assert waiting.error is not None
        assert "every thread hangs" in waiting.error.reason
        assert "can't start new thread" in caplog.text
        assert reader.statistics().copies[0].threads == 1
        go_on.set()
        await landings.wait(stuck)
        assert_right(stuck)
        assert (await read_extent(reader, 0, 9000, 100) == content(0, 0, 9000, 100)).all()  # by the thread that is back
        threads = io_threads()
    join(threads)
    assert open_fds() == before


async def test_a_replaced_thread_ends_when_its_read_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def fake(fd: int, buffers: list[Any], offset: int) -> int:
        if offset == 0:
            hanging.set()
            assert go_on.wait(timeout=60)
        return real_preadv(fd, buffers, offset)

    landings = Landings()
    with ThreadReader([path], n_threads=1) as reader:
        (first,) = io_threads()
        patch_preadv(monkeypatch, fake)
        stuck = landings.operation(0, 9000)
        reader.start(stuck)
        await trio.to_thread.run_sync(hanging.wait)
        reader.write_off(stuck)
        assert len(io_threads()) == 2
        assert all(thread.daemon for thread in io_threads())
        go_on.set()
        await landings.wait(stuck)
        join([first])
        assert len(io_threads()) == 1
        assert (await read_extent(reader, 0, 9000, 100) == content(0, 0, 9000, 100)).all()


# --- everything at once ---


@pytest.mark.parametrize("seed", range(6))
def test_many_operations_on_real_threads(tmp_path: Path, seed: int) -> None:
    """Operations of every priority, promoted and cancelled at random moments, on copies that fail here and there."""
    rng = random.Random(seed)
    n_mirrors = seed % 3

    async def main() -> None:
        settings = {"n_threads": rng.randint(1, 4), "chunk_bytes": 4096 * rng.choice([1, 3, 16])}
        with thread_lab(tmp_path, [SIZE, SIZE], n_mirrors, **settings) as lab:
            bad: set[int] = set()
            for copy in range(n_mirrors + 1):
                for _ in range(seed):
                    page = rng.randrange(SIZE // 4096)
                    lab.fail(0, page * 4096, page * 4096 + 1, copy=copy)
                    bad.add(page)
            landings = Landings()
            reads: list[ReadOperation] = []
            cancelled: set[ReadOperation] = set()
            for _ in range(150):
                offset = rng.randrange(SIZE - 1)
                n_bytes = rng.randint(1, min(100_000, SIZE - offset))
                priority = rng.choice(list(Priority))
                reads.append(landings.operation(offset, n_bytes, file=rng.randrange(2), priority=priority))
                landings.call(lab.reader.start, reads[-1])
                if rng.random() < 0.3:
                    victim = rng.choice(reads)
                    landings.call(lab.reader.promote, victim, Priority(rng.randint(0, victim.priority)))
                if rng.random() < 0.2:
                    cancelled.add(victim := rng.choice(reads))
                    landings.call(lab.reader.cancel, victim)
                if rng.random() < 0.1:
                    await landings.wait(rng.choice(reads))
            await landings.wait(*reads)
            for read in reads:
                if read.error is None:
                    assert_right(read)
                elif read.cancelled:
                    assert read in cancelled
                else:
                    assert bad & set(range(read.start // 4096, (read.start + read.length) // 4096))
            s = lab.reader.statistics()
            assert (s.started, s.in_flight) == (150, 0)
            assert s.landed == sum(read.error is None for read in reads)
            assert s.cancelled == sum(read.cancelled for read in reads)
            assert s.bytes_read == sum(read.length for read in reads if read.error is None)
            assert sum(copy.reads for copy in s.copies) == len(lab.reads)
            assert all(not each.queued_bytes for each in s.by_priority)

    trio.run(main)


# --- opening ---


async def test_a_file_that_is_not_the_one_whose_header_was_read_is_refused(path: Path) -> None:
    was = FileIdentity.of(os.stat(path))
    before = open_fds()
    with ThreadReader([path], expected=[was]) as reader:
        await read_extent(reader, 0, 0, 1)
    join(io_threads())
    for change, reason in (
        (lambda: os.utime(path, (1, 1)), "it was written to"),
        (lambda: os.truncate(path, 10), f"its size went from {SIZE} to 10 bytes"),
        (
            lambda: (path.with_name("x").write_bytes(bytes(SIZE)), path.with_name("x").replace(path)),
            "has taken its name",
        ),
    ):
        change()
        with pytest.raises(FileChanged, match=f"not as it was when its header was read: .*{reason}"):
            ThreadReader([path], expected=[was]).__enter__()
    assert open_fds() == before
    assert io_threads() == []


async def test_a_refused_thread_is_a_typed_error_and_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_start = threading.Thread.start

    def fake_start(self: threading.Thread) -> None:
        if self.name == "mer-io-2":
            raise RuntimeError("can't start new thread")
        real_start(self)

    monkeypatch.setattr(threading.Thread, "start", fake_start)
    before = open_fds()
    with pytest.raises(ConfigError, match="refuses thread 3 of 4"):
        ThreadReader([path]).__enter__()
    join(io_threads())
    assert open_fds() == before


async def test_files_that_cannot_be_opened(path: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    before = open_fds()
    for bad, reason in ((tmp_path / "missing", "No such file"), (tmp_path, "not a regular"), (fifo, "not a regular")):
        with pytest.raises(ReadError, match=reason):
            ThreadReader([path, bad]).__enter__()
    assert open_fds() == before
    assert io_threads() == []


def test_a_reader_needs_files() -> None:
    for paths, mirrors, reason in (
        ([], [], "at least one file"),
        (["x", "y"], [["x2", "y2"], ["x3"]], "mirror of 1 files cannot stand for 2"),
    ):
        with pytest.raises(ConfigError, match=reason):
            ThreadReader(paths, mirrors=mirrors)
