"""Damage at random: a file either parses, and then means what the `gguf` package says it means, or is a GGUFError."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import GGUFError
from mer.io.gguf import GGUFFile, read_gguf
from tests._lib import gguf_bytes as gb

BLOB = gb.build(
    [
        gb.text("general.architecture", "llama"),
        gb.scalar("general.alignment", gb.U32, 64),
        gb.scalar("llama.expert_count", gb.U32, 8),
        gb.scalar("llama.rope.freq_base", gb.F32, 10000.0),
        gb.scalar("b", gb.BOOL, 1),
        gb.strings("tokenizer.ggml.tokens", ["<s>", "a", "é"]),
        gb.array("tokenizer.ggml.scores", gb.F32, [0.0, -1.0, -2.0]),
        gb.array("bools", gb.BOOL, [1, 0, 1]),
    ],
    [
        gb.Tensor(name="blk.0.ffn_gate_exps.weight", dims=(32, 3, 2), type=2, n_bytes=108),
        gb.Tensor(name="blk.0.attn_norm.weight", dims=(32,), n_bytes=128),
        gb.Tensor(name="output.weight", dims=(256, 2), type=14, n_bytes=420),
    ],
    alignment=64,
)


def parse(path: Path, blob: bytes) -> GGUFFile | None:
    """Return the header, or None where the file is refused with a GGUFError; anything else is the test's failure."""
    path.write_bytes(blob)
    try:
        header = read_gguf(path)
    except GGUFError:
        return None
    extents = sorted((info.offset, info.offset + info.n_bytes) for info in header.tensors.values())
    assert all(header.header_bytes <= start < end <= len(blob) for start, end in extents)
    assert all(before[1] <= after[0] for before, after in pairwise(extents))
    return header


def agrees_with_the_package(header: GGUFFile, path: Path) -> bool:
    """Whether `gguf.GGUFReader` sees the same tensors and the same scalars."""
    theirs = gguf.GGUFReader(path)
    tensors = {
        tensor.name: (tuple(tensor.shape.tolist()[::-1]), int(tensor.tensor_type), tensor.data_offset, tensor.n_bytes)
        for tensor in theirs.tensors
    }
    ours = {name: (info.shape, int(info.type), info.offset, info.n_bytes) for name, info in header.tensors.items()}
    scalars = {key: value for key, value in header.metadata.items() if isinstance(value, bool | int)}
    return ours == tensors and all(theirs.fields[key].contents() == value for key, value in scalars.items())


def test_the_undamaged_file_is_sound(tmp_path: Path) -> None:
    header = parse(tmp_path / "m.gguf", BLOB)
    assert header is not None
    assert agrees_with_the_package(header, tmp_path / "m.gguf")


def test_any_byte_may_be_damaged(tmp_path: Path) -> None:
    header = parse(tmp_path / "m.gguf", BLOB)
    assert header is not None
    outcomes = set()
    for index in range(header.header_bytes):
        for damage in (0x00, 0xFF, BLOB[index] ^ 1, BLOB[index] ^ 0x80, BLOB[index] + 1 & 0xFF):
            mutant = bytearray(BLOB)
            mutant[index] = damage
            outcomes.add(parse(tmp_path / "m.gguf", bytes(mutant)) is None)
    assert outcomes == {True, False}


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_files_that_parse_mean_what_the_package_says(data: st.DataObject) -> None:
    mutant = bytearray(BLOB)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, 640))
        mutant[index] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.gguf")
        header = parse(path, bytes(mutant))
        assert header is None or agrees_with_the_package(header, path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_may_be_cut_out_doubled_or_replaced(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(BLOB)))
    end = data.draw(st.integers(start, min(len(BLOB), start + 40)))
    middle = data.draw(st.one_of(st.binary(max_size=40), st.just(BLOB[start:end] * 2)))
    with tempfile.TemporaryDirectory() as folder:
        parse(Path(folder, "m.gguf"), BLOB[:start] + middle + BLOB[end:])


WEIRD = st.sampled_from(
    [0, 1, 2, 31, 32, 64, 255, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
)


@settings(max_examples=300, deadline=None)
@given(
    tensors=st.lists(
        st.builds(
            gb.Tensor,
            name=st.sampled_from(["a", "b", "c", "d"]),
            dims=st.lists(st.one_of(st.integers(1, 64), WEIRD), min_size=1, max_size=4),
            type=st.one_of(st.sampled_from([0, 1, 2, 24]), st.integers(0, 45)),
            offset=st.one_of(st.none(), st.integers(0, 20).map(lambda block: 32 * block), WEIRD),
            n_bytes=st.integers(0, 512),
        ),
        max_size=4,
    )
)
def test_tensors_of_absurd_sizes_agree_with_exact_arithmetic(tensors: list[gb.Tensor]) -> None:
    blob = gb.build(tensors=tensors)
    head = len(gb.build(tensors=tensors, data=b""))
    with tempfile.TemporaryDirectory() as folder:
        header = parse(Path(folder, "m.gguf"), blob)
    extents = []
    sound = len({tensor.name for tensor in tensors}) == len(tensors)
    end = 0
    for tensor in tensors:
        start = -(-end // 32) * 32
        end = start + tensor.n_bytes
        offset = head + (start if tensor.offset is None else tensor.offset)
        sizes = {int(type_): size for type_, size in gguf.GGML_QUANT_SIZES.items()}
        block, block_bytes = sizes.get(tensor.type, (0, 0))
        elements = int(np.prod(np.array(tensor.dims, dtype=object)))
        if not block or tensor.dims[0] % block or not 0 < elements < 2**63 or offset % 32:
            sound = False
            continue
        extents.append((offset, offset + elements // block * block_bytes))
    extents.sort()
    sound = sound and all(end <= len(blob) for _, end in extents)
    sound = sound and all(before[1] <= after[0] for before, after in pairwise(extents))
    assert (header is not None) == sound
    if header is not None:
        assert sorted((info.offset, info.offset + info.n_bytes) for info in header.tensors.values()) == extents
