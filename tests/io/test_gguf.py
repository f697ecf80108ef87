"""Well-formed files, compared with what the `gguf` package writes and reads."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import GGUFError, ReadError
from mer.io import gguf_source
from mer.io.gguf import GGUFFile, read_gguf
from tests._lib import gguf_bytes as gb

VT = gguf.GGUFValueType
ELEMENTS: dict[gguf.GGUFValueType, st.SearchStrategy[Any]] = {
    VT.FLOAT32: st.floats(width=32),
    VT.FLOAT64: st.floats(),
    VT.BOOL: st.booleans(),
    VT.STRING: st.text(),
}
for bits in (8, 16, 32, 64):
    ELEMENTS[getattr(VT, f"UINT{bits}")] = st.integers(0, 2**bits - 1)
    ELEMENTS[getattr(VT, f"INT{bits}")] = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

KEYS = st.text(min_size=1, max_size=20).filter(lambda key: not key.startswith(("general.", "split.", "GGUF.")))
TYPES = st.sampled_from(sorted(gguf.GGML_QUANT_SIZES))


@st.composite
def typed_values(draw: st.DrawFn) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None, Any]:
    type_ = draw(st.sampled_from(sorted(ELEMENTS)))
    if draw(st.booleans()):
        return type_, None, draw(ELEMENTS[type_])
    return VT.ARRAY, type_, draw(st.lists(ELEMENTS[type_], min_size=1, max_size=5))


@st.composite
def tensor_arrays(draw: st.DrawFn) -> tuple[gguf.GGMLQuantizationType, np.ndarray]:
    """Draw a type and an array of raw bytes of shape (*outer, bytes of a row)."""
    type_ = draw(TYPES)
    shape = (*draw(st.lists(st.integers(1, 3), max_size=3)), draw(st.integers(1, 3)) * gguf.GGML_QUANT_SIZES[type_][1])
    return type_, np.arange(np.prod(shape), dtype=np.int64).astype(np.uint8).reshape(shape)


def same(ours: Any, theirs: Any) -> bool:
    """Compare metadata values; NaN equals NaN."""
    if isinstance(ours, float):
        return isinstance(theirs, float) and (
            struct.pack("d", ours) == struct.pack("d", theirs) or ours != ours != theirs
        )
    if isinstance(ours, np.ndarray):
        return np.array_equal(ours, np.array(theirs), equal_nan=ours.dtype.kind == "f")
    return type(ours) is type(theirs) and ours == theirs


def assert_equals_reader(ours: GGUFFile, path: Path) -> None:
    """Compare a header with what `gguf.GGUFReader` says of the same file."""
    theirs = gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, value in ours.metadata.items():
        if len(fields[key].types) > 1 and not fields[key].data:
            assert len(value) == 0  # type: ignore[arg-type]
        else:
            assert same(value, fields[key].contents()), key
    found = {
        tensor.name: (tensor.shape.tolist()[::-1], int(tensor.tensor_type), tensor.data_offset, tensor.n_bytes)
        for tensor in theirs.tensors
    }
    assert {t.name: (list(t.shape), int(t.type), t.offset, t.n_bytes) for t in ours.tensors.values()} == found
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    assert ours.alignment == theirs.alignment


@settings(max_examples=150, deadline=None)
@given(
    entries=st.dictionaries(KEYS, typed_values(), max_size=6),
    tensors=st.dictionaries(st.text("abc.0é", min_size=1, max_size=12), tensor_arrays(), max_size=4),
    alignment=st.sampled_from([None, 8, 32, 64, 4096]),
    first_read_bytes=st.sampled_from([1, 17, 2**20]),
)
def test_files_of_the_writer_are_read_as_its_reader_reads_them(
    entries: dict[str, tuple[gguf.GGUFValueType, gguf.GGUFValueType | None, Any]],
    tensors: dict[str, tuple[gguf.GGMLQuantizationType, np.ndarray]],
    alignment: int | None,
    first_read_bytes: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_source, "FIRST_READ_BYTES", first_read_bytes)
        path = Path(folder, "m.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        for key, (type_, element, value) in entries.items():
            writer.add_key_value(key, value, type_, element)
        if alignment is not None:
            writer.add_custom_alignment(alignment)
        for name, (tensor_type, raw) in tensors.items():
            writer.add_tensor(name, raw, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        header = read_gguf(path)

        assert header.version == 3
        assert header.paths == (path,)
        assert header.file_bytes == (path.stat().st_size,)
        assert header.get_str("general.architecture") == "llama"
        for key, (type_, element, value) in entries.items():
            if type_ == VT.ARRAY:
                assert header.value_types[key].startswith(f"array of {element.name.lower()}")  # type: ignore[union-attr]
            else:
                assert header.value_types[key] == type_.name.lower()
            assert same(header.metadata[key], value), key
        blob = path.read_bytes()
        for name, (tensor_type, raw) in tensors.items():
            info = header.tensors[name]
            assert info.file == 0
            assert int(info.type) == int(tensor_type)
            assert blob[info.offset : info.offset + info.n_bytes] == raw.tobytes()
        assert all(header.header_bytes <= info.offset for info in header.tensors.values())
        assert_equals_reader(header, path)


def write(tmp_path: Path, blob: bytes, name: str = "m.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(blob)
    return path


def test_shapes_are_in_numpy_order(tmp_path: Path) -> None:
    blob = gb.build(tensors=[gb.Tensor(name="experts", dims=(32, 5, 3), type=2, n_bytes=270)])
    info = read_gguf(write(tmp_path, blob)).tensors["experts"]
    assert info.shape == (3, 5, 32)
    assert info.n_bytes == 3 * 5 * 18
    assert info.offset + info.n_bytes == len(blob)


def test_version_2_is_read(tmp_path: Path) -> None:
    header = read_gguf(write(tmp_path, gb.build([gb.text("a", "b")], version=2)))
    assert (header.version, header.get_str("a")) == (2, "b")


def test_a_file_of_metadata_only_is_read(tmp_path: Path) -> None:
    blob = gb.build([gb.text("a", "b")])
    header = read_gguf(write(tmp_path, blob))
    assert dict(header.tensors) == {}
    assert header.header_bytes == len(blob)


def test_empty_arrays_are_read_even_as_the_last_bytes_of_a_file(tmp_path: Path) -> None:
    header = read_gguf(
        write(tmp_path, gb.build([gb.strings("s", []), gb.array("b", gb.BOOL, []), gb.array("f", gb.F32, [])]))
    )
    assert header.get_strings("s") == []
    assert header.get_floats("f").shape == (0,)
    assert header.metadata["b"].dtype == bool  # type: ignore[union-attr]


def test_strings_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    raw = [b"\xe2\x96\x81a", b"\xff\xfe", b"\xe2\x96", b"\x00"]
    header = read_gguf(write(tmp_path, gb.build([gb.strings("tokens", raw), gb.text("one", raw[1])])))
    assert [token.encode("utf-8", "surrogateescape") for token in header.get_strings("tokens")] == raw
    assert header.get_str("one").encode("utf-8", "surrogateescape") == raw[1]


def test_arrays_are_read_only_and_own_their_memory(tmp_path: Path) -> None:
    header = read_gguf(write(tmp_path, gb.build([gb.array("a", gb.I32, [1, -2, 3])])))
    array = header.metadata["a"]
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.int32
    assert array.base is None
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    with pytest.raises(TypeError):
        header.metadata["a"] = 1  # type: ignore[index]


def test_gaps_between_tensors_and_any_order_of_offsets_are_allowed(tmp_path: Path) -> None:
    tensors = [gb.Tensor(name="late", offset=256), gb.Tensor(name="early", offset=0), gb.Tensor(name="mid", offset=128)]
    header = read_gguf(write(tmp_path, gb.build(tensors=tensors, data=bytes(384))))
    assert list(header.tensors) == ["late", "early", "mid"]


def test_a_big_vocabulary_is_read_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_source, "FIRST_READ_BYTES", 1000)
    tokens = [str(i) * (i % 7) for i in range(10_000)]
    header = read_gguf(write(tmp_path, gb.build([gb.strings("tokens", tokens), gb.text("after", "end")])))
    assert header.get_strings("tokens") == tokens
    assert header.get_str("after") == "end"


def test_value_offsets_point_at_the_values(tmp_path: Path) -> None:
    blob = gb.build([gb.scalar("first", gb.U8, 7), gb.scalar("second", gb.U32, 0xAABBCCDD)])
    header = read_gguf(write(tmp_path, blob))
    assert blob[header.value_offsets["first"]] == 7
    assert blob[header.value_offsets["second"] :] == b"\xdd\xcc\xbb\xaa"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 3), offset))
    header = read_gguf(write(tmp_path, gb.build([gb.text("a", "b" * 100)], [gb.Tensor()])))
    assert header.get_str("a") == "b" * 100


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 60 - offset), offset))
    path = write(tmp_path, gb.build([gb.text("a", "b" * 100)], [gb.Tensor()]))
    with pytest.raises(GGUFError, match="became shorter") as caught:
        read_gguf(path)
    assert caught.value.offset == 60


def test_a_failing_disk_is_a_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, n: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ReadError, match="Input/output") as caught:
        read_gguf(write(tmp_path, gb.build([gb.text("a", "b")])))
    assert (caught.value.errno, caught.value.offset) == (5, 0)


def test_tensor_data_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes = 2**40
    path = write(tmp_path, gb.build(tensors=[gb.Tensor(dims=(2**38,), n_bytes=0)]))
    os.truncate(path, path.stat().st_size + n_bytes)  # sparse
    header = read_gguf(path)
    assert header.tensors["t"].n_bytes == n_bytes


@pytest.mark.parametrize("values", [[""], ["", ""], ["", "a", ""], ["", "", "a", ""], [""] * 5000 + ["x"], [""] * 9000])
@pytest.mark.parametrize("after", [b"", gb.text("k", "v")])
def test_empty_strings_are_strings_like_others(tmp_path: Path, values: list[str], after: bytes) -> None:
    entries = [gb.strings("s", values), *([after] if after else [])]
    header = read_gguf(write(tmp_path, gb.build(entries)))
    assert header.get_strings("s") == values
    assert header.get_str("k", "") == ("v" if after else "")
