from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from mer.bench.datafile import (
    ARCHITECTURE,
    MAX_EXPERTS,
    DataFileBusy,
    DataPlan,
    NotEnoughDisk,
    make_data,
    open_data,
    plan_data,
    random_matrix,
)
from mer.bench.geometry import WEIGHT_TYPES, parse_geometry
from mer.errors import ConfigError, GGUFError
from mer.io.ggml import GGMLType


def tiny(folder: Path, text: str = "64x32", weight_type: str = "q4_0", shape: tuple[int, int] = (2, 3)) -> DataPlan:
    return plan_data(folder, parse_geometry(text, weight_type), *shape)


def silent(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_the_file_holds_every_expert_behind_the_one_before(tmp_path: Path, weight_type: str) -> None:
    plan = tiny(tmp_path / "made", weight_type=weight_type)
    assert open_data(plan) is None
    reports: list[tuple[int, int]] = []
    make_data(plan, lambda done, total: reports.append((done, total)))
    size = plan.geometry.expert_bytes
    assert reports == [(n * size, 6 * size) for n in range(1, 7)]

    data = open_data(plan)
    assert data is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(plan.path).tensors}
    contents = set()
    ends = []
    for layer in range(2):
        for expert in range(3):
            offset, length = data.extent(layer, expert)
            ends.append((offset, length))
            for part, name in zip(data.experts.experts[layer][expert].parts, ("gate", "up", "down"), strict=True):
                tensor = tensors[f"blk.{layer}.ffn_{name}.{expert}.weight"]
                assert tuple(tensor.shape) == ((32, 64) if name == "down" else (64, 32))  # fastest axis first
                assert (part.offset, part.n_bytes) == (tensor.data_offset, tensor.n_bytes)
                assert part.offset % 4096 == 0
                assert offset <= part.offset
                assert part.offset + part.n_bytes <= offset + length
                contents.add(tensor.data.tobytes())
    assert len(contents) == 18  # no two matrices are alike
    assert [offset for offset, _ in ends] == [ends[0][0] + n * plan.stride_bytes for n in range(6)]
    assert abs(plan.n_bytes - os.path.getsize(plan.path)) < 8192
    assert {path.name for path in plan.folder.iterdir()} == {plan.path.name, "stream.lock"}


@pytest.mark.parametrize("kind", WEIGHT_TYPES.values())
@pytest.mark.parametrize("cols", [32, 96, 896, 4096])
def test_weights_are_finite_varied_and_of_a_size_that_keeps_sums_around_one(kind: GGMLType, cols: int) -> None:
    raw = random_matrix(kind, 64, cols, 7)
    weights = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType(int(kind)))
    assert weights.shape == (64, cols)
    assert np.isfinite(weights).all()
    assert 0.5 < np.std(weights) * np.sqrt(cols) < 2.0
    assert abs(np.mean(np.sign(weights))) < 0.1
    assert len(np.unique(np.abs(weights))) > 300


def test_the_same_bytes_every_time() -> None:
    """The first bytes as they were when this version of the data was defined."""
    assert random_matrix(GGMLType.Q4_0, 32, 32, 0)[:18].tobytes().hex() == FIRST_Q4_0
    assert random_matrix(GGMLType.F32, 32, 32, 0)[:16].tobytes().hex() == FIRST_F32
    assert (random_matrix(GGMLType.F32, 32, 32, 0) != random_matrix(GGMLType.F32, 32, 32, 1)).any()


FIRST_Q4_0 = "ffa82279f3bd068366a852c1bb9651f3cd18"
FIRST_F32 = "ffe4223ef3bd06be66a852bebb9651be"


def test_a_named_file_is_used_and_its_folder_must_exist(tmp_path: Path) -> None:
    geometry = parse_geometry("64x32", "q4_0")
    plan = plan_data(tmp_path / "cache", geometry, 1, 2, path=tmp_path / "mine.bin")
    make_data(plan, silent)
    assert (tmp_path / "mine.bin").is_file()
    assert open_data(plan) is not None
    lost = plan_data(tmp_path / "cache", geometry, 1, 2, path=tmp_path / "none" / "mine.bin")
    with pytest.raises(ConfigError, match="is no folder"):
        make_data(lost, silent)


def test_files_of_different_experts_have_different_names(tmp_path: Path) -> None:
    plans = [
        tiny(tmp_path),
        tiny(tmp_path, "32x64"),
        tiny(tmp_path, weight_type="f32"),
        tiny(tmp_path, shape=(1, 3)),
        tiny(tmp_path, shape=(2, 4)),
    ]
    assert len({plan.path for plan in plans}) == 5


@pytest.mark.parametrize(
    ("text", "weight_type", "shape"),
    [("32x64", "q4_0", (2, 3)), ("64x32", "f32", (2, 3)), ("64x32", "q4_0", (2, 4)), ("64x32", "q4_0", (1, 3))],
)
def test_a_file_of_other_experts_is_refused(
    tmp_path: Path, text: str, weight_type: str, shape: tuple[int, int]
) -> None:
    made = tiny(tmp_path)
    make_data(made, silent)
    other = plan_data(tmp_path, parse_geometry(text, weight_type), *shape, path=made.path)
    with pytest.raises(GGUFError, match="name another file with --data"):
        open_data(other)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    plan.path.write_bytes(b"my thesis")
    with pytest.raises(GGUFError):
        open_data(plan)
    assert plan.path.read_bytes() == b"my thesis"
    writer = gguf.GGUFWriter(plan.path, ARCHITECTURE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="not a data file of this version"):
        open_data(plan)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    make_data(plan, silent)
    os.truncate(plan.path, os.path.getsize(plan.path) - 5000)
    with pytest.raises(GGUFError):
        open_data(plan)


def test_too_many_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds up to"):
        tiny(tmp_path, shape=(2, MAX_EXPERTS // 2 + 1))


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.n_bytes + (256 << 20) - 1))
    with pytest.raises(NotEnoughDisk, match=r"takes .* has 256 MiB of free disk space"):
        make_data(plan, silent)
    assert not plan.path.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.n_bytes + (256 << 20)))
    make_data(plan, silent)
    assert plan.path.exists()


def test_an_interruption_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = tiny(tmp_path)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_data(plan, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["stream.lock"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    plan = tiny(tmp_path)
    with open(tmp_path / "stream.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataFileBusy, match="another process"):
            make_data(plan, silent)
    make_data(plan, silent)
