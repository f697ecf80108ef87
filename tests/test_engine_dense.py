"""Engines of dense models: no experts, no slots, nothing to read once they are open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

import mer
from mer.compute.reference.model import ReferenceModel
from tests._lib.tiny_models import Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("dense") / "m.gguf", "qwen3").path


def greedy(path: Path, n: int) -> list[int]:
    """Return what the reference continues the prompt with."""
    reference, tokens = ReferenceModel(path), list(PROMPT)
    for _ in range(n):
        tokens.append(int(reference.logits(tokens)[-1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
async def test_tokens_are_the_references(path: Path, device: str) -> None:
    want = greedy(path, 6)
    async with mer.open_engine(path, memory=MEMORY, device=device, batch_tokens=24) as engine:
        read = engine.statistics().bytes_read

        async def ask() -> None:
            done = await engine.generate(PROMPT, max_tokens=6, ignore_eos=True)
            assert list(done.tokens) == want

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        statistics = engine.statistics()
        assert statistics.bytes_read == read
        assert (statistics.cache.lookups, statistics.pool.n_slots, statistics.fetcher.started) == (0, 0, 0)
        settings = statistics.settings
        assert (settings.slots, settings.policy, settings.prefetch) == (0, "no", "off")
        assert settings.job_reads == "off: the model has no routed experts"


async def test_a_prefix_is_saved_and_restored(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "prefix"
    prompt = [5 + i * i % 200 for i in range(150)]
    async with mer.open_engine(path, memory=MEMORY) as engine:
        want = await engine.generate(prompt, max_tokens=4, ignore_eos=True)
        await engine.save_prefix(prompt, file)
    async with mer.open_engine(path, memory=MEMORY) as engine:
        assert await engine.load_prefix(file) == 128
        done = await engine.generate(prompt, max_tokens=4, ignore_eos=True)
        assert done.tokens == want.tokens
        assert done.usage.cached_tokens == 128


@pytest.mark.parametrize("setting", [{"policy": "lfu"}, {"trace": "trace"}, {"policy": "static", "heat": "heat"}])
async def test_settings_about_experts_are_refused(path: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        name: str(tmp_path / value) if name != "policy" else value for name, value in setting.items()
    }
    with pytest.raises(mer.ConfigError, match="the model is dense"):
        async with mer.open_engine(path, memory=MEMORY, **settings):
            pass


async def test_there_is_no_heat_profile(path: Path) -> None:
    async with mer.open_engine(path, memory=MEMORY) as engine:
        with pytest.raises(mer.ConfigError, match="dense"):
            engine.heat_profile()


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.F16])
async def test_quantized_tokens_do_not_depend_on_the_batch(tmp_path: Path, kind: Type) -> None:
    path = tiny_model(tmp_path / "m.gguf", "qwen3", weight_type=kind, d_model=128, d_ff=160, n_heads=4).path
    seen = set()
    for threads, batch_tokens in ((1, 64), (2, 16)):
        async with mer.open_engine(path, memory=MEMORY, threads=threads, batch_tokens=batch_tokens) as engine:
            seen.add((await engine.generate(PROMPT, max_tokens=8, ignore_eos=True)).tokens)
    assert len(seen) == 1
