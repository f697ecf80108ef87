"""The command on the CUDA worker, on torch's `cpu` device: what it prints of the device."""

from __future__ import annotations

import json

import pytest

from mer.cli.app import run_app
from mer.embedded import embedded_model_path

MEMORY = ("--memory", "8GiB")
DEVICE = ("--device", "torch-cpu", "--vram", "256MiB", "--vram-slots", "12", "--hybrid", "off")


def test_run_says_what_the_device_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["run", "Once upon a time", "-n", "6", *MEMORY, *DEVICE]) == 0
    out, err = capsys.readouterr()
    assert len(out) > 5
    assert "device: torch-cpu (as set); VRAM" in err
    assert "of 256 MiB, 12 of 12 slots in use; experts computed there" in err
    assert "in force: torch kernels, float32 activations" in err


def test_plan_lists_the_parts_of_both_memories(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(embedded_model_path())
    assert run_app(["plan", model, *MEMORY, *DEVICE, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    vram = report["vram"]
    assert (report["device"], vram["slots"], vram["dense"]) == ("torch-cpu", 12, "device")
    assert vram["parts"]["expert slots"] == sum(
        n * size for n, size in zip(vram["slot_counts"], vram["slot_bytes"], strict=True)
    )
    assert sum(vram["parts"].values()) + vram["unused_bytes"] == vram["budget_bytes"] == 256 << 20
    assert report["parts"]["torch and CUDA"] > 0
    assert report["parts"]["dense weights"] == 0
    assert run_app(["plan", model, *MEMORY, *DEVICE]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device torch-cpu (as set)\nVRAM 256 MiB (given); the smallest that works is ")
    assert "dense weights, KV and attention on the device (they fit)" in out


def test_a_device_that_is_not_there_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["run", "Once", *MEMORY, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' cannot be used: " in capsys.readouterr().err
    assert run_app(["run", "Once", "--memory", "8GiB", "--device", "torch-cpu", "--vram", "1MiB"]) == 4
    assert "a VRAM budget of 1.00 MiB (given) is too small by" in capsys.readouterr().err
