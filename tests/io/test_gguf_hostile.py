"""Malformed files: every one is a GGUFError that points at the field to blame, at no cost worth mentioning."""

from __future__ import annotations

import gzip
import os
import re
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from mer.errors import GGUFError
from mer.io.gguf import read_gguf
from mer.io.gguf_header import read_part
from mer.io.gguf_source import HeaderLimits
from tests._lib import gguf_bytes as gb

HEAD_BYTES = 24  # magic, version, number of tensors, number of keys
U64_MAX = 2**64 - 1


@attrs.frozen
class Case:
    """A malformed file, the reason that must be given, and where in the file."""

    blob: bytes
    reason: str  # pattern
    offset: int


def entry(blob: bytes, reason: str, *, at: int) -> Case:
    """A file whose one metadata entry is malformed `at` bytes into the entry."""
    return Case(gb.build([gb.text("ok", "fine"), blob]), reason, HEAD_BYTES + len(gb.text("ok", "fine")) + at)


def tensor(bad: gb.Tensor, reason: str, *, at: int) -> Case:
    """A file whose second tensor info is malformed `at` bytes into the info."""
    first = gb.Tensor(name="ok")
    return Case(gb.build(tensors=[first, bad]), reason, HEAD_BYTES + len(info(first)) + at)


def info(bad: gb.Tensor) -> bytes:
    return gb.string(bad.name) + struct.pack(f"<I{len(bad.dims)}QIQ", 0, *bad.dims, 0, 0)


VALID = gb.build([gb.text("k", "v")], [gb.Tensor()])
K = 8 + 1  # a key field of one character; its value type follows
V = K + 4  # the value of such a key
T = 8 + 1  # a name field of one character; the number of dimensions follows

