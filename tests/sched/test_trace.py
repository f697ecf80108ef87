"""Routing traces: written and read back, byte for byte as documented, and hostile ones refused."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.trace import MAX_BLOCK_BYTES, TraceError, TraceEvent, TraceHeader, TraceReader, TraceWriter

MODEL = bytes(range(32))
HEADER = TraceHeader(3, 300, 2, MODEL, (1000, 1000, 2**40))
EVENTS = [(0, 1, (0, 299)), (1, 1, (5,)), (2, 700, (0, 1, 2, 3)), (0, 0, (128, 256)), (2, 2**40, tuple(range(300)))]


# The format as docs/traces.md has it, written down a second time.


def leb128(number: int) -> bytes:
    out = []
    while True:
        number, low = divmod(number, 128)
        out.append(low + 128 * (number > 0))
        if not number:
            return bytes(out)


def event_bytes(layer: int, n_tokens: int, experts: Sequence[int]) -> bytes:
    gaps = [experts[0], *(b - a - 1 for a, b in pairwise(experts))]
    return b"".join(map(leb128, [layer, n_tokens, len(experts), *gaps]))


def block_bytes(payload: bytes) -> bytes:
    return struct.pack("<II", len(payload), zlib.crc32(payload)) + payload


def header_bytes(
    n_layers: int = 3,
    n_experts: int = 300,
    top_k: int = 2,
    *,
    magic: bytes = b"MERTRACE",
    version: int = 1,
    flags: int = 0,
    sizes: Sequence[int] = (1000, 1000, 2**40),
) -> bytes:
    body = magic + struct.pack("<HHIII", version, flags, n_layers, n_experts, top_k) + MODEL
    body += struct.pack(f"<{len(sizes)}Q", *sizes)
    return body + struct.pack("<I", zlib.crc32(body))


def read(path: Path) -> tuple[list[tuple[int, int, tuple[int, ...]]], int]:
    """Return the events of a trace and how many bytes of it are an unfinished block."""
    with TraceReader(path) as reader:
        events = [(event.layer, event.n_tokens, event.experts) for event in reader]
        return events, reader.lost_bytes


@st.composite
def recordings(draw: st.DrawFn) -> tuple[TraceHeader, list[list[tuple[int, int, tuple[int, ...]]]]]:
    """Draw a header and blocks of events."""
    n_layers, n_experts = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 127, 129, 4096]))
    sizes = draw(st.lists(st.integers(0, 2**64 - 1), min_size=n_layers, max_size=n_layers))
    header = TraceHeader(
        n_layers, n_experts, draw(st.integers(1, n_experts)), draw(st.binary(min_size=32, max_size=32)), tuple(sizes)
    )
    experts = st.sets(st.integers(0, n_experts - 1), min_size=1, max_size=8).map(lambda used: tuple(sorted(used)))
    event = st.tuples(st.integers(0, n_layers - 1), st.integers(0, 2**64 - 1), experts)
    return header, draw(st.lists(st.lists(event, max_size=5), max_size=4))


@given(recordings(), st.randoms())
@settings(max_examples=80, deadline=None)
def test_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    recording: tuple[TraceHeader, list[list[tuple[int, int, tuple[int, ...]]]]],
    random: Any,
) -> None:
    """Whether blocks end by a flush or by another writer, and in whatever order the experts are named."""
    header, blocks = recording
    path = tmp_path_factory.mktemp("trace") / "t"
    expected = header_bytes(header.n_layers, header.n_experts, header.top_k, sizes=header.expert_bytes)[
        :24
    ]  # up to the fingerprint
    for block in [[], *blocks]:
        with TraceWriter(path, header) as writer:
            for number, (layer, n_tokens, experts) in enumerate(block):
                writer.append(layer, n_tokens, random.sample(experts, len(experts)))
                if number % 2:
                    writer.flush()
                    writer.flush()  # nothing new: nothing is written
    events, lost_bytes = read(path)
    assert events == [event for block in blocks for event in block]
    assert lost_bytes == 0
    assert path.read_bytes()[:24] == expected
    with TraceReader(path) as reader:
        assert reader.header == header


def test_is_as_documented_to_the_byte(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        for event in EVENTS[:3]:
            writer.append(*event)
        writer.flush()
        for event in EVENTS[3:]:
            writer.append(*event)
    content = header_bytes() + b"".join(
        block_bytes(b"".join(event_bytes(*event) for event in events)) for events in (EVENTS[:3], EVENTS[3:])
    )
    assert (tmp_path / "t").read_bytes() == content
    assert event_bytes(0, 1, (0, 299)) == bytes([0, 1, 2, 0, 0xAA, 0x02])  # 298 = 2 * 128 + 42


def test_a_block_ends_by_itself_when_it_is_large(tmp_path: Path) -> None:
    path = tmp_path / "t"
    header = TraceHeader(1, 1 << 12, 1, MODEL, (0,))
    with TraceWriter(path, header) as writer:
        before = path.stat().st_size
        for _ in range(16):
            writer.append(0, 1, range(1 << 12))
        assert path.stat().st_size > before
        size = path.stat().st_size
        writer.append(0, 1, [5])
        assert path.stat().st_size == size
    assert [len(experts) for _, _, experts in read(path)[0]] == [1 << 12] * 16 + [1]


@pytest.mark.parametrize(
    "event",
    [
        (3, 1, [1]),
        (-1, 1, [1]),
        (0, -1, [1]),
        (0, 2**64, [1]),
        (0, 1, []),
        (0, 1, [300]),
        (0, 1, [-1]),
        (0, 1, [4, 4]),
    ],
)
def test_what_is_no_event_is_refused_and_nothing_is_written(event: tuple[int, int, list[int]], tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", HEADER) as writer:
        with pytest.raises(ValueError, match="."):  # noqa: RUF043
            writer.append(*event)
        writer.append(*EVENTS[0])
    assert read(tmp_path / "t") == (EVENTS[:1], 0)


@pytest.mark.parametrize(
    "values",
    [
        (0, 1, 1, MODEL, ()),
        (1025, 1, 1, MODEL, (0,) * 1025),
        (17, 4096, 1, MODEL, (0,) * 17),
        (1, 0, 0, MODEL, (0,)),
        (1, 4097, 1, MODEL, (0,)),
        (1, 2, 3, MODEL, (0,)),
        (1, 2, 0, MODEL, (0,)),
        (1, 2, 1, MODEL[:-1], (0,)),
        (1, 2, 1, MODEL, ()),
        (1, 2, 1, MODEL, (-1,)),
        (1, 2, 1, MODEL, (2**64,)),
    ],
)
def test_a_header_that_makes_no_sense_cannot_be_made(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="."):  # noqa: RUF043
        TraceHeader(*values)


# --- hostile files ---


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, bytes, list[int]]:
    """A trace of three blocks: its path, its bytes, and where its blocks begin and end."""
    path = tmp_path / "t"
    edges = [len(header_bytes())]
    with TraceWriter(path, HEADER) as writer:
        for events in (EVENTS[:2], EVENTS[2:4], EVENTS[:1]):
            for event in events:
                writer.append(*event)
            writer.flush()
            edges.append(path.stat().st_size)
    return path, path.read_bytes(), edges


ALL = [*EVENTS[:2], *EVENTS[2:4], *EVENTS[:1]]


def whole_until(edges: list[int], end: int) -> tuple[list[tuple[int, int, tuple[int, ...]]], int]:
    """Return the events of the blocks that end at `end` or before, and what is left over."""
    n_blocks = max(i for i, edge in enumerate(edges) if edge <= end)
    return ALL[: [0, 2, 4, 5][n_blocks]], end - edges[n_blocks]


def test_cut_off_at_every_byte(written: tuple[Path, bytes, list[int]]) -> None:
    """Within the header it is an error; behind it, every whole block is read, and what is lost is told."""
    path, content, edges = written
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        if end < edges[0]:
            with pytest.raises(TraceError, match="no routing trace" if end < 8 else "cut off"):
                TraceReader(path)
        else:
            assert read(path) == whole_until(edges, end)


def test_every_flipped_bit_is_an_error_or_a_told_loss(written: tuple[Path, bytes, list[int]]) -> None:
    """A length that a flipped bit has made larger than the rest of the file looks like an unfinished last block."""
    path, content, edges = written
    told = 0
    for at in range(len(content)):
        for bit in {0, 7, at % 8}:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            try:
                events, lost_bytes = read(path)
            except TraceError:
                continue
            told += 1
            edge = max(edge for edge in edges if edge <= at)
            assert at < edge + 4
            assert (events, lost_bytes) == (whole_until(edges, edge)[0], len(content) - edge)
    assert 0 < told <= 3 * 12


BAD_EVENTS: dict[str, bytes] = {
    "a layer too many": event_bytes(3, 1, (0,)),
    "an expert too many": event_bytes(0, 1, (300,)),
    "a last expert too many": event_bytes(0, 1, (0, 1, 300)),
    "no experts": leb128(0) + leb128(1) + leb128(0),
    "more experts than there are": leb128(0) + leb128(1) + leb128(301) + bytes(301),
    "a huge number of experts": leb128(0) + leb128(1) + leb128(2**64 - 1),
    "a huge gap": leb128(0) + leb128(1) + leb128(2) + leb128(0) + leb128(2**64 - 1),
    "a number of 65 bits": leb128(2**64) + bytes(3),
    "a number that does not end": b"\x80" * 11,
    "a long zero": b"\x80" * 10 + bytes(4),
    "cut off in a number": event_bytes(0, 1, (299,))[:-1],
    "cut off between numbers": event_bytes(0, 1, (1, 2))[:-1],
    "one byte": b"\x00",
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_events_that_make_no_sense_are_refused_though_their_checksum_is_right(name: str, tmp_path: Path) -> None:
    """The error says where: the beginning of the event, behind a good one of the same block."""
    path, good = tmp_path / "t", event_bytes(*EVENTS[0])
    path.write_bytes(header_bytes() + block_bytes(good + BAD_EVENTS[name]))
    with TraceReader(path) as reader:
        events = iter(reader)
        assert next(events) == TraceEvent(*EVENTS[0])
        with pytest.raises(TraceError, match="no valid event") as caught:
            next(events)
    assert caught.value.offset == len(header_bytes()) + 8 + len(good)


@pytest.mark.parametrize("n_bytes", [0, MAX_BLOCK_BYTES + 1, 2**32 - 1])
def test_blocks_of_absurd_length_are_refused(n_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(header_bytes() + struct.pack("<II", n_bytes, 0) + bytes(100))
    with pytest.raises(TraceError, match=f"a block of {n_bytes} bytes; valid are 1 to"):
        read(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no routing trace"),
        (b"GGUF" + bytes(100), "no routing trace"),
        (b"MERTRAC\0" + bytes(100), "no routing trace"),
        (header_bytes(magic=b"mertrace"), "no routing trace"),
        (header_bytes(version=0), "version 0; this release reads 1"),
        (header_bytes(version=2), "version 2; this release reads 1"),
        (header_bytes(version=256), "version 256"),  # big-endian
        (header_bytes(flags=1), "no flags"),
        (header_bytes(0, sizes=()), "a trace of 0 layers"),
        (header_bytes(2**32 - 1, sizes=()), "a trace of 4294967295 layers"),
        (header_bytes(n_experts=0), "0 experts"),
        (header_bytes(n_experts=4097), "4097 experts"),
        (header_bytes(17, n_experts=4096, sizes=()), "17 layers, 4096 experts.* 65536 in all"),
        (header_bytes(1025, sizes=()), "1025 layers"),
        (header_bytes(top_k=0), "top_k 0"),
        (header_bytes(top_k=301), "top_k 301"),
        (header_bytes(128, sizes=()), "cut off"),
        (header_bytes()[:-1] + b"\0", "checksum is wrong"),
    ],
)
def test_foreign_and_absurd_headers_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=reason):
        TraceReader(path)
    if content:  # an empty file is a new one
        with pytest.raises(TraceError, match=reason):
            TraceWriter(path, HEADER)
        assert path.read_bytes() == content


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_noise_is_an_error_or_a_told_loss(tmp_path_factory: pytest.TempPathFactory, noise: bytes, framed: bool) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    path.write_bytes(header_bytes() + (block_bytes(noise) if framed else noise))
    try:
        events, lost_bytes = read(path)
    except TraceError:
        return
    if framed:
        assert lost_bytes == 0
        for layer, _, experts in events:
            assert 0 <= layer < 3
            assert 0 <= experts[0] <= experts[-1] < 300
            assert all(a < b for a, b in pairwise(experts))
    else:
        assert (events, lost_bytes) == ([], len(noise))


def test_what_cannot_be_read_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TraceReader(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        TraceWriter(tmp_path, HEADER)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for use in (TraceReader, lambda path: TraceWriter(path, HEADER)):
        for path in (tmp_path / "fifo", Path("/dev/zero")):
            with pytest.raises(TraceError, match=f"{path}: no regular file but a"):
                use(path)
    with pytest.raises(TraceError, match="no regular file but a directory"):
        TraceReader(tmp_path)


def test_what_the_system_refuses_names_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with TraceWriter(tmp_path / "t", HEADER) as writer:
        writer.append(*EVENTS[0])
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", fail)
            with pytest.raises(OSError, match=f"Input/output error: '{tmp_path / 't'}'"):
                writer.flush()


# --- appending ---


def test_an_unfinished_block_is_cut_off_before_the_next(written: tuple[Path, bytes, list[int]]) -> None:
    path, content, edges = written
    for end in range(edges[0], len(content)):
        path.write_bytes(content[:end])
        with TraceWriter(path, HEADER) as writer:
            writer.append(*EVENTS[4])
        before, _ = whole_until(edges, end)
        assert read(path) == ([*before, EVENTS[4]], 0)


@pytest.mark.parametrize(
    "other",
    [
        TraceHeader(3, 300, 2, bytes(32), (1000, 1000, 2**40)),
        TraceHeader(3, 300, 3, MODEL, (1000, 1000, 2**40)),
        TraceHeader(3, 301, 2, MODEL, (1000, 1000, 2**40)),
        TraceHeader(2, 300, 2, MODEL, (1000, 1000)),
        TraceHeader(3, 300, 2, MODEL, (1000, 1001, 2**40)),
    ],
)
def test_another_models_trace_is_not_appended_to(other: TraceHeader, written: tuple[Path, bytes, list[int]]) -> None:
    path, content, _ = written
    with pytest.raises(TraceError, match="a trace of another model; choose another file"):
        TraceWriter(path, other)
    assert path.read_bytes() == content


def test_a_damaged_trace_is_not_appended_to(written: tuple[Path, bytes, list[int]]) -> None:
    path, content, edges = written
    damaged = content[: edges[1] - 1] + b"\xff" + content[edges[1] :]
    path.write_bytes(damaged)
    with pytest.raises(TraceError, match="the checksum of a block is wrong"):
        TraceWriter(path, HEADER)
    assert path.read_bytes() == damaged


def test_a_trace_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with TraceWriter(path, HEADER) as writer:
        writer.append(*EVENTS[0])
        with pytest.raises(TraceError, match="another process writes this trace"):
            TraceWriter(path, HEADER)
        writer.append(*EVENTS[1])
    with TraceWriter(path, HEADER) as writer:
        writer.append(*EVENTS[2])
    assert read(path) == (EVENTS[:3], 0)


def test_what_was_flushed_survives_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "t"
    script = """
