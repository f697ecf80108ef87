"""A closed engine gives its memory back at once, whoever still refers to it."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import mer
from mer.io.arena import map_anonymous
from tests._lib.tiny_models import tiny_model

LARGE_BYTES = 1 << 15  # the threads' control block and the fallbacks' pages are smaller


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Let objects live that refer to each other in a circle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("prefetch", ["auto", "off"])
async def test_memory_goes_back_with_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: str) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []

    def recorded(n_bytes: int) -> mmap.mmap:
        memory = map_anonymous(n_bytes)
        if n_bytes >= LARGE_BYTES:
            mapped.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr("mer.io.arena.map_anonymous", recorded)
    monkeypatch.setattr("mer.compute.cpu.program.map_anonymous", recorded)
    model = tiny_model(tmp_path / "m.gguf", n_layers=3, n_experts=6, d_model=128, d_ff=256, n_heads=4)
    async with mer.open_engine(model.path, memory="8GiB", slots=4, threads=2, prefetch=prefetch) as engine:  # type: ignore[arg-type]
        done = await engine.generate("the cat", max_tokens=12, ignore_eos=True)
        with trio.CancelScope() as scope:
            async with engine.stream("a dog", max_tokens=12, ignore_eos=True) as events:
                async for _ in events:
                    scope.cancel()
        assert len(done.tokens) == 12
        assert sum(ref() is not None for ref in mapped) >= 4, "slots, weights, scratch and KV"
    assert [len(memory) for ref in mapped if (memory := ref()) is not None] == []
    assert engine.plan.slots == 4
