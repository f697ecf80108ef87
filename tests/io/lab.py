"""One bench for every kind of reader: files whose bytes are known, reads that can be held up, and faults."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import attrs
import numpy as np
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.errors import ReadError
from mer.io.arena import map_anonymous
from mer.io.extents import aligned_hull
from mer.io.files import ModelFile
from mer.io.pool import Priority
from mer.io.reader import Reader, ReadOperation
from mer.io.ring import Ring
from mer.io.ring_reader import RingReader
from mer.io.thread_reader import ThreadReader
from mer.testing.simdisk import DiskProfile, SimDisk, content, open_sim_disk

CHUNK = 16384


class ClosableReader(Reader, Protocol):
    def close(self) -> None: ...


class Lab(Protocol):
    """A reader and what can be done to the drives below it."""

    @property
    def reader(self) -> ClosableReader: ...

    @property
    def reads(self) -> list[tuple[int, int, int, int]]:
        """(copy, file, start, length) of every chunk, in the order in which its read began."""

    def pause(self) -> None:
        """Let no read end until `go_on`."""

    def go_on(self) -> None:
        """Undo `pause`."""

    def fail(self, file: int, start: int, end: int, *, number: int = errno.EIO, copy: int | None = None) -> None:
        """Let reads that touch a byte range fail."""

    def hang(self, file: int, start: int, end: int) -> None:
        """Let reads that touch a byte range hang."""

    def let_return(self) -> None:
        """Let no read hang any more."""

    async def begun(self, n: int) -> None:
        """Wait until so many reads have begun."""


Scenario: TypeAlias = Callable[[Lab], Awaitable[None]]


class RunLab(Protocol):
    def __call__(
        self, scenario: Scenario, sizes: Sequence[int], *, n_mirrors: int = 0, n_threads: int = 4, **settings: Any
    ) -> None: ...


@attrs.define(eq=False)
class SimLab:
    """The simulated disk."""

    reader: SimDisk
    reads: list[tuple[int, int, int, int]]

    def pause(self) -> None:
        self.reader.freeze()

    def go_on(self) -> None:
        self.reader.thaw()

    def fail(self, file: int, start: int, end: int, *, number: int = errno.EIO, copy: int | None = None) -> None:
        self.reader.fail(file, start, end, number=number, copy=copy)

    def hang(self, file: int, start: int, end: int) -> None:
        self.reader.hang(file, start, end)

    def let_return(self) -> None:
        self.reader.heal()
        self.reader.let_return()

    async def begun(self, n: int) -> None:
        with trio.fail_after(60):
            await trio.lowlevel.checkpoint()
            while len(self.reads) < n:
                await wait_all_tasks_blocked()
                if len(self.reads) < n:
                    await trio.sleep(1e-3)


@attrs.define(eq=False)
class ThreadLab:
    """Real threads and files; made by `thread_lab`, which puts `read` in the place of `ModelFile.read_into`."""

    reader: ThreadReader
    copies: dict[str, tuple[int, int]]  # path -> (copy, file)
    reads: list[tuple[int, int, int, int]] = attrs.Factory(list)
    _changed: threading.Condition = attrs.Factory(threading.Condition)
    _paused: bool = False
    _faults: list[tuple[int, int, int, int | None, int | None]] = attrs.Factory(list)

    def pause(self) -> None:
        with self._changed:
            self._paused = True

    def go_on(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def fail(self, file: int, start: int, end: int, *, number: int = errno.EIO, copy: int | None = None) -> None:
        self._faults.append((file, start, end, number, copy))

    def hang(self, file: int, start: int, end: int) -> None:
        self._faults.append((file, start, end, None, None))

    def let_return(self) -> None:
        with self._changed:
            self._faults.clear()
            self._changed.notify_all()

    async def begun(self, n: int) -> None:
        def wait() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: len(self.reads) >= n, timeout=60)

        await trio.to_thread.run_sync(wait)

    def read(self, real: Callable[..., None], model_file: ModelFile, memory: Any, start: int, needed: int) -> None:
        copy, file = self.copies[str(model_file.path)]

        def fault() -> tuple[int | None] | None:
            for fault_file, begin, end, number, fault_copy in self._faults:
                if fault_file == file and begin < start + needed and start < end and fault_copy in (None, copy):
                    return (number,)
            return None

        with self._changed:
            self.reads.append((copy, file, start, len(memory)))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: fault() != (None,) and not self._paused, timeout=60)
            met = fault()
        if met is not None and met[0] is not None:
            raise ReadError(model_file.path, start, needed, os.strerror(met[0]), met[0])
        real(model_file, memory, start, needed)


class HeldRing(Ring):
    """A ring whose reads can be held up and refused."""

    def __init__(self, entries: int) -> None:
        super().__init__(entries)
        self.lab: RingLab | None = None

    def read(self, fd: int, address: int, length: int, offset: int, token: int, *, aside: bool = False) -> None:
        if self.lab is None:
            super().read(fd, address, length, offset, token, aside=aside)
        else:
            self.lab.read(self, (fd, address, length, offset, token))

    def really_read(self, fd: int, address: int, length: int, offset: int, token: int) -> None:
        super().read(fd, address, length, offset, token)

    def refuse(self, token: int, number: int) -> None:
        self._known.append((token, -number))
        os.eventfd_write(self.fileno(), 1)


@attrs.define(eq=False)
class RingLab:
    """Real files and a ring of which reads are held up or refused; made by `ring_lab`."""

    reader: RingReader
    ring: HeldRing
    files: dict[int, tuple[int, int]]  # descriptor -> (copy, file)
    lets_go: bool = True  # at the end
    reads: list[tuple[int, int, int, int]] = attrs.Factory(list)
    _held: list[tuple[int, int, int, int, int]] = attrs.Factory(list)
    _changed: trio.Event = attrs.Factory(trio.Event)
    _paused: bool = False
    _faults: list[tuple[int, int, int, int | None, int | None]] = attrs.Factory(list)

    def pause(self) -> None:
        self._paused = True

    def go_on(self) -> None:
        self._paused = False
        self._release()

    def fail(self, file: int, start: int, end: int, *, number: int = errno.EIO, copy: int | None = None) -> None:
        self._faults.append((file, start, end, number, copy))

    def hang(self, file: int, start: int, end: int) -> None:
        self._faults.append((file, start, end, None, None))

    def let_return(self) -> None:
        self._faults.clear()
        self._release()

    async def begun(self, n: int) -> None:
        with trio.fail_after(60):
            await trio.lowlevel.checkpoint()
            while len(self.reads) < n:
                await self._changed.wait()

    def read(self, ring: HeldRing, arguments: tuple[int, int, int, int, int]) -> None:
        fd, _, length, offset, _ = arguments
        self.reads.append((*self.files[fd], offset, length))
        self._changed.set()
        self._changed = trio.Event()
        self._try(ring, arguments)

    def _try(self, ring: HeldRing, arguments: tuple[int, int, int, int, int]) -> None:
        fd, _, length, offset, token = arguments
        copy, file = self.files[fd]
        met = None
        for fault_file, begin, end, number, fault_copy in self._faults:
            if fault_file == file and begin < offset + length and offset < end and fault_copy in (None, copy):
                met = (number,)
                break
        if self._paused or met == (None,):
            self._held.append(arguments)
        elif met is not None and met[0] is not None:
            ring.refuse(token, met[0])
        else:
            ring.really_read(*arguments)

    def _release(self) -> None:
        if not self.lets_go:
            return
        held, self._held = self._held, []
        for arguments in held:
            self._try(self.ring, arguments)
        self.ring.submit()


def write_files(folder: Path, sizes: Sequence[int]) -> list[Path]:
    paths = [folder / f"{number}.bin" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        content(0, number, 0, size).tofile(path)
    return paths


def write_copies(folder: Path, sizes: Sequence[int], n_mirrors: int) -> list[list[Path]]:
    folders = [folder / str(copy) for copy in range(1 + n_mirrors)]
    for each in folders:
        each.mkdir(exist_ok=True)
    return [write_files(each, sizes) for each in folders]


@contextmanager
def thread_lab(folder: Path, sizes: Sequence[int], n_mirrors: int, **settings: Any) -> Iterator[ThreadLab]:
    """Run a ThreadReader of files whose bytes are `content(0, ...)`."""
    paths, *mirrors = write_copies(folder, sizes, n_mirrors)
    copies = {str(path): (copy, file) for copy, row in enumerate([paths, *mirrors]) for file, path in enumerate(row)}
    with ThreadReader(paths, mirrors=mirrors, **settings) as reader, pytest.MonkeyPatch.context() as patch:
        lab = ThreadLab(reader, copies)
        real = ModelFile.read_into
        patch.setattr(ModelFile, "read_into", lambda *args: lab.read(real, *args))
        try:
            yield lab
        finally:
            lab.let_return()
            lab.go_on()


@contextmanager
def ring_lab(folder: Path, sizes: Sequence[int], n_mirrors: int, **settings: Any) -> Iterator[RingLab]:
    """Run a RingReader of files whose bytes are `content(0, ...)`; skips the test where there is no io_uring."""
    try:
        Ring(1).close()
    except OSError as error:
        pytest.skip(f"this system has no io_uring: {error}")
    paths, *mirrors = write_copies(folder, sizes, n_mirrors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mer.io.ring_reader.Ring", HeldRing)
        with RingReader(paths, mirrors=mirrors, **settings) as reader:
            ring = reader._ring
            assert isinstance(ring, HeldRing)
            files = {
                file.fileno(): (copy, number)
                for copy, row in enumerate(reader._drives)
                for number, file in enumerate(row)
            }
            ring.lab = lab = RingLab(reader, ring, files)
            try:
                yield lab
            finally:
                lab.let_return()
                lab.go_on()


def run_real(
    make_lab: Callable[..., AbstractContextManager[Lab]],
    folder: Path,
    scenario: Scenario,
    sizes: Sequence[int],
    n_mirrors: int,
    settings: dict[str, Any],
) -> None:
    async def main() -> None:
        with make_lab(folder, sizes, n_mirrors, **settings) as lab:
            await scenario(lab)

    trio.run(main)


def run_simulated(
    scenario: Scenario,
    sizes: Sequence[int],
    n_mirrors: int,
    settings: dict[str, Any],
    profile: DiskProfile | None = None,
) -> None:
    profile = profile or DiskProfile(jitter=50.0)

    async def main() -> None:
        async with open_sim_disk(sizes, profile=profile, mirrors=[profile] * n_mirrors, **settings) as disk:
            await scenario(SimLab(disk, disk.chunk_log))

    trio.run(main, clock=MockClock(autojump_threshold=0))


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every open with O_DIRECT fail as on a filesystem without it."""
    real_open = os.open

    def fake_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)