import os, signal, sys
from mer.sched.trace import TraceHeader, TraceWriter
writer = TraceWriter(sys.argv[1], TraceHeader(3, 300, 2, bytes(range(32)), (1000, 1000, 2**40)))
writer.append(0, 1, (0, 299))
writer.flush()
writer.append(1, 1, (5,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -9
    assert read(path) == (EVENTS[:1], 0)


# --- a full disk ---


class FullDisk:
    """Stands for `os.pwrite`: takes `room` bytes, a few at a time, then the disk is full."""

    def __init__(self, room: int, pwrite: Any = os.pwrite) -> None:
        self.room = room
        self._pwrite = pwrite

    def __call__(self, file: int, data: bytes, offset: int) -> int:
        n_bytes = min(5, len(data), self.room)
        if not n_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= n_bytes
        return int(self._pwrite(file, data[:n_bytes], offset))


def numbered(n: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    return ((0, at, (at % 300,)) for at in range(n))


def test_a_disk_that_is_full_after_any_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that did not fit is lost and no other, even if there is room again later."""
    block = len(block_bytes(event_bytes(0, 1, (5,))))
    for room in range(2 * block + 1):
        path = tmp_path / str(room)
        writer = TraceWriter(path, HEADER)
        monkeypatch.setattr(os, "pwrite", FullDisk(room))
        landed = []
        for event in numbered(3):
            writer.append(*event)
            try:
                writer.flush()
            except OSError:
                continue
            landed.append(event)
        monkeypatch.undo()
        assert len(landed) == room // block
        assert read(path) == (landed, 0)
        writer.append(*EVENTS[1])
        writer.close()
        assert read(path) == ([*landed, EVENTS[1]], 0)


def test_a_disk_that_is_full_when_the_trace_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is an error, never silent; the file is closed all the same."""
    path = tmp_path / "t"
    writer = TraceWriter(path, HEADER)
    writer.append(*EVENTS[0])
    monkeypatch.setattr(os, "pwrite", FullDisk(3))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    writer.close()
    monkeypatch.undo()
    assert read(path) == ([], 0)
    TraceWriter(path, HEADER).close()  # not locked any more


def test_a_disk_that_is_full_for_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays empty, so that it can be begun again."""
    path = tmp_path / "t"
    monkeypatch.setattr(os, "pwrite", FullDisk(20))
    with pytest.raises(OSError, match="No space left"):
        TraceWriter(path, HEADER)
    monkeypatch.undo()
    assert path.read_bytes() == b""
    with TraceWriter(path, HEADER) as writer:
        writer.append(*EVENTS[0])
    assert read(path) == (EVENTS[:1], 0)


def test_nothing_is_written_that_is_not_flushed_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "t"
    writer = TraceWriter(path, HEADER)
    writer.append(*EVENTS[0])
    writer.close(flush=False)
    assert read(path) == ([], 0)
