"""docs/traces.md is enough to read a trace by: a reader written from it alone, against `TraceReader`."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mer.sched.trace import TraceError, TraceReader

DATA = Path(__file__).parent.parent / "data"
TRACES = sorted(DATA.glob("*.trace"))


def numbers(data: bytes) -> Iterator[int]:
    """Yield the LEB128 numbers of a block."""
    number = shift = 0
    for byte in data:
        number += (byte & 127) << shift
        shift += 7
        if byte < 128:
            assert number < 2**64
            assert shift <= 70
            yield number
            number = shift = 0
    assert not shift, "a number is cut off"


def read_trace(data: bytes) -> tuple[dict[str, Any], list[tuple[int, int, list[int]]], int]:
    """Return the header, the events, and the bytes of a block that was cut off."""
    magic, version, flags, n_layers, n_experts, top_k = struct.unpack_from("<8sHHIII", data)
    assert (magic, version, flags) == (b"MERTRACE", 1, 0)
    assert 1 <= n_layers <= 1024
    assert 1 <= top_k <= n_experts <= 4096
    assert n_layers * n_experts <= 65536
    at = 56 + 8 * n_layers
    sizes = struct.unpack_from(f"<{n_layers}Q", data, 56)
    assert struct.unpack_from("<I", data, at) == (zlib.crc32(data[:at]),)
    header = {"L": n_layers, "E": n_experts, "K": top_k, "fingerprint": data[24:56], "sizes": sizes}
    at += 4
    events = []
    while len(data) - at >= 8:
        length, checksum = struct.unpack_from("<II", data, at)
        assert 1 <= length <= 1_048_576
        if at + 8 + length > len(data):
            break
        payload = data[at + 8 : at + 8 + length]
        assert zlib.crc32(payload) == checksum
        stream = numbers(payload)
        for layer in stream:
            n_tokens, n = next(stream), next(stream)
            experts = [next(stream)]
            while len(experts) < n:
                experts.append(experts[-1] + 1 + next(stream))
            assert layer < n_layers
            assert experts[-1] < n_experts
            events.append((layer, n_tokens, experts))
        at += 8 + length
    return header, events, len(data) - at


def read_with_mer(path: Path) -> tuple[dict[str, Any], list[tuple[int, int, list[int]]], int]:
    with TraceReader(path) as reader:
        events = [(event.layer, event.n_tokens, list(event.experts)) for event in reader]
        h, lost_bytes = reader.header, reader.lost_bytes
    header = {"L": h.n_layers, "E": h.n_experts, "K": h.top_k, "fingerprint": h.fingerprint, "sizes": h.expert_bytes}
    return header, events, lost_bytes


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_both_read_the_same(path: Path) -> None:
    header, events, lost_bytes = read_trace(path.read_bytes())
    assert (header, events, lost_bytes) == read_with_mer(path)
    assert len(events) > 5000
    assert lost_bytes == 0


def test_both_read_the_same_of_a_trace_that_was_cut_off(tmp_path: Path) -> None:
    """The first events of a recorded trace, a block for each, cut off after every byte."""
    content = (DATA / "embedded.trace").read_bytes()
    head, payload = content[:108], content[116:]
    parts = [payload[:11], payload[11:22], payload[22:32]]  # 12 tokens that use 8, 8 and 7 experts
    blocks = [struct.pack("<II", len(part), zlib.crc32(part)) + part for part in parts]
    whole = head + b"".join(blocks)
    path = tmp_path / "t"
    for end in range(len(head), len(whole) + 1):
        path.write_bytes(whole[:end])
        header, events, lost_bytes = read_trace(whole[:end])
        assert (header, events, lost_bytes) == read_with_mer(path)
        assert [len(experts) for _, _, experts in events] == [8, 8, 7][: len(events)]
        assert lost_bytes == end - 108 - sum(map(len, blocks[: len(events)]))


@pytest.mark.parametrize(("at", "to"), [(8, 2), (10, 1), (60, 9), (112, 0), (120, 1)])
def test_both_refuse_damage(at: int, to: int, tmp_path: Path) -> None:
    """Of version, flags, a size of an expert, a block's checksum and its events."""
    content = bytearray((DATA / "embedded.trace").read_bytes())
    content[at] = to
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(AssertionError):
        read_trace(bytes(content))
    with pytest.raises(TraceError):
        read_with_mer(tmp_path / "t")


def test_the_example_in_the_document() -> None:
    assert "`01 01 02 03 00`" in (DATA.parent.parent / "docs" / "traces.md").read_text(encoding="utf-8")
    assert list(numbers(bytes([1, 1, 2, 3, 0]))) == [1, 1, 2, 3, 0]
