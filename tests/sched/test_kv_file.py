"""Files with saved prefixes: what is written is read again, and nothing else is believed."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from mer.compute.state import Paged, StateLayout
from mer.sched.kv_file import HEADER_BYTES, KVLayout, PrefixFileError, PrefixReader, PrefixWriter

LAYOUT = KVLayout(
    fingerprint=bytes(range(32)),
    kv_type="f32",
    arithmetic="int15",
    state=StateLayout((Paged(1, 4, 8), Paged(3, 2, 2)), block_tokens=2),
)
TOKENS = [5, 70_000, 5, 2**31 - 1, 0, 1]
BLOCKS = [np.arange(6, dtype="<f4") + number for number in (0, 100, -7)]


def write(path: Path, layout: KVLayout = LAYOUT, blocks: list[npt.NDArray[Any]] = BLOCKS) -> bytes:
    with PrefixWriter(path, layout, TOKENS) as writer:
        writer.begin()
        for block in blocks:
            writer.write(block.view(np.uint8))
        writer.commit()
    return path.read_bytes()


def read(path: Path, layout: KVLayout = LAYOUT, most_blocks: int = 3) -> tuple[tuple[int, ...], list[bytes]]:
    with PrefixReader(path, layout, most_blocks) as reader:
        reader.begin()
        reader.verify()
        return reader.tokens, [reader.read(index).tobytes() for index in range(reader.n_blocks)]


def header(**changes: Any) -> bytes:
    """Return a header as docs/prefix-reuse.md describes it."""
    values = {
        "magic": b"MERKVPFX",
        "version": 4,
        "flags": 0,
        "digest": hashlib.sha256(b"(2, [(1, 4, 8), (3, 2, 2)])").digest()[:12],
        "block_tokens": 2,
        "n_blocks": 3,
        "block_bytes": 24,
        "kv_type": b"f32",
        "arithmetic": b"int15",
        "fingerprint": bytes(range(32)),
    } | changes
    packed = struct.pack("<8sHH12sIIQ16s16s32s", *values.values())
    return packed + struct.pack("<I", zlib.crc32(packed))


def whole(head: bytes, blocks: list[npt.NDArray[Any]] = BLOCKS) -> bytes:
    """Return a file as docs/prefix-reuse.md describes it."""
    parts = [struct.pack(f"<{len(TOKENS)}i", *TOKENS), *(block.astype("<f4").tobytes() for block in blocks)]
    checksum, data = zlib.crc32(head[:-4]), head
    for part in parts:
        checksum = zlib.crc32(part, checksum)
        data += part + struct.pack("<I", checksum)
    return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.prefix"


def test_what_is_written_is_what_the_format_says_and_is_read_again(path: Path) -> None:
    assert write(path) == whole(header())
    assert read(path) == (tuple(TOKENS), [block.tobytes() for block in BLOCKS])
    assert os.listdir(path.parent) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_cut_is_noticed(path: Path) -> None:
    data = write(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(PrefixFileError, match=r"begin with|cut off|blocks take"):
            read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(PrefixFileError, match="blocks take"):
        read(path)


@pytest.mark.parametrize("bit", [0, 7])
def test_every_flipped_bit_is_noticed(path: Path, bit: int) -> None:
    data = write(path)
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(PrefixFileError, match=r"begin with|version|damaged") as caught:
            read(path)
        assert caught.value.path == path
        assert caught.value.offset is not None


def test_blocks_in_another_order_are_noticed(path: Path) -> None:
    data = write(path)
    begin = HEADER_BYTES + 4 * len(TOKENS) + 4
    first, second, third = (data[begin + 28 * i : begin + 28 * (i + 1)] for i in range(3))
    path.write_bytes(data[:begin] + second + first + third)
    with pytest.raises(PrefixFileError, match="checksum"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"magic": b"MERTRACE"}, "does not begin with"),
        ({"version": 0}, "version 0"),
        ({"version": 3}, "version 3"),
        ({"version": 5}, "version 5"),
        ({"flags": 1}, "flags 1"),
        ({"fingerprint": bytes(32)}, "another model"),
        ({"digest": bytes(12)}, "another model, whose layers divide a block otherwise"),
        ({"block_tokens": 2**32 - 1}, "another model"),
        ({"block_bytes": 2**64 - 1}, "blocks have 18446744073709551615 bytes"),
        ({"kv_type": b"f16"}, "holds f16 keys and values, and this engine keeps f32; open .* the same kv_type"),
        ({"kv_type": b"f16", "block_bytes": 12}, "holds f16 keys and values"),
        ({"kv_type": b"\xff" * 16}, "holds .* keys and values"),
        ({"arithmetic": b"int8"}, "computed with int8 activations, and this engine computes with int15"),
        ({"arithmetic": b"\xff\n'"}, "computed with .* activations"),
        ({"n_blocks": 0}, "0 blocks"),
        ({"n_blocks": 4}, "KV memory for 3"),
        ({"n_blocks": 2**32 - 1}, "KV memory for 3"),
        ({"n_blocks": 2}, "blocks take"),
    ],
    ids=repr,
)
def test_headers_that_do_not_fit_are_refused(path: Path, changes: dict[str, Any], reason: str) -> None:
    path.write_bytes(whole(header(**changes)))
    with pytest.raises(PrefixFileError, match=reason) as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_a_file_of_more_blocks_than_it_has_room_for_is_refused_before_it_is_read(path: Path) -> None:
    layout = attrs.evolve(LAYOUT, state=StateLayout((Paged(1, 1 << 49, 1 << 49),), block_tokens=2))
    path.write_bytes(whole(header(block_bytes=1 << 50, digest=layout.state.digest)))
    with pytest.raises(PrefixFileError, match="blocks take"):
        read(path, layout)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_though_the_checksum_is_right(path: Path, value: float) -> None:
    blocks = [block.copy() for block in BLOCKS]
    blocks[1][2] = value
    write(path, blocks=blocks)
    with pytest.raises(PrefixFileError, match="block 1 holds NaN or infinity"):
        read(path)
    layout = attrs.evolve(LAYOUT, kv_type="other")  # whose bytes are not floats
    write(path, layout, blocks)
    assert read(path, layout)[1] == [block.tobytes() for block in blocks]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 71])
def test_half_floats_and_scales_that_are_not_finite_are_refused(path: Path, value: float, place: int) -> None:
    """Wherever they are in a tile; int8 may be anything."""
    layout = attrs.evolve(LAYOUT, kv_type="f16", state=StateLayout((Paged(3, 12, 12),) * 2, block_tokens=2))
    blocks = [np.arange(72, dtype="<f2") for _ in range(3)]
    write(path, layout, blocks)
    assert read(path, layout)[1] == [block.tobytes() for block in blocks]
    blocks[2][place] = value
    write(path, layout, blocks)
    with pytest.raises(PrefixFileError, match="block 2 holds NaN or infinity"):
        read(path, layout)
    layout = attrs.evolve(LAYOUT, kv_type="q8_0", state=StateLayout((Paged(3, 68, 68),) * 2, block_tokens=2))
    tiles = np.full((12, 68), 0xFF, np.uint8)
    tiles[:, 64:] = np.ones((12, 2), "<f2").view(np.uint8)
    write(path, layout, [tiles] * 3)
    assert read(path, layout)[1] == [tiles.tobytes()] * 3
    worse = tiles.copy()
    worse[place % 12, 66:] = np.array([value], "<f2").view(np.uint8)
    write(path, layout, [tiles, tiles, worse])
    with pytest.raises(PrefixFileError, match="block 2 holds NaN or infinity"):
        read(path, layout)


def test_a_file_that_changes_between_two_readings_is_noticed(path: Path) -> None:
    data = write(path)
    with PrefixReader(path, LAYOUT, 3) as reader:
        reader.begin()
        reader.verify()
        path.write_bytes(whole(header(), [BLOCKS[1], BLOCKS[0], BLOCKS[2]]))
        with pytest.raises(PrefixFileError, match="checksum"):
            reader.read(1)
        path.write_bytes(data[:-1])
        with pytest.raises(PrefixFileError, match="became shorter"):
            reader.read(2)


def test_what_is_no_file_does_not_hold_anybody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(PrefixFileError, match="no regular file"):
            read(name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


# --- writing ---


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("n_written", [None, 0, 2, 3])
def test_leaving_without_commit_leaves_everything_as_it_was(path: Path, n_written: int | None) -> None:
    path.write_bytes(b"before")
    before = fds()
    with PrefixWriter(path, LAYOUT, TOKENS) as writer:
        if n_written is not None:
            writer.begin()
            for block in BLOCKS[:n_written]:
                writer.write(block.view(np.uint8))
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"before"
    assert fds() == before


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_leaves_everything_as_it_was(path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"before")
    before = fds()
    calls = 0
    real = getattr(os, call)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (4 if call == "write" else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(f"mer.io.new_file.os.{call}", failing)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    monkeypatch.undo()
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"before"
    assert fds() == before


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "missing" / "file")


@pytest.mark.parametrize("name", ["", "x" * 17, "\u00e9", "a\nb"])
def test_names_that_the_header_cannot_hold_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="1 to 16 printable"):
        attrs.evolve(LAYOUT, kv_type=name)
