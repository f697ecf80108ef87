"""The memory budget holds for the whole process, under a limit that kills or refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tests._lib.capped import CappedRun, run_capped
from tests._lib.tiny_models import random_gguf

PROMPT = ",".join(str(5 + 7 * i % 290) for i in range(70))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose 190 MB of experts are well above what the fixed parts of a plan leave unused."""
    return random_gguf(
        tmp_path_factory.mktemp("model") / "wide.gguf",
        weight_type=gguf.GGMLQuantizationType.F16,
        n_layers=3, n_experts=24, d_model=384, d_ff=1152, n_heads=6, n_kv_heads=2,
    )  # fmt: skip


def floor_bytes(model: Path) -> int:
    """Ask a process of its own: what this one holds already would count."""
    command = [sys.executable, "-m", "mer", "plan", str(model), "--json", "--memory", "8GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["floor_bytes"])


def run(model: Path, memory: int, limit: int, cache: Path | None = None) -> CappedRun:
    command = [sys.executable, "-m", "mer", "run", "-m", str(model), "--tokens", PROMPT, "--max-tokens", "12", "--json"]
    command += ["--ignore-eos", "--memory", f"{memory}B"]
    return run_capped(command, limit, {} if cache is None else {"XDG_CACHE_HOME": str(cache)})


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_smallest_budget_holds_under_a_real_limit(model: Path, tmp_path: Path, cache: str) -> None:
    floor = floor_bytes(model)
    unlimited = run(model, 4 << 30, 8 << 30)
    assert unlimited.returncode == 0, unlimited.stderr
    capped = run(model, floor, floor, tmp_path if cache == "cold" else None)
    assert capped.returncode == 0, f"{capped.limit}: {capped.stderr}"
    want, got = json.loads(unlimited.stdout), json.loads(capped.stdout)
    assert got["tokens"] == want["tokens"]
    assert got["stats"]["cache_misses"] > want["stats"]["cache_misses"]  # it did stream


def test_a_larger_budget_is_used_and_holds(model: Path) -> None:
    floor = floor_bytes(model)
    capped = run(model, floor + (60 << 20), floor + (60 << 20))
    assert capped.returncode == 0, f"{capped.limit}: {capped.stderr}"


def test_the_limit_would_be_noticed(model: Path) -> None:
    """All experts in memory do not fit the floor: the limit of these tests does bite."""
    floor = floor_bytes(model)
    greedy = run(model, 4 << 30, floor)
    assert greedy.returncode not in (0, 2, 3)


def test_one_byte_less_is_refused(model: Path) -> None:
    floor = floor_bytes(model)
    refused = run(model, floor - 1, 8 << 30)
    assert refused.returncode == 4
    assert "expert slots" in refused.stderr
