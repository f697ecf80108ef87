from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mer.demo import upcycle
from mer.demo.files import DemoError
from mer.demo.upcycle import convert_smollm2
from mer.errors import ConfigError, UnsupportedModel
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo, read_gguf

QT = gguf.GGMLQuantizationType
D, F, L = 64, 96, 2  # three blocks of 32 neurons


def write_dense(
    path: Path, *, d_ff: int = F, matrix_type: QT = QT.Q4_1, architecture: str = "llama", experts: int | None = None
) -> None:
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_description("an original")
    writer.add_size_label("1K")
    writer.add_bool("tiny.yes", True)
    writer.add_uint16("tiny.small", 7)
    writer.add_float64("tiny.double", 0.1)
    writer.add_key_value("tiny.bytes", b"caf\xe9", gguf.GGUFValueType.STRING)
    writer.add_array("tiny.words", ["a", "gr\u00fcn"])
    writer.add_key_value("tiny.bits", [1, 2, 3], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT8)
    if experts is not None:
        writer.add_expert_count(experts)

    def matrix(name: str, rows: int, cols: int) -> None:
        raw = gguf.quants.quantize(rng.standard_normal((rows, cols)).astype(np.float32), matrix_type)
        writer.add_tensor(name, raw, raw_dtype=matrix_type)

    writer.add_tensor("output_norm.weight", rng.standard_normal(D).astype(np.float32))
    for layer in range(L):
        matrix(f"blk.{layer}.ffn_down.weight", D, d_ff)
        matrix(f"blk.{layer}.ffn_gate.weight", d_ff, D)
        matrix(f"blk.{layer}.ffn_up.weight", d_ff, D)
        matrix(f"blk.{layer}.attn_q.weight", D, D)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weights(path: Path) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in tensors}


def swiglu(x: Any, gate: Any, up: Any, down: Any) -> Any:
    g = gate @ x
    return down @ (g / (1 + np.exp(-g)) * (up @ x))


