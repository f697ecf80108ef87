"""An engine's cache policy, heat and trace: the output is the same with any of them, and no failure of theirs its."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest

import mer
from mer.sched.heat import ProfileError
from mer.sched.policies.registry import DEFAULT_POLICY, POLICIES
from mer.sched.trace import TraceError, TraceEvent, TraceReader, TraceWriter
from tests._lib.tiny_models import TinyModel, Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
PROMPTS: list[str | list[int]] = ["the cat sat on the mat and", "it was a dark and stormy night", [7, 8, 9]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model whose down matrices are larger than the others."""
    path = tmp_path_factory.mktemp("model") / "mixed.gguf"
    return tiny_model(path, weight_type=Type.Q4_0, down_type=Type.Q6_K, d_ff=256)


def events_of(path: Path) -> list[TraceEvent]:
    with TraceReader(path) as reader:
        events = list(reader)
        assert reader.lost_bytes == 0
        return events


async def answers(model: TinyModel, **settings: object) -> tuple[list[tuple[int, ...]], mer.Statistics]:
    """Return what an engine with few slots generates, and its statistics at the end."""
    async with mer.open_engine(model.path, memory=MEMORY, threads=1, **settings) as engine:  # type: ignore[arg-type]
        tokens = [(await engine.generate(prompt, max_tokens=12, ignore_eos=True)).tokens for prompt in PROMPTS]
        return tokens, engine.statistics()


@pytest.mark.parametrize("kind", ["tiny", "mixed"])
async def test_every_policy_gives_the_same_output(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: TinyModel = request.getfixturevalue(kind)
    expected, statistics = await answers(model)
    assert statistics.settings.policy == DEFAULT_POLICY
    heat = tmp_path / "heat.json"
    async with mer.open_engine(model.path, memory=MEMORY, threads=1) as engine:
        await engine.generate(PROMPTS[0], max_tokens=12)
        profile = engine.heat_profile()
        assert profile.counts.sum() == engine.statistics().cache.lookups
        profile.save(heat)
    for name in POLICIES:
        more = {"heat": heat} if name == "static" else {}
        tokens, statistics = await answers(model, policy=name, slots=3, **more)
        assert tokens == expected
        assert (statistics.settings.policy, statistics.cache.policy) == (name, name)
        assert statistics.settings.heat == (str(heat) if more else None)
        assert statistics.cache.hits > 0
        assert statistics.cache.evictions > 0


async def test_the_trace_is_what_the_cache_was_asked_for(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "t"
    async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, slots=4, trace=path) as engine:
        done = await engine.generate(PROMPTS[0], max_tokens=5, ignore_eos=True)
        statistics = engine.statistics()
        heat = engine.heat_profile()
        assert statistics.trace is not None
        assert statistics.trace.error is None
    events = events_of(path)
    n_layers = heat.counts.shape[0]
    assert len(events) == statistics.trace.events == n_layers * 5
    assert [event.n_tokens for event in events] == [done.usage.prompt_tokens] * n_layers + [1] * (4 * n_layers)
    assert [event.layer for event in events] == list(range(n_layers)) * 5
    assert sum(len(event.experts) for event in events) == statistics.cache.lookups
    uses = Counter((event.layer, expert) for event in events for expert in event.experts)
    assert {key: int(heat.counts[key]) for key in uses} == dict(uses)
    assert heat.counts.sum() == uses.total()
    assert heat.visits.tolist() == [5] * n_layers


async def test_the_trace_is_whole_however_the_engine_ends(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "t"

    async def fail() -> None:
        async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, trace=path) as engine:
            await engine.generate(PROMPTS[0], max_tokens=3, ignore_eos=True)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    n_events = len(events_of(path))
    assert n_events > 0
    async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, trace=path) as engine:  # goes on where it ended
        async with engine.stream(PROMPTS[1], max_tokens=50, ignore_eos=True) as events:
            async for _ in events:
                break
        engine.close()
    assert len(events_of(path)) > n_events


async def test_a_trace_that_cannot_be_written_fails_nothing(
    tiny: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = await answers(tiny)
    path = tmp_path / "t"
    write = TraceWriter.write

    def full(self: TraceWriter, data: bytes) -> None:
        if len(data) < 100:  # the header fits
            write(self, data)
        else:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceWriter, "write", full)
    monkeypatch.setattr("mer.sched.recorder.BLOCK_BYTES", 100)
    with caplog.at_level(logging.WARNING):
        tokens, statistics = await answers(tiny, trace=path)
    assert tokens == expected
    assert statistics.trace is not None
    assert statistics.trace.error == "[Errno 28] No space left on device"
    assert events_of(path) == []
    assert ["the trace ends early" in record.getMessage() for record in caplog.records] == [True]


async def test_two_engines_cannot_write_one_trace(tiny: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "t"
    async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, trace=path) as engine:
        with pytest.raises(TraceError, match="another process writes this trace"):
            async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, trace=path):
                pass
        await engine.generate(PROMPTS[0], max_tokens=2)
    assert events_of(path)


async def test_another_models_files_are_refused(tiny: TinyModel, mixed: TinyModel, tmp_path: Path) -> None:
    path, heat = tmp_path / "t", tmp_path / "heat.json"
    async with mer.open_engine(tiny.path, memory=MEMORY, threads=1, trace=path) as engine:
        engine.heat_profile().save(heat)
    with pytest.raises(TraceError, match="another model"):
        await answers(mixed, trace=path)
    with pytest.raises(ProfileError, match="another model"):
        await answers(mixed, policy="static", heat=heat)
    await answers(tiny, policy="static", heat=heat)  # the right one's is taken