def operation(
    file: int,
    offset: int,
    n_bytes: int,
    on_landed: Callable[[ReadOperation], None],
    *,
    memory: Any = None,
    priority: Priority = Priority.DEMAND,
) -> ReadOperation:
    start, length, lead = aligned_hull(offset, n_bytes, 4096)
    buffer = np.frombuffer(map_anonymous(length) if memory is None else memory, dtype=np.uint8)
    return ReadOperation(
        file=file,
        start=start,
        length=length,
        needed=lead + n_bytes,
        buffer=buffer,
        on_landed=on_landed,
        priority=priority,
    )


class Landings:
    """Operations that have landed, in that order; refuses to be told twice, or from inside another call."""

    def __init__(self) -> None:
        self.seen: list[ReadOperation] = []
        self.calling = False
        self._changed = trio.Event()

    def __call__(self, landed: ReadOperation) -> None:
        assert not self.calling, "told inside a call"
        assert threading.current_thread() is threading.main_thread()
        assert landed not in self.seen, "told twice"
        self.seen.append(landed)
        self._changed.set()
        self._changed = trio.Event()

    def call(self, method: Callable[..., None], *args: Any) -> None:
        """Call a method of a reader, during which nothing may land."""
        self.calling = True
        method(*args)
        self.calling = False

    def operation(
        self, offset: int, n_bytes: int, *, file: int = 0, priority: Priority = Priority.DEMAND
    ) -> ReadOperation:
        return operation(file, offset, n_bytes, self, priority=priority)

    async def wait(self, *operations: ReadOperation) -> None:
        """Wait until these have landed."""
        with trio.fail_after(60):
            await trio.lowlevel.checkpoint()
            while not all(each in self.seen for each in operations):
                await self._changed.wait()


def assert_right(landed: ReadOperation) -> None:
    """Assert that an operation has brought its bytes."""
    assert landed.error is None
    assert not landed.cancelled
    assert (landed.buffer[: landed.needed] == content(0, landed.file, landed.start, landed.needed)).all()
