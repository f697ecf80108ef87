"""Recording while an engine runs: no event is lost, nothing blocks, and a failing disk fails nobody."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.lowlevel
import trio.testing

from mer.sched import recorder as recorder_module
from mer.sched.recorder import TraceRecorder
from mer.sched.trace import TraceHeader, TraceReader, TraceWriter
from mer.testing.cancel import Subject, cancel_at_every_step

HEADER = TraceHeader(2, 1 << 12, 8, bytes(32), (1, 1))
WIDE = range(1 << 12)  # an event of 4 KiB: four or five make a block here
BLOCK_BYTES = 1 << 14


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "BLOCK_BYTES", BLOCK_BYTES)


class Disk(TraceWriter):
    """A trace whose writes take time, fail from some point on, and are counted."""

    def __init__(self, path: Path, *, fails_at: int | None = None) -> None:
        self.writes = -1  # the header is none
        self.fails_at = fails_at
        super().__init__(path, HEADER)

    def write(self, data: bytes) -> None:
        if self.writes == self.fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.writes += 1
        super().write(data)


async def slowly(function: Callable[[], None]) -> None:
    """Run a function in what takes a second of the mock clock, as a thread that cannot be cancelled once it runs."""
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True):
        await trio.sleep(1)
        function()


def recorded(path: Path) -> list[int]:
    """Return the numbers of tokens, which tell the events apart; the trace is whole."""
    with TraceReader(path) as reader:
        numbers = [event.n_tokens for event in reader]
        assert reader.lost_bytes == 0
        return numbers


async def test_every_event_is_in_the_file(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Blocks while it runs, the last one when it is closed."""
    disk = Disk(tmp_path / "t")
    recorder = TraceRecorder(disk, in_thread=slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run)
        for number in range(23):
            recorder.routed(number % 2, number, WIDE)
            assert disk.writes == number // 4 if number else disk.writes == 0  # never while the scheduler waits
            await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert disk.writes == 5
    recorder.close()
    assert disk.writes == 6
    assert recorded(tmp_path / "t") == list(range(23))
    statistics = recorder.statistics()
    assert statistics.events == 23
    assert statistics.bytes_written == (tmp_path / "t").stat().st_size - len(HEADER.encode())
    assert (statistics.path, statistics.error) == (str(tmp_path / "t"), None)


def test_a_cancelled_recorder_loses_no_block(tmp_path: Path) -> None:
    """At any of its steps, before a write has begun and while it runs."""
    rounds = 0

    async def scenario(subject: Subject) -> None:
        nonlocal rounds
        rounds += 1
        path = tmp_path / str(rounds)
        recorder = TraceRecorder(Disk(path), in_thread=slowly)

        async def feed() -> None:
            for number in range(18):
                recorder.routed(0, number, WIDE)
                await trio.sleep(0.3)
            ended.cancel()

        with trio.CancelScope() as ended:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(feed)
                await subject.run(recorder.run)
                await trio.sleep_forever()
        recorder.close()
        assert recorded(path) == list(range(18))

    assert cancel_at_every_step(scenario) > 5


def test_without_an_event_there_is_a_header_alone(tmp_path: Path) -> None:
    recorder = TraceRecorder(Disk(tmp_path / "t"))
    recorder.close()
    assert (tmp_path / "t").read_bytes() == HEADER.encode()


@pytest.mark.parametrize("fails_at", [0, 1, 2, 4])
async def test_a_full_disk_ends_the_trace_and_nothing_else(
    fails_at: int, tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """With one warning; what was written before it stays, and nothing comes behind it, though there is room again."""
    disk = Disk(tmp_path / "t", fails_at=fails_at)
    recorder = TraceRecorder(disk, in_thread=slowly)
    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorder.run)
            for number in range(18):
                recorder.routed(0, number, WIDE)
                await trio.sleep(2)
            if fails_at < 4:
                disk.fails_at = None
                recorder.routed(0, 18, WIDE)
            nursery.cancel_scope.cancel()
        recorder.close()
    assert recorded(tmp_path / "t") == list(range(4 * fails_at))
    error = recorder.statistics().error
    assert error is not None
    assert "No space left" in error
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 't'}: the trace ends early: {error}"]


async def test_a_disk_that_does_not_keep_up_ends_the_trace(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory stays bounded: at most 17 blocks wait, and the one that is being written."""

    async def stuck(function: Callable[[], None]) -> None:
        await trio.sleep_forever()

    recorder = TraceRecorder(Disk(tmp_path / "t"), in_thread=stuck)
    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorder.run)
            for number in range(200):
                recorder.routed(0, number, WIDE)
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        recorder.close()
    assert recorder.statistics().error == "the disk does not keep up with it"
    assert recorder.statistics().events == 17 * 4
    assert len(caplog.records) == 1
    assert recorded(tmp_path / "t") == []


async def test_blocks_are_written_in_a_thread(tmp_path: Path) -> None:
    """With the default."""
    threads: list[threading.Thread] = []
    written = trio.Event()
    token = trio.lowlevel.current_trio_token()

    class Watched(Disk):
        def write(self, data: bytes) -> None:
            super().write(data)
            threads.append(threading.current_thread())
            if len(threads) == 3:  # the header, and two blocks
                token.run_sync_soon(written.set)

    recorder = TraceRecorder(Watched(tmp_path / "t"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run)
        for number in range(9):
            recorder.routed(0, number, WIDE)
        await written.wait()
        nursery.cancel_scope.cancel()
    recorder.close()
    assert recorded(tmp_path / "t") == list(range(9))
    assert [thread is threading.main_thread() for thread in threads] == [True, False, False, True]
    assert 4 * len(WIDE) == BLOCK_BYTES
