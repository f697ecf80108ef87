"""What only the reader on io_uring does: short reads, refusals of the kernel, closing, and when it is to be had."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from mer.errors import EngineClosed, ReadError
from mer.io import ring as ring_module
from mer.io.arena import map_anonymous
from mer.io.open_reader import open_reader
from mer.io.reader import ReadOperation
from mer.io.ring import Ring
from mer.io.ring_reader import RingReader, RingUnavailable
from mer.testing.simdisk import content
from tests._lib.extents import read_extent
from tests.io.lab import Landings, assert_right, operation, refuse_direct, ring_lab, write_files

SIZE = 300_000

try:
    Ring(1).close()
except OSError as error:
    pytest.skip(f"this system has no io_uring: {error}", allow_module_level=True)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_files(tmp_path, [SIZE])[0]


# --- the ring ---


def complete(ring: Ring, n: int) -> dict[int, int]:
    """Return the results of so many reads by token."""
    done: dict[int, int] = {}
    while len(done) < n:
        os.set_blocking(ring.fileno(), True)
        os.eventfd_read(ring.fileno())
        done.update(ring.completed())
    return done


@pytest.mark.parametrize("aside", [False, True])
def test_reads_go_where_they_should_and_many_times_around_the_ring(path: Path, *, aside: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    ring = Ring(4)
    memory = np.frombuffer(map_anonymous(4 * 4096), dtype=np.uint8)
    for turn in range(50):
        offsets = [(turn * 7919 + 4001 * place) % (SIZE - 4096) for place in range(3)]
        for place, offset in enumerate(offsets):
            ring.read(fd, memory.ctypes.data + 4096 * place, 1000 + place, offset, 10 * turn + place, aside=aside)
        ring.submit()
        assert complete(ring, 3) == {10 * turn + place: 1000 + place for place in range(3)}
        for place, offset in enumerate(offsets):
            there = memory[4096 * place : 4096 * place + 1000 + place]
            assert (there == content(0, 0, offset, 1000 + place)).all()
    ring.close()
    ring.close()
    os.close(fd)


def test_errors_are_results(path: Path) -> None:
    ring = Ring(2)
    memory = np.zeros(4096, dtype=np.uint8)
    ring.read(10_000, memory.ctypes.data, 4096, 0, 5)
    fd = os.open(path, os.O_RDONLY)
    ring.read(fd, memory.ctypes.data, 4096, SIZE, 6)
    ring.submit()
    assert complete(ring, 2) == {5: -errno.EBADF, 6: 0}
    os.close(fd)
    ring.close()


@pytest.mark.parametrize("number", [0, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EFAULT])
def test_a_kernel_that_takes_nothing_is_not_asked_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import mer.io.ring as module

    ring = Ring(4)
    calls: list[int] = []

    def fake(_number: int, *arguments: int) -> int:
        calls.append(arguments[1])
        assert len(calls) < 100
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    fd = os.open(path, os.O_RDONLY)
    memory = np.zeros(4096, dtype=np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_call", fake)
        for token in range(3):
            ring.read(fd, memory.ctypes.data, 100, 0, token)
        ring.submit()
    assert complete(ring, 3) == dict.fromkeys(range(3), -(number or errno.EAGAIN))
    assert len(calls) > 1 or number not in (0, errno.EINTR)
    ring.read(fd, memory.ctypes.data, 77, 0, 9)
    ring.submit()
    assert complete(ring, 1) == {9: 77}
    ring.close()
    os.close(fd)


def test_what_the_kernel_refuses_completes_with_its_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mer.io.ring as module

    ring = Ring(4)
    real = module._call
    calls: list[int] = []

    def fake(number: int, *arguments: int) -> int:
        calls.append(arguments[1])
        if len(calls) == 1:
            raise InterruptedError(errno.EINTR, "")
        if len(calls) == 2:
            return real(number, arguments[0], 1)  # takes one of three
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    fd = os.open(path, os.O_RDONLY)
    memory = np.zeros(4096, dtype=np.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_call", fake)
        for token in range(3):
            ring.read(fd, memory.ctypes.data, 100 + token, 0, token)
        ring.submit()
    assert calls == [3, 3, 2]
    assert complete(ring, 3) == {0: 100, 1: -errno.EAGAIN, 2: -errno.EAGAIN}
    ring.read(fd, memory.ctypes.data, 77, 0, 9)  # the places of those refused are used again
    ring.submit()
    assert complete(ring, 1) == {9: 77}
    os.close(fd)
    ring.close()


# --- short reads ---


class ShortRing(Ring):
    """A ring that reads less than it is asked to."""

    limits: ClassVar[list[int]] = []

    def read(self, fd: int, address: int, length: int, offset: int, token: int, *, aside: bool = False) -> None:
        assert offset % 4096 == address % 4096 == 0
        limit = self.limits.pop(0) if self.limits else length
        if limit == 0:
            self._known.append((token, 0))
            os.eventfd_write(self.fileno(), 1)
            return
        super().read(fd, address, min(limit, length), offset, token, aside=aside)


@pytest.mark.parametrize("limits", [[4096], [8192, 4096, 100 * 4096], [0], [4096, 0, 0, 4096], [0, 0, 0, 0]], ids=str)
async def test_short_reads_go_on(path: Path, monkeypatch: pytest.MonkeyPatch, limits: list[int]) -> None:
    monkeypatch.setattr("mer.io.ring_reader.Ring", ShortRing)
    monkeypatch.setattr(ShortRing, "limits", limits)
    with RingReader([path], chunk_bytes=65536) as reader:
        assert (await read_extent(reader, 0, 7, SIZE - 7) == content(0, 0, 7, SIZE - 7)).all()
    assert not limits


async def test_reads_that_bring_nothing_end_in_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mer.io.ring_reader.Ring", ShortRing)
    monkeypatch.setattr(ShortRing, "limits", [0] * 9)
    with RingReader([path]) as reader, pytest.raises(ReadError, match="reads in a row brought nothing"):
        await read_extent(reader, 0, 0, 100)


async def test_truncated_while_open(path: Path) -> None:
    with RingReader([path]) as reader:
        os.truncate(path, 100_000)
        with pytest.raises(ReadError, match=r"truncated.*its size went from 300000 to 100000 bytes") as caught:
            await read_extent(reader, 0, 99_000, 2000)
        assert caught.value.path == path
        assert (await read_extent(reader, 0, 50_000, 50_000) == content(0, 0, 50_000, 50_000)).all()


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE])
def test_an_error_is_reported_at_once_with_its_place(tmp_path: Path, number: int) -> None:
    async def main() -> None:
        with ring_lab(tmp_path, [SIZE], 0, chunk_bytes=65536) as lab:
            lab.fail(0, 65536, 65537, number=number)
            landings = Landings()
            failed = landings.operation(7, SIZE - 7)
            lab.reader.start(failed)
            await landings.wait(failed)
            assert failed.error is not None
            assert (failed.error.errno, failed.error.offset) == (number, 65536)
            assert os.strerror(number) in failed.error.reason
            assert (await read_extent(lab.reader, 0, 7, 100) == content(0, 0, 7, 100)).all()

    trio.run(main)


# --- memory ---


async def test_only_reads_into_untouched_memory_go_aside(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Watched(Ring):
        def read(self, *arguments: int, aside: bool = False) -> None:
            seen.append(aside)
            super().read(*arguments, aside=aside)

    monkeypatch.setattr("mer.io.ring_reader.Ring", Watched)
    with RingReader([path]) as reader:
        await read_extent(reader, 0, 0, 100)  # into memory of its own
        landings = Landings()
        reader.start(read := landings.operation(0, 100))
        await landings.wait(read)
    assert seen == [True, False]


@pytest.mark.parametrize("cancelled", [1, 2])
async def test_a_read_that_no_thread_of_the_kernel_takes_is_begun_in_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: int
) -> None:
    """The kernel cancels a read that it puts aside where the limit on processes allows it no thread."""
    seen: list[bool] = []

    class NoThreads(Ring):
        def read(self, *arguments: int, aside: bool = False) -> None:
            seen.append(aside)
            super().read(*arguments, aside=aside)

        def completed(self) -> list[tuple[int, int]]:
            return [(token, -errno.ECANCELED if len(seen) <= cancelled else n) for token, n in super().completed()]

    monkeypatch.setattr("mer.io.ring_reader.Ring", NoThreads)
    with RingReader([path]) as reader:
        if cancelled == 1:
            assert (await read_extent(reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
        else:
            with pytest.raises(ReadError, match="Operation canceled"):
                await read_extent(reader, 0, 1, 100)
    assert seen == [True, False]


# --- closing ---


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until what the closed reader's task still does has been done."""
    await wait_all_tasks_blocked()
    while not condition():
        await wait_all_tasks_blocked()