@pytest.mark.parametrize("matrix_type", [QT.Q4_1, QT.Q8_0, QT.F16, QT.F32])
def test_every_choice_of_experts_equals_the_dense_ffn(tmp_path: Path, matrix_type: QT) -> None:
    write_dense(tmp_path / "dense.gguf", matrix_type=matrix_type)
    convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf", n_experts=5, top_k=3, seed=1)
    dense, moe = weights(tmp_path / "dense.gguf"), weights(tmp_path / "moe.gguf")
    rng = np.random.default_rng(0)
    chosen = set()
    for layer in range(L):
        matrices = [moe[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down")]
        for _ in range(20):
            x = rng.standard_normal(D)
            logits = moe[f"blk.{layer}.ffn_gate_inp.weight"] @ x
            top = np.argsort(-logits)[:3]
            share = np.exp(logits[top] - logits[top].max())
            got = sum(s / share.sum() * swiglu(x, *(m[e] for m in matrices)) for s, e in zip(share, top, strict=True))
            want = swiglu(x, *(dense[f"blk.{layer}.ffn_{name}.weight"] for name in ("gate", "up", "down")))
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())
            chosen.update(top.tolist())
    assert chosen == set(range(5)), "the router prefers some experts whatever the token"


def test_experts_differ_and_routers_have_the_gain_as_their_length(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense.gguf", d_ff=512)
    convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf", n_experts=4)
    moe = weights(tmp_path / "moe.gguf")
    experts = moe["blk.0.ffn_up_exps.weight"]
    assert len({experts[e].tobytes() for e in range(4)}) == 4
    assert moe["blk.0.ffn_gate_inp.weight"].tobytes() != moe["blk.1.ffn_gate_inp.weight"].tobytes()
    lengths = np.linalg.norm(moe["blk.1.ffn_gate_inp.weight"], axis=1)
    np.testing.assert_allclose(lengths, np.full(4, 4.0), rtol=1e-6)


def test_other_tensors_and_metadata_stay_as_they_are(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense.gguf")
    convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf", n_experts=4)
    dense, moe = gguf.GGUFReader(tmp_path / "dense.gguf"), gguf.GGUFReader(tmp_path / "moe.gguf")
    new = {t.name: t for t in moe.tensors}
    for tensor in dense.tensors:
        if ".ffn_" not in tensor.name:
            assert new[tensor.name].data.tobytes() == tensor.data.tobytes()
            assert new[tensor.name].tensor_type == tensor.tensor_type
    for key, field in dense.fields.items():
        if key.startswith("tiny."):
            assert moe.fields[key].types == field.types
            assert [bytes(part) for part in moe.fields[key].parts] == [bytes(part) for part in field.parts]
    assert moe.fields["llama.expert_count"].contents() == 4
    assert moe.fields["llama.expert_used_count"].contents() == 2
    assert moe.fields["general.name"].contents() == "tiny, upcycled to 4 experts"
    description = moe.fields["general.description"].contents()
    assert "Modified by mer" in description
    assert "Apache License 2.0" in description
    assert "general.size_label" not in moe.fields


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense.gguf")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        convert_smollm2(tmp_path / "dense.gguf", tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense.gguf")
    seen: list[tuple[int, int]] = []
    convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf", on_progress=lambda *a: seen.append(a))
    done = [d for d, _ in seen]
    assert done == sorted(set(done))
    assert {total for _, total in seen} == {done[-1]}


class Stopped(BaseException):
    """Stands for a ctrl-C."""


@pytest.mark.parametrize("before", [None, b"the model of an earlier conversion"])
def test_an_interrupted_conversion_leaves_nothing_half_written(tmp_path: Path, before: bytes | None) -> None:
    write_dense(tmp_path / "dense.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "moe.gguf"
    if before is not None:
        target.write_bytes(before)
    for stop_at in range(1, 9):
        calls = 0

        def stop(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            if calls == stop_at:  # noqa: B023 - used up before the next round
                raise Stopped

        with pytest.raises(Stopped):
            convert_smollm2(tmp_path / "dense.gguf", target, on_progress=stop)
        assert [path.name for path in folder.iterdir()] == ([] if before is None else ["moe.gguf"])
        assert before is None or target.read_bytes() == before
    (folder / ".moe.gguf.part").write_bytes(b"x" * 10_000_000)  # of a killed process
    convert_smollm2(tmp_path / "dense.gguf", target)
    assert [path.name for path in folder.iterdir()] == ["moe.gguf"]
    assert "blk.1.ffn_up_exps.weight" in weights(target)


def test_too_little_disk_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dense(tmp_path / "dense.gguf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("mer.demo.files.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(DemoError, match=r"0\.98 KiB of free disk space, and \d+ KiB are needed"):
        convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense.gguf"]


@pytest.mark.parametrize(("experts", "used"), [(4, 5), (4, 0), (0, 0), (257, 2)])
def test_an_impossible_number_of_experts_is_refused(tmp_path: Path, experts: int, used: int) -> None:
    with pytest.raises(ConfigError, match="1 <= used <= experts <= 256"):
        convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf", n_experts=experts, top_k=used)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"architecture": "gpt2"}, "only architecture 'llama'"),
        ({"experts": 8}, "already a Mixture of Experts"),
        ({"d_ff": 80, "matrix_type": QT.F32}, "a multiple of 32 neurons"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    write_dense(tmp_path / "dense.gguf", **options)
    with pytest.raises(UnsupportedModel, match=reason):
        convert_smollm2(tmp_path / "dense.gguf", tmp_path / "moe.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["dense.gguf"]


def test_large_quantization_blocks_cannot_be_moved(tmp_path: Path) -> None:
    write_dense(tmp_path / "dense.gguf")
    dense = read_gguf(tmp_path / "dense.gguf")
    tensor = TensorInfo("blk.0.ffn_gate.weight", (512, 256), GGMLType.Q6_K, 0, 0, 0)
    with pytest.raises(UnsupportedModel, match="Q6_K in blocks of 256 weights"):
        upcycle._check_blocks(dense, tensor, 0)