HEADER_CASES = {
    "wrong magic": Case(b"GGUG" + VALID[4:], "is no GGUF file: it starts with b'GGUG'", 0),
    "html": Case(b"<!DOCTYPE html><html>", "is no GGUF file", 0),
    "lfs pointer": Case(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", 0),
    "gzip": Case(gzip.compress(VALID), "is packed with gzip; unpack it", 0),
    "zip": Case(b"PK\x03\x04" + VALID, "is packed with zip; unpack it", 0),
    "ggjt": Case(b"tjgg" + VALID[4:], "older than GGUF", 0),
    "ggml": Case(b"lmgg" + VALID[4:], "older than GGUF", 0),
    "one byte": Case(b"G", "is no GGUF file", 0),
    "three bytes": Case(b"GGU", "is no GGUF file", 0),
    "magic only": Case(b"GGUF", "the version reaches to byte 8, but the file has 4", 4),
    "version 0": Case(gb.build(version=0), "version 0, and only 2 and 3", 4),
    "version 1": Case(gb.build(version=1), "version 1, and only 2 and 3 .* convert", 4),
    "version 4": Case(gb.build(version=4), "version 4, and only 2 and 3 .* too old", 4),
    "version 2**32-1": Case(gb.build(version=2**32 - 1), "version 4294967295", 4),
    "big-endian 3": Case(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", 4),
    "big-endian 2": Case(b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian", 4),
    "no counts": Case(VALID[:8], "the header reaches to byte 24, but the file has 8", 8),
    "half the counts": Case(VALID[:23], "the header reaches to byte 24", 8),
    "2**64-1 tensors": Case(gb.build(n_tensors=U64_MAX), "claims 18446744073709551615 tensors; at most 0", 8),
    "2**64-1 keys": Case(gb.build(n_keys=U64_MAX), "claims 18446744073709551615 metadata keys; at most 0", 16),
    "more tensors than fit": Case(gb.build([bytes(32)], n_keys=0, n_tensors=1), "claims 1 tensors; at most 0", 8),
    "more keys than fit": Case(gb.build([bytes(27)], n_keys=2), "claims 2 metadata keys; at most 1", 16),
    "more tensors than the limit": Case(
        gb.build([bytes(33 * (2**15 + 1))], n_keys=0, n_tensors=2**15 + 1), "at most 32768 are possible", 8
    ),
    "more keys than the limit": Case(gb.build([bytes(14 * (2**12 + 1))], n_keys=2**12 + 1), "at most 4096", 16),
}

METADATA_CASES = {
    "key longer than the file": entry(gb.string("k", length=999) + bytes(20), "a metadata key reaches to byte", at=0),
    "key of 64 KiB": entry(gb.scalar("k" * 2**16, gb.U8, 1), "length of 65536 bytes; it must have 1 to 65535", at=0),
    "key length 2**64-1": entry(
        gb.key_value("k", gb.U64, bytes(8), key_length=U64_MAX), "length of 18446744073709551615", at=0
    ),
    "empty key": entry(gb.scalar("", gb.U64, 1), "length of 0 bytes; it must have 1 to 65535", at=0),
    "key not UTF-8": entry(gb.scalar(b"ab\xff\xfe", gb.U64, 1), "is not UTF-8", at=8 + 2),
    "key with a surrogate": entry(gb.scalar(b"\xed\xa0\x80", gb.U64, 1), "is not UTF-8", at=8),
    "duplicate key": entry(gb.text("ok", "again"), "the metadata key 'ok' appears twice", at=0),
    "value type 13": entry(gb.key_value("k", 13, bytes(8)), "'k' has the unknown value type 13", at=K),
    "value type 2**32-1": entry(gb.key_value("k", 2**32 - 1, bytes(8)), "unknown value type 4294967295", at=K),
    "bool 2": entry(gb.scalar("k", gb.BOOL, 2), "'k' is a bool of value 2; only 0 and 1", at=V),
    "bool 255": entry(gb.scalar("k", gb.BOOL, 255), "'k' is a bool of value 255", at=V),
    "value truncated": entry(gb.scalar("k", gb.U64, 1)[:-1], "the value of 'k' reaches to byte", at=V),
    "string length truncated": entry(gb.text("k", "")[:-1], "the length of 'k' reaches to byte", at=V),
    "string longer than the file": entry(gb.text("k", "abc", length=4), "the string 'k' reaches to byte", at=V),
    "string length 2**64-1": entry(gb.text("k", "abc", length=U64_MAX), "the string 'k' reaches to byte 184467", at=V),
    "string length -8": entry(gb.text("k", "abc", length=2**64 - 8), "the string 'k' reaches to byte 184467", at=V),
    "array truncated": entry(gb.array("k", gb.U8, [])[:-1], "the array 'k' reaches to byte", at=V),
    "array of arrays": entry(gb.array("k", gb.ARRAY, [0] * 12, count=1), "'k' is an array of arrays", at=V),
    "array of unknown type": entry(gb.array("k", 77, [], count=0), "array of the unknown value type 77", at=V),
    "array longer than the file": entry(
        gb.array("k", gb.F32, [1.0], count=2), "the array 'k' of 2 float32 reaches", at=V
    ),
    "array count 2**64-1": entry(gb.array("k", gb.F64, [], count=U64_MAX), "of 18446744073709551615 float64", at=V),
    "array count wraps to 0": entry(gb.array("k", gb.F64, [], count=2**61), "reaches to byte 184467", at=V),
    "array of bools with a 2": entry(gb.array("k", gb.BOOL, [0, 1, 2]), "neither 0 nor 1", at=V),
    "more strings than fit": entry(gb.strings("k", [""], count=2), "'k' claims 2 strings, but the file has", at=V),
    "2**64-1 strings": entry(gb.strings("k", [""], count=U64_MAX), "claims 18446744073709551615 strings", at=V),
    "last string of an array truncated": entry(
        gb.strings("k", ["aa", "bb"])[:-1], "string 1 of 'k' reaches to byte", at=V + 12 + 10
    ),
    "string of an array longer than the file": entry(
        gb.strings("k", ["aa"])[:-10] + gb.string("aa", length=2**40) + bytes(64), "string 0 of 'k' reaches", at=V + 12
    ),
    "string of an array of 2**64-1": entry(
        gb.strings("k", ["aa"])[:-10] + gb.string("aa", length=U64_MAX) + bytes(64), "string 0 of 'k'", at=V + 12
    ),
    "string lengths of an array missing": entry(
        gb.strings("k", ["a" * 40], count=3), "the length of string 1 of 'k'", at=V + 12 + 48
    ),
    "alignment int32": entry(
        gb.scalar("general.alignment", gb.I32, 32), "has the type int32; it must be uint32", at=29
    ),
    "alignment uint64": entry(gb.scalar("general.alignment", gb.U64, 32), "has the type uint64", at=29),
    "alignment string": entry(gb.text("general.alignment", "32"), "has the type string", at=29),
    "alignment array": entry(gb.array("general.alignment", gb.U32, [32]), "has the type array of uint32", at=29),
    "alignment 0": entry(gb.scalar("general.alignment", gb.U32, 0), "is 0; it must be a power of two", at=29),
    "alignment 48": entry(gb.scalar("general.alignment", gb.U32, 48), "is 48; it must be a power of two", at=29),
    "alignment 2 MiB": entry(gb.scalar("general.alignment", gb.U32, 2**21), "power of two up to 1.00 MiB", at=29),
}

TENSOR_CASES = {
    "name of 65 bytes": tensor(gb.Tensor(name="n" * 65), "length of 65 bytes; it must have 1 to 64", at=0),
    "name length 2**64-1": tensor(gb.Tensor(name_length=U64_MAX), "length of 18446744073709551615", at=0),
    "empty name": tensor(gb.Tensor(name=""), "length of 0 bytes", at=0),
    "name not UTF-8": tensor(gb.Tensor(name=b"a\x80"), "is not UTF-8", at=9),
    "duplicate name": tensor(gb.Tensor(name="ok"), "the tensor 'ok' appears twice", at=0),
    "no dimensions": tensor(gb.Tensor(n_dims=0), "'t' has 0 dimensions; it must have 1 to 4", at=T),
    "five dimensions": tensor(gb.Tensor(dims=(1,) * 5), "'t' has 5 dimensions", at=T),
    "2**32-1 dimensions": tensor(gb.Tensor(n_dims=2**32 - 1), "'t' has 4294967295 dimensions", at=T),
    "dimension 0": tensor(gb.Tensor(dims=(8, 0)), r"dimensions \[8, 0\]; each must be positive", at=T + 4),
    "dimension 2**63": tensor(gb.Tensor(dims=(2**63,)), "each must be positive and their product below", at=T + 4),
    "dimension -1": tensor(gb.Tensor(dims=(8, U64_MAX)), "their product below", at=T + 4),
    "elements wrap to 0": tensor(gb.Tensor(dims=(2**32, 2**32)), "their product below", at=T + 4),
    "elements wrap to 8": tensor(gb.Tensor(dims=(8, 2**63 + 1, 2, 2)), "their product below", at=T + 4),
    "bytes wrap to 0": tensor(gb.Tensor(dims=(2**61, 2), type=28), "takes bytes .* but the file has", at=T + 24),
    "rows of half a block": tensor(
        gb.Tensor(dims=(16, 4), type=2), "rows of 16; Q4_0 needs a multiple of 32", at=T + 4
    ),
    "blocks across rows": tensor(gb.Tensor(dims=(128, 2), type=12), "Q4_K needs a multiple of 256", at=T + 4),
    "type Q4_2": tensor(gb.Tensor(type=4), "type Q4_2, which ggml removed; quantize", at=T + 20),
    "type Q4_0_8_8": tensor(gb.Tensor(type=33), "type Q4_0_8_8, which ggml removed", at=T + 20),
    "type 42": tensor(gb.Tensor(type=42), "unknown type 42", at=T + 20),
    "type 2**32-1": tensor(gb.Tensor(type=2**32 - 1), "unknown type 4294967295", at=T + 20),
    "offset unaligned": tensor(gb.Tensor(offset=130), "offset 130; it must be a multiple of 32", at=T + 24),
    "offset behind the file": tensor(gb.Tensor(offset=2**20), "takes bytes .* but the file has", at=T + 24),
    "offset 2**64-32": tensor(gb.Tensor(offset=2**64 - 32), "takes bytes .* but the file has", at=T + 24),
    "bytes behind the file": tensor(gb.Tensor(dims=(8, 5)), "takes bytes .* but the file has", at=T + 24),
    "same extent": tensor(gb.Tensor(offset=0), "the tensors 'ok' and 't' overlap", at=T + 24),
    "overlap by one block": tensor(gb.Tensor(offset=96), "the tensors 'ok' and 't' overlap", at=T + 24),
    "info truncated": Case(gb.build(tensors=[gb.Tensor(name="n" * 9)], data=b"")[:57], "the description of", 24 + 17),
}


@pytest.mark.parametrize(
    "case", (HEADER_CASES | METADATA_CASES | TENSOR_CASES).values(), ids=HEADER_CASES | METADATA_CASES | TENSOR_CASES
)
def test_malformed_files_are_refused_with_reason_and_place(tmp_path: Path, case: Case) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(case.blob)
    with pytest.raises(GGUFError, match=case.reason) as caught:
        read_gguf(path)
    assert caught.value.offset == case.offset
    assert caught.value.path == path


def test_the_files_that_the_cases_damage_are_sound(tmp_path: Path) -> None:
    for blob in (VALID, gb.build([gb.text("ok", "fine")]), gb.build(tensors=[gb.Tensor(name="ok"), gb.Tensor()])):
        path = tmp_path / "good.gguf"
        path.write_bytes(blob)
        read_gguf(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    blob = gb.build(
        [gb.strings("s", ["a", "bc"]), gb.array("a", gb.U16, [1]), gb.scalar("b", gb.BOOL, 1)], [gb.Tensor()]
    )
    path = tmp_path / "cut.gguf"
    for n_bytes in range(len(blob)):
        path.write_bytes(blob[:n_bytes])
        with pytest.raises(GGUFError):
            read_gguf(path)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "cannot be opened: No such file"),
        (lambda path: path.touch(), "is empty"),
        (Path.mkdir, "is a directory"),
        (make_fifo, "is a FIFO"),
        (make_socket, "cannot be opened"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.symlink_to("nowhere"), "cannot be opened: No such file"),
        (lambda path: path.symlink_to(path.name), "cannot be opened: Too many levels"),
    ],
    ids=["missing", "empty", "directory", "fifo", "socket", "device", "dangling", "loop"],
)
def test_what_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    path = tmp_path / "m"
    make(path)
    with pytest.raises(GGUFError, match=reason) as caught:
        read_gguf(path)
    assert caught.value.offset is None


@pytest.mark.parametrize("path", ["nul\0byte.gguf", "n" * 5000, ""])
def test_impossible_paths_are_refused(path: str) -> None:
    with pytest.raises(GGUFError):
        read_gguf(path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    path = tmp_path / "m.gguf"
    for case in [*HEADER_CASES.values(), *METADATA_CASES.values(), *TENSOR_CASES.values(), Case(VALID, "", 0)]:
        path.write_bytes(case.blob)
        try:
            read_gguf(path)
        except GGUFError:
            continue
    with pytest.raises(GGUFError):
        read_gguf(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_metadata_beyond_the_limit_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.gguf"
    path.write_bytes(gb.build([gb.text("k", b"", length=2**28)]))
    os.truncate(path, 2**29)  # sparse
    read: list[int] = []
    pread = os.pread

    def counting(fd: int, n_bytes: int, offset: int) -> bytes:
        read.append(n_bytes)
        return pread(fd, n_bytes, offset)

    monkeypatch.setattr(os, "pread", counting)
    with pytest.raises(GGUFError, match="reaches beyond the 256 MiB"):
        read_gguf(path)
    assert sum(read) <= 2**20


def test_the_arrays_of_a_file_share_one_limit_on_strings(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([gb.strings("a", ["x"] * 6), gb.strings("b", ["x"] * 4)]))
    assert read_part(path, 0, HeaderLimits(n_strings=10)).get_strings("b") == ["x"] * 4
    path.write_bytes(gb.build([gb.strings("a", ["x"] * 6), gb.strings("b", ["x"] * 5)]))
    with pytest.raises(GGUFError, match="'b' has 5 strings; the arrays of a model may hold 1048576 together"):
        read_part(path, 0, HeaderLimits(n_strings=10))


BAD_END = gb.key_value("end", 99, b"12345678")
COSTLY = {
    "one long string": [gb.text("s", bytes(2**24)), BAD_END],
    "short strings": [gb.strings("s", [b"ab"] * 2**20), BAD_END],
    "numbers": [gb.key_value("n", gb.ARRAY, struct.pack("<IQ", gb.U8, 2**24) + bytes(2**24)), BAD_END],
    "keys": [*(gb.scalar(f"{i:x}", gb.U8, 1) for i in range(2**12 - 1)), BAD_END],
    "long keys": [*(gb.scalar(f"{i:060000}", gb.U8, 1) for i in range(270)), BAD_END],
}


@pytest.mark.slow
@pytest.mark.parametrize("entries", COSTLY.values(), ids=COSTLY)
def test_a_late_error_costs_little_memory(tmp_path: Path, entries: list[bytes]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build(entries))
    assert path.stat().st_size < 17 * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match="unknown value type 99"):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


def test_tensors_at_the_limit_cost_little_memory(tmp_path: Path) -> None:
    tensors = [gb.Tensor(name=f"{i:x}", dims=(1,), n_bytes=0, offset=0) for i in range(2**15)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build(tensors=tensors, data=bytes(64)))
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match="overlap"):
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


def test_an_error_stays_readable_whatever_the_file_calls_things(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([gb.key_value("\n" * 60_000, 99, bytes(8))]))
    with pytest.raises(GGUFError, match="has the unknown value type 99") as caught:
        read_gguf(path)
    assert len(caught.value.reason) < 1000


def test_an_error_is_one_line_of_printable_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([gb.key_value("a\x1b[31m\nb", 99, bytes(8))]))
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    assert str(caught.value).isprintable()
    assert re.fullmatch(r".*m\.gguf at byte \d+: .*", str(caught.value))