async def test_leaving_closes_the_ring_and_the_files(path: Path) -> None:
    await trio.lowlevel.checkpoint()
    before = open_fds()
    with RingReader([path, path]) as reader:
        await read_extent(reader, 1, 0, 100)
        assert open_fds() > before + 2
    await settled(lambda: open_fds() == before)
    with pytest.raises(RuntimeError, match="twice"):
        reader.__enter__()
    with pytest.raises(EngineClosed):
        reader.start(operation(0, 0, 100, lambda _: None))


def test_close_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    async def main() -> None:
        before = open_fds()
        landings = Landings()
        with ring_lab(tmp_path, [SIZE], 0, n_threads=1) as lab:
            lab.hang(0, 0, 4096)
            first, second = landings.operation(0, 9000), landings.operation(9000 + 4096, 9000)
            lab.reader.start(first, second)
            lab.reader.close()
            assert landings.seen == []
            await landings.wait(second)
            assert second.error is not None
            assert "closed before the read began" in second.error.reason
            await wait_all_tasks_blocked()
            assert open_fds() > before + 1
            lab.let_return()
            await landings.wait(first)
            assert_right(first)
        await settled(lambda: open_fds() == before)

    trio.run(main)


def test_the_event_loop_does_not_wait_for_a_read_that_hangs(tmp_path: Path) -> None:
    landed: list[ReadOperation] = []

    async def main() -> None:
        with ring_lab(tmp_path, [SIZE], 0) as lab:
            lab.hang(0, 0, SIZE)
            lab.reader.start(operation(0, 0, 9000, landed.append))
            lab.lets_go = False

    before = open_fds()
    trio.run(main)
    assert landed == []
    assert open_fds() == before


