"""Damage and neighbours behind the door, on every worker: a generation that fails takes nobody along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.compute.kernels.kv_layout import KV_TILE
from mer.engine import TokenStream
from mer.sched.events import TokenEvent
from tests._lib.tiny_models import Type, tiny_model
from tests._lib.workers import WORKERS

MEMORY = "8GiB"
NAN_TOKEN = 5


@pytest.fixture(params=WORKERS)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


async def test_damaged_experts_fail_those_they_compute_and_nobody_else(device: str, tmp_path: Path) -> None:
    sound = tiny_model(tmp_path / "sound.gguf", n_experts=8)
    rows = sound.weights["blk.1.ffn_down_exps.weight"].copy()
    rows[3] = np.nan
    damaged = tiny_model(tmp_path / "damaged.gguf", n_experts=8, tensors={"blk.1.ffn_down_exps.weight": rows})
    prompts = [[7 + number] for number in range(24)]
    want: dict[int, tuple[int, ...]] = {}
    got: dict[int, tuple[int, ...] | mer.MerError] = {}
    async with mer.open_engine(sound.path, memory=MEMORY, device=device) as engine:
        for number, prompt in enumerate(prompts):
            want[number] = (await engine.generate(prompt, max_tokens=2)).tokens
    async with mer.open_engine(damaged.path, memory=MEMORY, device=device, slots=3) as engine:

        async def one(number: int) -> None:
            try:
                got[number] = (await engine.generate(prompts[number], max_tokens=2)).tokens
            except mer.NumericsError as error:
                got[number] = error

        async with trio.open_nursery() as nursery:
            for number in range(len(prompts)):
                nursery.start_soon(one, number)
    failed = {number for number, result in got.items() if isinstance(result, mer.NumericsError)}
    assert 0 < len(failed) < len(prompts)
    assert all(got[number] == want[number] for number in set(got) - failed)


async def test_nan_in_a_dense_weight_fails_everybody(device: str, tmp_path: Path) -> None:
    weights = np.full(96, np.nan, np.float32)
    model = tiny_model(tmp_path / "m.gguf", tensors={"blk.0.attn_norm.weight": weights})
    async with mer.open_engine(model.path, memory=MEMORY, device=device) as engine:
        for _ in range(2):
            with pytest.raises(mer.NumericsError, match="weights are damaged"):
                await engine.generate("the cat", max_tokens=2)


@pytest.mark.parametrize("room", [{}, {"slots": 3, "vram_slots": 3}], ids=["all experts fit", "few do"])
async def test_what_a_failed_generation_leaves_in_the_first_block_reaches_nobody(
    device: str, room: dict[str, Any], tmp_path: Path
) -> None:
    """It has the first KV block, which stays as it was when it has failed, while others of unequal length go on."""
    shape: dict[str, Any] = {"types": {"token_embd.weight": Type.F32}}
    good = tiny_model(tmp_path / "good.gguf", **shape)
    embedding = good.weights["token_embd.weight"].copy()
    embedding[NAN_TOKEN] = np.nan
    bad = tiny_model(tmp_path / "bad.gguf", **shape, tensors={"token_embd.weight": embedding}).path
    prompts = [[7, 8], [int(token) for token in np.random.default_rng(1).integers(6, 300, 2 * KV_TILE)]]
    if device == "cpu":
        room = {name: value for name, value in room.items() if name == "slots"}
    settings: dict[str, Any] = {"memory": MEMORY, "device": device, "prefix_reuse": False, **room}
    n = 40
    async with mer.open_engine(good.path, **settings) as engine:
        want = [(await engine.generate(prompt, max_tokens=n, ignore_eos=True)).tokens for prompt in prompts]
        assert NAN_TOKEN not in {token for tokens in want for token in tokens}

    async def read(events: TokenStream, tokens: list[int]) -> None:
        async for event in events:
            if isinstance(event, TokenEvent):
                tokens.append(event.token)

    async with mer.open_engine(bad, **settings) as engine:
        for _ in range(3):  # some experts come only with the first
            got: list[list[int]] = [[], []]
            async with (
                engine.stream([9], max_tokens=6, ignore_eos=True) as first,  # keeps the block until the others run
                engine.stream(prompts[0], max_tokens=n, ignore_eos=True) as short,
                engine.stream(prompts[1], max_tokens=n, ignore_eos=True) as long,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(read, short, got[0])
                nursery.start_soon(read, long, got[1])
                async for _event in first:
                    pass
                with pytest.raises(mer.NumericsError):
                    await engine.generate([NAN_TOKEN], max_tokens=1)
                assert all(0 < len(tokens) < n for tokens in got)
            assert [tuple(tokens) for tokens in got] == want
        assert engine.statistics().scheduler.failed == 3
