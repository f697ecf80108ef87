"""Models split over several files."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mer.errors import GGUFError
from mer.io import gguf_split
from mer.io.gguf import read_gguf
from mer.io.gguf_source import HeaderLimits
from tests._lib import gguf_bytes as gb


def part_name(index: int, count: int = 3, model: str = "model") -> str:
    return f"{model}-{index + 1:05}-of-{count:05}.gguf"


def split_keys(no: int, count: int = 3, tensors: int = 3) -> list[bytes]:
    return [
        gb.scalar("split.no", gb.U16, no),
        gb.scalar("split.count", gb.U16, count),
        gb.scalar("split.tensors.count", gb.I32, tensors),
    ]


def part(index: int, *extra: bytes, name: str | None = None, **keys: int) -> bytes:
    entries = [*split_keys(keys.pop("no", index), **keys), *extra]
    if index == 0:
        entries.insert(0, gb.text("general.architecture", "llama"))
    return gb.build(entries, [gb.Tensor(name=name or f"t{index}")])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a sound model of three parts."""
    for index in range(3):
        (tmp_path / part_name(index)).write_bytes(part(index))
    return tmp_path


@pytest.mark.parametrize("given", range(3))
def test_any_part_gives_the_whole_model(folder: Path, given: int) -> None:
    header = read_gguf(folder / part_name(given))
    assert header.paths == tuple(folder / part_name(index) for index in range(3))
    assert [(info.name, info.file) for info in header.tensors.values()] == [("t0", 0), ("t1", 1), ("t2", 2)]
    assert header.get_str("general.architecture") == "llama"
    assert header.get_int("split.no") == 0
    assert header.file_bytes == tuple(path.stat().st_size for path in header.paths)
    pattern = bytes(range(1, 129))
    for info in header.tensors.values():
        assert header.paths[info.file].read_bytes()[info.offset : info.offset + info.n_bytes] == pattern


def test_header_bytes_count_every_part(folder: Path) -> None:
    header = read_gguf(folder / part_name(0))
    alone = [gb.build([*split_keys(index)], [gb.Tensor(name=f"t{index}")], data=b"") for index in range(3)]
    first_extra = len(gb.text("general.architecture", "llama"))
    unpadded = sum(len(gb.build(split_keys(index))) + len(gb.string("t0")) + 4 + 16 + 12 for index in range(3))
    assert header.header_bytes == unpadded + first_extra
    assert header.header_bytes <= sum(map(len, alone)) + first_extra