# --- when it is to be had ---


def no_ring(_entries: int) -> Any:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


async def test_the_first_that_can_be_had_is_used_and_the_reason_given(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_fds()
    with open_reader([path]) as opened:
        assert (opened.reader.engine, opened.reader.depth) == ("io_uring", 8)
        assert (await read_extent(opened.reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
        assert opened.reader.statistics().engine == "io_uring"
    await settled(lambda: open_fds() == before)
    with open_reader([path], io_engine="threads") as opened:
        assert (opened.reader.engine, opened.reader.depth, opened.reason) == ("threads", 4, "asked for")
    monkeypatch.setattr("mer.io.ring_reader.Ring", no_ring)
    with open_reader([path], n_threads=3) as opened:
        assert (opened.reader.engine, opened.reader.depth) == ("threads", 3)
        assert opened.reason == "the system refuses io_uring (Operation not permitted)"
        assert (await read_extent(opened.reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
    refusal = r"refuses io_uring \(Operation not permitted\); read with threads"
    with pytest.raises(RingUnavailable, match=refusal), open_reader([path], io_engine="io_uring"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.EMFILE, errno.EINVAL])
@pytest.mark.parametrize("step", ["setup", "map", "eventfd", "register"])
async def test_whatever_step_of_the_ring_is_refused_threads_read_and_nothing_is_left(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    def refused(*_arguments: object, **_settings: object) -> None:
        raise OSError(number, os.strerror(number))

    before = open_fds()
    with monkeypatch.context() as patch:
        if step in ("setup", "register"):
            call, refusals = ring_module._call, {"setup": ring_module._SETUP, "register": ring_module._REGISTER}
            patch.setattr(ring_module, "_call", lambda n, *rest: (refused if n == refusals[step] else call)(n, *rest))
        elif step == "map":
            real = mmap.mmap
            patch.setattr(mmap, "mmap", lambda fd, *rest, **more: (real if fd < 0 else refused)(fd, *rest, **more))
        else:
            patch.setattr("mer.io.ring.os.eventfd", refused)
        with open_reader([path]) as opened:
            assert opened.reader.engine == "threads"
            assert opened.reason == f"the system refuses io_uring ({os.strerror(number)})"
            assert (await read_extent(opened.reader, 0, 1, 100) == content(0, 0, 1, 100)).all()
    await settled(lambda: open_fds() == before)


async def test_files_that_allow_no_direct_reads_are_read_by_threads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch)
    with open_reader([path]) as opened:
        assert opened.reader.engine == "threads"
        assert "io_uring needs direct reads" in opened.reason
        assert str(path) in opened.reason


async def test_other_failures_are_not_taken_for_a_lack_of_io_uring(path: Path) -> None:
    before = open_fds()
    with pytest.raises(ReadError, match="No such file"), open_reader([path, path.with_name("missing")]):
        pass
    assert open_fds() == before
