"""Extents of experts: the same bytes for both namings, aligned hulls, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.errors import GGUFError, UnsupportedModel
from mer.io.extents import PROJECTIONS, ExpertMap, ExpertPart, aligned_hull
from mer.io.gguf import read_gguf
from mer.model.experts import map_experts
from mer.model.operators import gated_experts
from tests._lib.tiny_models import Type, random_gguf

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 96, "d_ff": 64, "n_experts": 3, "tokenizer": False}
ALIGNMENTS = st.sampled_from([1, 512, 4096, 65536])


def experts_of(path: Path, n_experts: int = 3, d_ff: int = 64) -> ExpertMap:
    return map_experts(read_gguf(path), {layer: gated_experts(layer, n_experts, 96, d_ff) for layer in range(2)})


def part_bytes(path: Path, part: ExpertPart) -> bytes:
    data = read_gguf(path).paths[part.file].read_bytes()
    return data[part.offset : part.offset + part.n_bytes]


@given(st.integers(0, 2**40), st.integers(1, 2**30), ALIGNMENTS)
def test_hull_is_the_smallest_aligned_cover(offset: int, n_bytes: int, alignment: int) -> None:
    start, length, lead = aligned_hull(offset, n_bytes, alignment)
    assert start % alignment == length % alignment == 0
    assert start + lead == offset
    assert 0 <= lead < alignment
    assert lead + n_bytes <= length < lead + n_bytes + alignment


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q4_0, Type.Q8_0])
@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_both_namings_give_the_same_bytes(tmp_path: Path, kind: Type, alignment: int | None) -> None:
    kwargs = SHAPE | {"weight_type": kind, "alignment": alignment}
    merged = random_gguf(tmp_path / "merged.gguf", **kwargs)
    single = random_gguf(tmp_path / "single.gguf", merged=False, **kwargs)
    written = {t.name: np.ascontiguousarray(t.data).view(np.uint8) for t in gguf.GGUFReader(merged).tensors}
    maps = [(path, experts_of(path)) for path in (merged, single)]
    for layer in range(2):
        for expert in range(3):
            for i, name in enumerate(PROJECTIONS):
                want = written[f"blk.{layer}.ffn_{name}_exps.weight"][expert].tobytes()
                for path, experts in maps:
                    part = experts.experts[layer][expert].parts[i]
                    assert (part.projection, part.rows, part.cols) == (
                        name,
                        *((96, 64) if name == "down" else (64, 96)),
                    )
                    assert part.type.name == kind.name
                    assert part_bytes(path, part) == want
    assert len({experts.total_bytes for _, experts in maps}) == 1
    assert maps[0][1].total_bytes == sum(array.nbytes for name, array in written.items() if "_exps" in name)


def test_experts_of_a_split_model_lie_in_several_files(tmp_path: Path) -> None:
    whole = random_gguf(tmp_path / "whole.gguf", **SHAPE)
    split = random_gguf(tmp_path / "split.gguf", merged=False, split_max_tensors=7, **SHAPE)
    want, got = experts_of(whole), experts_of(split)
    assert len({part.file for layer in got.experts for extents in layer for part in extents.parts}) > 1
    for layer in range(2):
        for theirs, ours in zip(want.experts[layer], got.experts[layer], strict=True):
            for a, b in zip(theirs.parts, ours.parts, strict=True):
                assert part_bytes(whole, a) == part_bytes(split, b)


@pytest.mark.parametrize("merged", [True, False])
def test_a_single_expert_needs_no_axis_of_its_own(tmp_path: Path, merged: bool) -> None:
    path = random_gguf(tmp_path / "m.gguf", merged=merged, **SHAPE | {"n_experts": 1, "top_k": 1})
    flat = random_gguf(
        tmp_path / "flat.gguf",
        tensors={f"blk.{i}.ffn_down_exps.weight": np.ones((96, 64), np.float32) for i in range(2)},
        **SHAPE | {"n_experts": 1, "top_k": 1},
    )
    assert [len(layer) for layer in experts_of(path, 1).experts] == [1, 1]
    assert part_bytes(flat, experts_of(flat, 1).experts[1][0].parts[2]) == np.ones((96, 64), np.float32).tobytes()


MATRIX = np.zeros((64, 96), np.float32)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"drop": ["blk.1.ffn_up_exps.weight"]}, r"'blk\.1\.ffn_up_exps\.weight' is missing"),
        ({"merged": False, "drop": ["blk.0.ffn_gate.2.weight"]}, r"'blk\.0\.ffn_gate\.2\.weight' is missing"),
        ({"merged": False, "tensors": {"blk.0.ffn_gate.3.weight": MATRIX}}, "unexpected expert tensor"),
        ({"merged": False, "tensors": {"blk.0.ffn_gate.01.weight": MATRIX}}, "unexpected expert tensor"),
        ({"tensors": {"blk.2.ffn_gate_exps.weight": MATRIX}}, "unexpected expert tensor"),
        ({"tensors": {"blk.0.ffn_gate.99999999999999999999.weight": MATRIX}}, "unexpected expert tensor"),
        ({"tensors": {"blk.0.ffn_up.0.weight": MATRIX}}, "both merged and per-expert"),
        ({"d_ff": 32}, r"shape \(3, 32, 96\)"),
        ({"n_experts": 4}, r"shape \(4, 64, 96\)"),
        ({"tensors": {"blk.0.ffn_down_exps.weight": np.zeros((3, 64, 96), np.float32)}}, r"need \(3, 96, 64\)"),
    ],
)
def test_wrong_expert_tensors_are_refused(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    path = random_gguf(tmp_path / "m.gguf", **SHAPE | kwargs)
    with pytest.raises(GGUFError, match=message) as caught:
        experts_of(path)
    assert caught.value.path == path


@pytest.mark.parametrize("merged", [True, False])
def test_an_expert_type_without_arithmetic_is_refused_by_name(tmp_path: Path, merged: bool) -> None:
    path = random_gguf(tmp_path / "m.gguf", merged=merged, down_type=Type.TQ2_0, **SHAPE | {"d_ff": 256})
    with pytest.raises(UnsupportedModel, match=r"ffn_down.*TQ2_0.*Q4_0"):
        experts_of(path, d_ff=256)
