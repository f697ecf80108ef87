"""Other ways to store the same model: fused tensors, and blocks that predict further tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest

from mer.compute.reference.model import ReferenceModel
from mer.errors import GGUFError, UnsupportedModel
from mer.io.gguf import read_gguf
from mer.model.loading import Model, check_model
from mer.model.summary import summary
from tests._lib.families import experts
from tests._lib.families.family import VOCAB, Family, Type, write
from tests._lib.resident import batch
from tests._lib.workers import WORKERS, logits_of, run_on

TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, VOCAB, 11)]
SHARED = pytest.mark.parametrize("family", [experts.QWEN2_MOE, experts.QWEN3_MOE], ids=lambda it: it.name)


def loaded(path: Path) -> Model:
    return check_model(read_gguf(path))


@SHARED
@pytest.mark.parametrize("kind", [Type.F32, Type.Q4_0])
def test_fused_tensors_give_the_same_logits_to_the_bit(tmp_path: Path, family: Family, kind: Type) -> None:
    """Heads of 16 or 24, two of them: K and V begin at rows 96 or 144 of `attn_qkv`, and at 32 or 48 after that."""
    paths = [tmp_path / name for name in ("apart.gguf", "fused.gguf")]
    for path, fused in zip(paths, (False, True), strict=True):
        write(path, family, weight_type=kind, fused=fused)
    names = loaded(paths[1]).gguf.tensors
    assert "blk.1.attn_qkv.weight" in names
    assert "blk.1.ffn_gate_up_exps.weight" in names
    assert not {"blk.1.attn_k.weight", "blk.1.ffn_up_exps.weight"} & names.keys()
    a, b = (ReferenceModel(path).logits(TOKENS) for path in paths)
    assert np.array_equal(a, b)
    for device in WORKERS:
        a, b = (logits_of(run_on(device, path, [batch(TOKENS)])[0]) for path in paths)
        assert np.array_equal(a, b), device


def test_an_experts_gate_and_up_are_neighbours(tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "m.gguf", experts.QWEN3_MOE, fused=True).path)
    for layer in model.experts.experts:
        for number, expert in enumerate(layer):
            gate, up, _ = expert.parts
            assert gate.offset + gate.n_bytes == up.offset
            assert gate.offset == layer[0].parts[0].offset + 2 * number * gate.n_bytes


def test_a_fused_tensor_beside_its_parts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", experts.QWEN3_MOE, fused=True).path
    gguf = read_gguf(path)
    gate_up = gguf.tensors["blk.1.ffn_gate_up_exps.weight"]
    more = {"blk.1.ffn_gate_exps.weight": gate_up, "blk.1.attn_q.weight": gguf.tensors["blk.1.attn_qkv.weight"]}
    expected = {"blk.1.ffn_gate_exps.weight": GGUFError, "blk.1.attn_q.weight": UnsupportedModel}
    for name, error in expected.items():
        changed = attrs.evolve(gguf, tensors={**gguf.tensors, name: attrs.evolve(more[name], name=name)})
        with pytest.raises(error, match=name):
            check_model(changed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blk.1.attn_qkv.weight", lambda shape: (shape[0] + 1, shape[1])),
        ("blk.2.ffn_gate_up_exps.weight", lambda shape: (shape[0], shape[1] // 2, shape[2])),
    ],
)
def test_fused_tensors_of_other_shapes_are_refused(
    tmp_path: Path, name: str, change: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> None:
    gguf = read_gguf(write(tmp_path / "m.gguf", experts.QWEN3_MOE, fused=True).path)
    tensor = gguf.tensors[name]
    changed = attrs.evolve(tensor, shape=change(tensor.shape))
    with pytest.raises(GGUFError, match=rf"{name}.*the hyperparameters need"):
        check_model(attrs.evolve(gguf, tensors={**gguf.tensors, name: changed}))


@SHARED
def test_blocks_that_predict_further_tokens_are_neither_run_nor_counted(tmp_path: Path, family: Family) -> None:
    plain = write(tmp_path / "plain.gguf", family)
    more = write(tmp_path / "more.gguf", family, predicting=True)
    a, b = loaded(plain.path), loaded(more.path)
    assert "blk.3.nextn.eh_proj.weight" in b.gguf.tensors
    assert (len(b.spec.layers), b.spec.n_skipped) == (3, 1)
    assert summary(b.spec)["n_skipped_layers"] == 1
    assert a.dense.keys() == b.dense.keys()
    assert a.experts.shape == b.experts.shape
    assert a.experts.total_bytes == b.experts.total_bytes
    one, two = (ReferenceModel(it.path).logits(TOKENS) for it in (plain, more))
    assert np.array_equal(one, two)
    for device in WORKERS:
        one, two = (logits_of(run_on(device, it.path, [batch(TOKENS)])[0]) for it in (plain, more))
        assert np.array_equal(one, two), device


def test_tensors_after_the_blocks_that_a_file_declares_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", experts.QWEN3_MOE, predicting=True).path
    gguf = read_gguf(path)
    for name, error in {"blk.4.attn_norm.weight": UnsupportedModel, "blk.4.ffn_up_exps.weight": GGUFError}.items():
        tensor = attrs.evolve(gguf.tensors[name.replace("4", "3")], name=name)
        with pytest.raises(error, match=name):
            check_model(attrs.evolve(gguf, tensors={**gguf.tensors, name: tensor}))


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_files_of_nothing_but_such_blocks_are_refused_by_name(tmp_path: Path, n_blocks: int) -> None:
    metadata = {"qwen3moe.block_count": n_blocks, "qwen3moe.nextn_predict_layers": 1}
    gguf = read_gguf(write(tmp_path / "m.gguf", experts.QWEN3_MOE, metadata=metadata).path)
    first = {name: tensor for name, tensor in gguf.tensors.items() if not name.startswith("blk.0.")}
    with pytest.raises(UnsupportedModel, match="MTP"):
        check_model(attrs.evolve(gguf, tensors=first))
