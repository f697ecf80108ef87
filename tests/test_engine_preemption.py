"""A real engine whose readers are behind: nobody waits for ever, and preempted generations keep their tokens."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import trio

import mer
from mer.sched.events import TokenEvent
from tests._lib.tiny_models import Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has


@pytest.mark.parametrize("weight_type", [Type.F32, Type.Q4_0])
@pytest.mark.parametrize("sampling", [None, mer.Sampling(temperature=1.5, seed=3)])
async def test_a_preempted_generation_gives_the_tokens_it_gives_alone(
    tmp_path: Path, weight_type: Type, sampling: mer.Sampling | None
) -> None:
    tiny = tiny_model(tmp_path / "model.gguf", weight_type=weight_type)
    prompt, n = "it was a dark and stormy night", 24
    with patch("mer.engine.CHANNEL_EVENTS", 4):
        async with mer.open_engine(tiny.path, memory=MEMORY, max_sequences=1) as engine:
            alone = await engine.generate(prompt, max_tokens=n, ignore_eos=True, sampling=sampling)
            tokens: list[int] = []
            async with engine.stream(prompt, max_tokens=n, ignore_eos=True, sampling=sampling) as events:
                async for event in events:
                    if isinstance(event, TokenEvent):
                        tokens.append(event.token)
                    with trio.fail_after(60):
                        await engine.generate("the cat", max_tokens=2, ignore_eos=True)
            statistics = engine.statistics()
            assert tuple(tokens) == alone.tokens
            assert statistics.scheduler.preemptions >= 5
            assert statistics.kv.available == statistics.kv.n_blocks