def test_parts_that_the_gguf_package_writes_are_joined(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    arrays: dict[str, Any] = {f"w{i}": np.full((2, 8), i, dtype=np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file(tmp_path / "big.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf(tmp_path / part_name(2, model="big"))
    assert len(header.paths) == 3
    for name, array in arrays.items():
        info = header.tensors[name]
        raw = header.paths[info.file].read_bytes()[info.offset : info.offset + info.n_bytes]
        assert raw == array.tobytes()


def test_links_to_parts_are_joined_by_the_links_own_names(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    links = tmp_path_factory.mktemp("links")
    for index in range(3):
        blob = folder / f"blob{index}"
        (folder / part_name(index)).rename(blob)
        (links / part_name(index)).symlink_to(blob)
    assert len(read_gguf(links / part_name(1)).tensors) == 3


def check_refused(path: Path, reason: str, blamed: Path | None = None) -> None:
    with pytest.raises(GGUFError, match=reason) as caught:
        read_gguf(path)
    assert caught.value.path == (blamed or path)


@pytest.mark.parametrize(("given", "missing"), [(0, 1), (0, 2), (2, 0), (1, 2)])
def test_a_missing_part_is_named(folder: Path, given: int, missing: int) -> None:
    (folder / part_name(missing)).unlink()
    check_refused(
        folder / part_name(given),
        f"part {missing + 1} of 3 is missing.*needed with {part_name(given)}",
        folder / part_name(missing),
    )


def test_a_dangling_part_is_named(folder: Path) -> None:
    (folder / part_name(1)).unlink()
    (folder / part_name(1)).symlink_to("nowhere")
    check_refused(folder / part_name(0), "cannot be opened: No such file", folder / part_name(1))


def test_the_same_part_twice_is_refused(folder: Path) -> None:
    (folder / part_name(2)).unlink()
    os.link(folder / part_name(1), folder / part_name(2))
    check_refused(folder / part_name(0), "says part 2 of the model, but the name says part 3", folder / part_name(2))


def test_a_part_under_another_parts_name_is_refused(folder: Path) -> None:
    (folder / part_name(0)).write_bytes(part(0, no=1))
    check_refused(folder / part_name(0), "says part 2 of the model, but the name says part 1")


@pytest.mark.parametrize("given", range(3))
def test_a_count_that_differs_from_the_name_is_refused(folder: Path, given: int) -> None:
    (folder / part_name(1)).write_bytes(part(1, count=4))
    with pytest.raises(GGUFError, match=r"split\.count' is 4, (but|so the file must have a name like)"):
        read_gguf(folder / part_name(given))


@pytest.mark.parametrize(
    "other",
    [gb.text("general.architecture", "qwen3moe"), gb.text("general.name", "other")],
    ids=["architecture", "name"],
)
def test_parts_of_two_models_are_refused(folder: Path, other: bytes) -> None:
    (folder / part_name(2)).write_bytes(part(2, other))
    check_refused(folder / part_name(0), "they are parts of two models", folder / part_name(2))


@pytest.mark.parametrize("index", [0, 2])
def test_a_name_of_another_type_is_refused(folder: Path, index: int) -> None:
    for other in range(3):
        (folder / part_name(other)).write_bytes(part(other, gb.text("general.name", "model")))
    (folder / part_name(index)).write_bytes(part(index, gb.array("general.name", gb.U8, [1, 2])))
    check_refused(folder / part_name(0), "array of uint8; it must be a string", folder / part_name(index))


def test_parts_that_disagree_on_the_number_of_tensors_are_refused(folder: Path) -> None:
    (folder / part_name(2)).write_bytes(part(2, tensors=4))
    check_refused(folder / part_name(0), r"split\.tensors\.count' is 4, but 3 in model-00001", folder / part_name(2))


def test_a_wrong_number_of_tensors_is_refused(folder: Path) -> None:
    for index in range(3):
        (folder / part_name(index)).write_bytes(part(index, tensors=4))
    check_refused(folder / part_name(0), "is 4, but the 3 parts hold 3 tensors")


def test_a_tensor_in_two_parts_is_refused(folder: Path) -> None:
    (folder / part_name(2)).write_bytes(part(2, name="t1"))
    check_refused(folder / part_name(0), "'t1' is also in model-00002-of-00003.gguf", folder / part_name(2))


def test_a_part_without_split_keys_is_refused(folder: Path) -> None:
    (folder / part_name(1)).write_bytes(gb.build([], [gb.Tensor(name="t1")]))
    check_refused(folder / part_name(0), r"lacks the key 'split\.no'", folder / part_name(1))
    check_refused(folder / part_name(1), r"is named as one of 3 parts, but its metadata does not say so")


def test_a_part_with_another_name_is_refused(folder: Path) -> None:
    (folder / part_name(1)).rename(folder / "renamed.gguf")
    check_refused(folder / "renamed.gguf", r"must have a name like MODEL-00002-of-00003\.gguf")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([gb.scalar("split.count", gb.I16, -1)], "is -1; it must be at least 0"),
        ([gb.scalar("split.count", gb.U32, 1025)], "is 1025; it must be at most 1024"),
        ([gb.text("split.count", "3")], "has the type string; it must be an integer"),
        ([gb.scalar("split.count", gb.U16, 3), gb.scalar("split.no", gb.U16, 3)], "is 3; it must be at most 2"),
        ([gb.scalar("split.no", gb.U16, 1)], "is 1; it must be at most 0"),
    ],
)
def test_absurd_split_keys_are_refused(tmp_path: Path, keys: list[bytes], reason: str) -> None:
    path = tmp_path / part_name(0)
    path.write_bytes(gb.build(keys, [gb.Tensor()]))
    check_refused(path, reason)


def test_a_malformed_part_is_the_one_blamed(folder: Path) -> None:
    (folder / part_name(1)).write_bytes(b"GGUF")
    check_refused(folder / part_name(0), "the version reaches to byte 8", folder / part_name(1))


@pytest.mark.parametrize("name", [part_name(0, 1), "whole.gguf", part_name(0, 3)])
@pytest.mark.parametrize("count", [0, 1])  # 0 is what the official tool writes when it has merged the parts
def test_a_model_that_says_it_is_whole_may_have_any_name(tmp_path: Path, name: str, count: int) -> None:
    (tmp_path / name).write_bytes(part(0, count=count, tensors=1))
    assert read_gguf(tmp_path / name).paths == (tmp_path / name,)


def padded(blob: bytes) -> bytes:
    return blob + b"\0" * (-len(blob) % 32)


@pytest.mark.parametrize("first_has_tensors", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_parts_joined_with_cat_are_told_apart(tmp_path: Path, first_has_tensors: bool, order: tuple[int, ...]) -> None:
    parts = [padded(part(index)) for index in range(3)]
    if not first_has_tensors:  # as gguf-split writes a first part with --no-tensor-first-split
        parts[0] = padded(gb.build([gb.text("general.architecture", "llama"), *split_keys(0)]))
    path = tmp_path / "joined.gguf"
    path.write_bytes(b"".join(parts[index] for index in order))
    at = len(parts[order[0]])
    check_refused(path, f"is 3, and another part begins at byte {at}: .* cat; .*llama-gguf-split --merge")


def test_parts_joined_with_cat_under_the_first_ones_name_are_told_apart(tmp_path: Path) -> None:
    first = padded(part(0))
    path = tmp_path / part_name(0)
    path.write_bytes(first + part(1) + part(2))
    reason = f"part 2 of 3 is missing; in {path.name}, another part begins at byte {len(first)}: .* cat"
    check_refused(path, reason, tmp_path / part_name(1))


def test_bytes_behind_a_whole_model_are_nobodys_business(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(padded(gb.build([], [gb.Tensor()])) + part(0))
    assert list(read_gguf(path).tensors) == ["t"]


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"n_tensors": 2}, "claims 1 tensors; at most 0 are possible"),
        ({"n_strings": 5}, "'s' has 2 strings; the arrays of a model may hold"),
        ({"n_bytes": 500}, "reaches beyond the 256 MiB that the headers of a model may take"),
    ],
)
def test_the_parts_of_a_model_share_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], reason: str
) -> None:
    for index in range(3):
        (tmp_path / part_name(index)).write_bytes(part(index, gb.strings("s", ["a", "b"])))
    assert len(read_gguf(tmp_path / part_name(0)).tensors) == 3
    monkeypatch.setattr(gguf_split, "HeaderLimits", partial(HeaderLimits, **limits))
    check_refused(tmp_path / part_name(0), reason, tmp_path / part_name(2))
