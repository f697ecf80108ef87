"""Dense tensors: every shape and type is proven, and nothing unknown is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mer.errors import GGUFError, UnsupportedModel
from mer.io.gguf import TensorInfo, read_gguf
from mer.model.dense import dense_tensors
from mer.model.experts import is_expert_tensor
from mer.model.registry import model_spec
from tests._lib.tiny_models import Arch, Type, random_gguf


def dense_of(path: Path) -> Mapping[str, TensorInfo]:
    gguf = read_gguf(path)
    return dense_tensors(model_spec(gguf), gguf)


@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_dense_tensors_are_all_but_the_experts(tmp_path: Path, arch: Any, merged: bool, tied: bool) -> None:
    path = random_gguf(tmp_path / "m.gguf", arch, merged=merged, tied=tied, weight_type=Type.Q8_0)
    every = read_gguf(path).tensors
    dense = dense_of(path)
    assert dict(dense) == {
        name: tensor for name, tensor in every.items() if "_exps" not in name and ".ffn_" not in name
    } | {name: every[name] for name in every if ".ffn_norm." in name or ".ffn_gate_inp." in name}
    assert ("output.weight" in dense) is not tied
    assert not any(map(is_expert_tensor, dense))


def test_the_router_may_be_half_precision_and_of_a_single_expert(tmp_path: Path) -> None:
    types = {"blk.0.ffn_gate_inp.weight": Type.F16, "blk.1.ffn_gate_inp.weight": Type.BF16}
    dense = dense_of(random_gguf(tmp_path / "m.gguf", types=types))
    assert [dense[f"blk.{i}.ffn_gate_inp.weight"].type.name for i in range(2)] == ["F16", "BF16"]
    flat = {f"blk.{i}.ffn_gate_inp.weight": np.ones(96, np.float32) for i in range(2)}
    single = dense_of(random_gguf(tmp_path / "single.gguf", n_experts=1, top_k=1, tensors=flat))
    assert single["blk.1.ffn_gate_inp.weight"].shape == (1, 96)


NAMES = {
    "llama": [
        "token_embd",
        "output_norm",
        "output",
        "blk.1.attn_norm",
        "blk.0.attn_q",
        "blk.1.attn_k",
        "blk.0.attn_v",
        "blk.1.attn_output",
        "blk.0.ffn_norm",
        "blk.1.ffn_gate_inp",
    ],
    "qwen3moe": ["blk.0.attn_q_norm", "blk.1.attn_k_norm", "blk.1.attn_q", "blk.0.attn_output"],
}
EVERY_NAME = [(arch, name + ".weight") for arch, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("arch", "name"), EVERY_NAME)
def test_tensors_of_another_shape_are_refused(tmp_path: Path, arch: Any, name: str) -> None:
    good = read_gguf(random_gguf(tmp_path / "good.gguf", arch)).tensors[name]
    for shape in ((*good.shape[:-1], good.shape[-1] + 2), (2, *good.shape), (good.shape[0] + 1, *good.shape[1:])):
        path = random_gguf(tmp_path / "m.gguf", arch, tensors={name: np.zeros(shape, np.float32)})
        with pytest.raises(GGUFError, match=name):
            dense_of(path)


@pytest.mark.parametrize(("arch", "name"), [pair for pair in EVERY_NAME if pair[1] != "output.weight"])
def test_missing_tensors_are_named(tmp_path: Path, arch: Any, name: str) -> None:
    with pytest.raises(GGUFError, match=f"{name}.* is missing"):
        dense_of(random_gguf(tmp_path / "m.gguf", arch, drop=[name]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blk.0.attn_norm.weight", Type.F16),
        ("output_norm.weight", Type.BF16),
        ("blk.1.ffn_gate_inp.weight", Type.Q8_0),
        ("blk.1.attn_v.weight", Type.TQ1_0),
        ("token_embd.weight", Type.TQ2_0),
    ],
)
def test_types_that_are_not_implemented_are_named(tmp_path: Path, name: str, kind: Type) -> None:
    path = random_gguf(tmp_path / "m.gguf", types={name: kind}, d_model=256, n_heads=8)
    with pytest.raises(UnsupportedModel, match=f"{name}.*{kind.name}"):
        dense_of(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rope_freqs.weight", "RoPE"),
        ("blk.0.attn_q.bias", "bias"),
        ("blk.1.ffn_gate_exps.bias", "bias"),
        ("blk.0.ffn_up_shexp.weight", "shared expert"),
        ("blk.0.attn_q.scale", "NVFP4"),
        ("blk.1.ffn_up_exps.scale", "NVFP4"),
        ("blk.0.ffn_down_exps.input_scale", "NVFP4"),
        ("blk.0.attn_q_norm.weight", "no place"),
        ("blk.2.attn_q.weight", "no place"),
        ("something.else", "no place"),
    ],
)
def test_tensors_without_a_place_are_named(tmp_path: Path, name: str, reason: str) -> None:
    arch: Arch = "qwen3moe" if reason in ("RoPE", "bias") else "llama"
    path = random_gguf(tmp_path / "m.gguf", arch, tensors={name: np.ones(8, np.float32)})
    with pytest.raises(UnsupportedModel, match=f"{name}.*{reason}"):
        dense_of(path)
