from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest

from mer.cli.app import run_app
from mer.compute.kernels.target import FORM
from mer.embedded import embedded_model_path
from mer.plan import device as devices
from tests._lib.tiny_models import random_gguf
from tests.demo.test_upcycle import write_dense


def test_describes_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["inspect", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    reader = gguf.GGUFReader(embedded_model_path())
    experts = sum(t.n_bytes for t in reader.tensors if "_exps." in t.name)
    everything = sum(t.n_bytes for t in reader.tensors)
    assert report["runnable"] is True
    assert report["license"] == "cc0-1.0"
    assert report["parameters"] == sum(int(np.prod(t.shape)) for t in reader.tensors)
    assert report["experts"] == {
        "naming": "merged",
        "bytes": experts,
        "largest_bytes": experts // 48,
        "bytes_per_token": experts * 2 // 8,
    }
    assert report["dense_bytes"] == everything - experts
    assert report["model"]["n_experts"] == 8
    assert report["model"]["routing"] == "softmax over the chosen"
    assert report["metadata"]["llama.block_count"] == 6
    assert report["metadata"]["tokenizer.ggml.tokens"]["count"] == 4096


def test_prints_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["inspect", str(embedded_model_path()), "--tensors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "can be run     yes" in lines
    assert f"kernels        {FORM.value}" in lines
    assert "layers         6, 8 experts each, 2 per token (softmax over the chosen)" in lines
    assert sum(line.startswith("blk.") for line in lines) == 60


def test_json_has_no_words_of_its_own_for_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"general.odd": math.nan, "general.odds": [math.inf, 1.0], "general.name": "two\nlines\x1b[31m"}
    path = random_gguf(tmp_path / "m.gguf", metadata=odd)
    assert run_app(["inspect", "--json", str(path)]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert report["metadata"]["general.odd"] is None
    assert report["metadata"]["general.odds"] == {"count": 2, "first": [None, 1.0]}
    assert run_app(["inspect", str(path)]) == 0
    assert "name           two\\nlines\\x1b[31m" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("failure", [None, "no NVIDIA driver is loaded"])
def test_says_which_device_would_compute(
    failure: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_cuda_failure", lambda index: failure)
    monkeypatch.setattr("mer.compute.cuda.probe.cuda_memory", lambda index: ("H200", 5, 7))
    assert run_app(["inspect"]) == 0
    found = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("device "))
    want = "cuda:0 (H200) (auto: torch can use it)" if failure is None else f"cpu (auto: {failure})"
    assert found == f"device         {want}"


def test_a_model_that_cannot_be_run_is_described_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dense(tmp_path / "dense.gguf")
    assert run_app(["inspect", str(tmp_path / "dense.gguf")]) == 0
    out = capsys.readouterr().out
    assert "can be run     no: " in out
    assert "dense" in out


def test_hostile_metadata_cannot_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("\x1b]0;owned\x07[bold]x[/bold] \u202etxt")
    writer.add_key_value("general.license", b"caf\xe9", gguf.GGUFValueType.STRING)
    writer.add_tensor("a\x1b[2J", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run_app(["inspect", str(tmp_path / "m.gguf"), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\u202e" not in out
    assert "]0;owned" in out
    assert "[bold]x[/bold]" in out
    assert run_app(["inspect", str(tmp_path / "m.gguf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["license"] == "caf?"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model"])
def test_a_bad_file_has_its_exit_code(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert run_app(["inspect", str(path)]) == 3
    assert capsys.readouterr().err.startswith(f"mer: {path}")
    assert run_app(["inspect", str(tmp_path / "absent.gguf")]) == 3
