"""What only gpt-oss has: MXFP4 experts, biases on both sides of the bus, and what its files say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.compute.reference.model import ReferenceModel
from mer.errors import GGUFError, UnsupportedModel
from mer.io.gguf import read_gguf
from mer.model.loading import check_model
from mer.model.operators import Activation
from mer.model.summary import summary
from tests._lib.families.family import VOCAB, FamilyModel, Type, write
from tests._lib.families.gpt_oss import GPT_OSS
from tests._lib.resident import batch
from tests._lib.workers import logits_of, run_on

TOKENS = [int(token) for token in np.random.default_rng(5).integers(3, VOCAB, 40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FamilyModel:
    return write(tmp_path_factory.mktemp("gpt-oss") / "m.gguf", GPT_OSS)


@pytest.mark.parametrize("rest", [Type.Q8_0, Type.BF16])
def test_experts_of_mxfp4(tmp_path: Path, rest: Type) -> None:
    """Not with seed 0, whose weights leave two experts so near each other that rounding chooses between them."""
    path = write(tmp_path / "m.gguf", GPT_OSS, variant="blocks", weight_type=rest, expert_type=Type.MXFP4, seed=1).path
    types = {
        part.type.name for layer in check_model(read_gguf(path)).experts.experts for e in layer for part in e.parts
    }
    assert types == {"MXFP4"}
    plain, rounded = (ReferenceModel(path, int8_activations=it).logits(TOKENS) for it in (False, True))

    def apart(device: str, want: np.ndarray) -> float:
        (done,) = run_on(device, path, [batch(TOKENS)])
        return float(np.median(np.abs(logits_of(done) - want).max(-1)) / np.abs(want).max())

    assert apart("cpu", rounded) < min(2e-2, apart("cpu", plain) / 2)
    assert apart("torch-cpu", plain) < 1e-4


@pytest.mark.parametrize("more", [{"hybrid": "auto"}, {"hybrid": "off"}, {"hybrid": "auto", "dense": "cpu"}])
def test_biases_are_on_both_sides_of_the_bus(model: FamilyModel, more: dict[str, Any]) -> None:
    """Device and processor each compute some experts, whichever of them has the dense weights."""
    want = model.greedy(TOKENS[:20], 16)
    settings: dict[str, Any] = {"memory": "8GiB", "device": "torch-cpu", "context": 256, "hybrid": more["hybrid"]}
    if "dense" in more:
        config = mer.EngineConfig(path=model.path, vram="1GiB", **settings)
        vram = mer.plan_memory(mer.load_model(config), config).vram
        assert vram is not None
        settings |= {"vram": vram.floor_bytes - 1, "slots": 7, "activations": "int15"}
    else:
        settings |= {"slots": 7, "vram_slots": 4}

    async def main() -> None:
        async with mer.open_engine(model.path, **settings) as engine:
            for _ in range(2):
                done = await engine.generate(TOKENS[:20], max_tokens=16, ignore_eos=True)
                assert list(done.tokens) == want
            vram = engine.statistics().settings.vram
            assert vram is not None
            assert vram.dense == more.get("dense", "device")

    trio.run(main)


def test_what_a_file_says_of_it(model: FamilyModel) -> None:
    spec = check_model(read_gguf(model.path)).spec
    assert spec.expert_weights[1].activation == Activation(alpha=1.702, limit=7.0, shift=1.0)
    found = summary(spec)
    assert found["sliding_window"] == [13, None, 13]
    assert (found["sinks"], found["qkv_bias"], found["expert_bias"], found["tied_head"]) == (True, True, True, False)
    assert found["activation"] == "alpha 1.702, beta 0, limit 7, shift 1"
    assert (found["rope_yarn"], found["routing"], found["d_ff"]) == (32.0, "softmax over the chosen", 72)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("attention.sliding_window", 0, GGUFError),
        ("expert_gating_func", 2, UnsupportedModel),
        ("rope.freq_base_swa", 10000.0, UnsupportedModel),
        ("rope.freq_base_swa", 150000.0, None),
        ("expert_gating_func", 3, None),
        ("feed_forward_length", 2880, None),
    ],
)
def test_keys(tmp_path: Path, key: str, value: float, error: type[Exception] | None) -> None:
    path = write(tmp_path / "m.gguf", GPT_OSS, metadata={f"gpt-oss.{key}": value}).path
    if error is None:
        check_model(read_gguf(path))
        return
    with pytest.raises(error, match=key):
        check_model(read_gguf(path))
