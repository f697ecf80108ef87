"""What every reader must do: one set of tests for threads with O_DIRECT, threads without it, and the simulated disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from mer.errors import EngineClosed, ReadError
from mer.io.arena import map_anonymous
from mer.io.extents import aligned_hull
from mer.io.operation import Reader, ReadOperation, read_extent
from mer.io.reader import ThreadReader
from mer.testing.simdisk import DiskProfile, content, open_sim_disk

CHUNK = 16384


class ClosableReader(Reader, Protocol):
    def close(self) -> None: ...


Scenario: TypeAlias = Callable[[ClosableReader], Awaitable[None]]
Run: TypeAlias = Callable[[Scenario, Sequence[int]], None]


@pytest.fixture(params=["direct", "buffered", "simulated"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a scenario on a reader of files of given sizes, whose bytes are `content(0, ...)`."""
    if request.param == "buffered":
        refuse_direct(monkeypatch)

    def run_simulated(scenario: Scenario, sizes: Sequence[int]) -> None:
        async def main() -> None:
            async with open_sim_disk(sizes, profile=DiskProfile(jitter=50.0)) as disk:
                await scenario(disk)

        trio.run(main, clock=MockClock(autojump_threshold=0))

    def run_threads(scenario: Scenario, sizes: Sequence[int]) -> None:
        paths = write_files(tmp_path, sizes)

        async def main() -> None:
            with ThreadReader(paths, chunk_bytes=CHUNK) as reader:
                assert [mode.direct for mode in reader.modes] == [request.param == "direct"] * len(sizes)
                await scenario(reader)

        trio.run(main)

    return run_simulated if request.param == "simulated" else run_threads


def write_files(folder: Path, sizes: Sequence[int]) -> list[Path]:
    paths = [folder / f"{number}.bin" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        content(0, number, 0, size).tofile(path)
    return paths


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every open with O_DIRECT fail as on a filesystem without it."""
    real_open = os.open

    def fake_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", fake_open)


def operation(
    file: int, offset: int, n_bytes: int, on_landed: Callable[[ReadOperation], None], *, memory: Any = None
) -> ReadOperation:
    start, length, lead = aligned_hull(offset, n_bytes, 4096)
    buffer = np.frombuffer(map_anonymous(length) if memory is None else memory, dtype=np.uint8)
    return ReadOperation(
        file=file, start=start, length=length, needed=lead + n_bytes, buffer=buffer, on_landed=on_landed
    )


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


def test_a_cancelled_wait_leaves_the_read_to_land(run: Run) -> None:
    async def scenario(reader: ClosableReader) -> None:
        landed = trio.Event()
        with trio.CancelScope() as scope:
            scope.cancel()
            await read_extent(reader, 0, 3, 100_000)
        assert scope.cancelled_caught
        assert reader.statistics().in_flight == 1
        reader.start(operation(0, 0, 10, lambda _: landed.set()))
        await landed.wait()
        while reader.statistics().in_flight:
            await read_extent(reader, 0, 0, 10)
        assert reader.statistics().failed == 0

    run(scenario, SIZES)
