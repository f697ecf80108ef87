"""Models whose experts differ in size: the same tokens in any slots, from one slot of each size up."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.compute.reference.model import ReferenceModel
from mer.engine import Engine
from tests._lib.tiny_models import TinyModel, Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
SHAPE: dict[str, Any] = {
    "n_layers": 4,
    "d_model": 256,
    "d_ff": 512,
    "n_heads": 4,
    "n_experts": 5,
    "expert_type": Type.Q4_0,
}
DOWN = "blk.{}.ffn_down_exps.weight"
KINDS: dict[str, dict[str, Any]] = {
    "layers": {"types": {DOWN.format(layer): Type.Q8_0 for layer in (1, 2)}},
    "one-layer": {"types": {DOWN.format(3): Type.F16}},
    "experts": {
        "merged": False,
        "types": {
            f"blk.{layer}.ffn_{part}.{expert}.weight": kind
            for layer in range(4)
            for part in ("up", "down")
            for expert, kind in enumerate([Type.Q4_0, Type.F16, Type.Q8_0, Type.Q6_K, Type.F16][layer:])
        },
    },
}
# experts of each class, largest first; those of the last are F16, Q8_0 or Q6_K, and Q4_0
CLASSES = {"layers": (10, 10), "one-layer": (5, 15), "experts": (6, 7, 7)}
PROMPTS: list[str | list[int]] = [
    "the cat",
    [7],
    "it was a dark and stormy night; the rain fell in torrents",
    [5, 6, 7, 8],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model(folder: Path, kind: str) -> TinyModel:
    return tiny_model(folder / f"{kind}.gguf", **SHAPE, **KINDS[kind])


async def generate(engine: Engine) -> list[tuple[int, ...]]:
    """Return what each prompt gives, all of them at once."""
    got: dict[int, tuple[int, ...]] = {}

    async def one(index: int) -> None:
        got[index] = (await engine.generate(PROMPTS[index], max_tokens=8, ignore_eos=True)).tokens

    async with trio.open_nursery() as nursery:
        for index in range(len(PROMPTS)):
            nursery.start_soon(one, index)
    return [got[index] for index in range(len(PROMPTS))]


@cache
def all_resident(folder: Path, kind: str) -> list[tuple[int, ...]]:
    async def main() -> list[tuple[int, ...]]:
        async with mer.open_engine(model(folder, kind).path, memory=MEMORY, threads=1) as engine:
            assert engine.plan.slot_counts == engine.plan.classes.n_experts == CLASSES[kind]
            return await generate(engine)

    return trio.run(main)


@pytest.mark.parametrize("more", [0, 1, 3, 8, 14])
@pytest.mark.parametrize("kind", KINDS)
async def test_slots_change_nothing(folder: Path, kind: str, more: int) -> None:
    want = await trio.to_thread.run_sync(all_resident, folder, kind)
    slots = len(CLASSES[kind]) + more
    async with mer.open_engine(
        model(folder, kind).path, memory=MEMORY, slots=slots, threads=1 + more % 2, max_sequences=1 + more % 3
    ) as engine:
        assert await generate(engine) == want
        assert await generate(engine) == want, "in an engine that has been used"
        s = engine.statistics()
        counts, sizes = s.settings.slot_counts, s.settings.slot_bytes
        assert s.pool.n_slots == sum(counts) == slots
        assert min(counts) >= 1
        assert engine.plan.parts["expert slots"] == sum(n * size for n, size in zip(counts, sizes, strict=True))
        assert s.fetcher.started == s.fetcher.landed + s.fetcher.abandoned + s.fetcher.in_flight
        assert (s.pool.pinned, s.pool.quarantined) == (0, 0)
        assert s.pool.filling == s.fetcher.in_flight, "a guess may still be on its way"
        assert s.cache.evictions > 0


async def test_the_smallest_budget_works(folder: Path) -> None:
    want = await trio.to_thread.run_sync(all_resident, folder, "experts")
    path = model(folder, "experts").path
    with pytest.raises(mer.NotEnoughMemory) as caught:
        async with mer.open_engine(path, memory="1MiB"):
            pass
    memory = caught.value.needed_bytes + (64 << 20)  # the process grows while the test runs
    async with mer.open_engine(path, memory=memory) as engine:
        assert await generate(engine) == want


@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_are_those_of_the_reference(folder: Path, kind: str) -> None:
    """Teacher forcing: no token is much less likely than the reference's; all experts are used, so no routing flips."""
    tiny = tiny_model(folder / f"all-{kind}.gguf", **SHAPE | {"n_experts": 5, "top_k": 5}, **KINDS[kind])
    reference = ReferenceModel(tiny.path, int8_activations=False)
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=len(CLASSES[kind]), activations="int15") as engine:
        for prompt in PROMPTS[:2]:
            ids = engine.encode(prompt)
            tokens = (await engine.generate(ids, max_tokens=6, ignore_eos=True)).tokens
            logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
            logits[:, list(engine.tokenizer.eos_ids)] = -np.inf
            chosen = logits[np.arange(len(tokens)), list(tokens)]
            assert (logits.max(1) - chosen <= 4e-3 * logits.max()).all()


async def test_fewer_slots_than_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(mer.ConfigError, match=r"slots is 2; .* 3 sizes .* at least 3"):
        async with mer.open_engine(model(folder, "experts").path, memory=MEMORY, slots=2):
            pass
