"""Whole engines whose jobs read missing experts by themselves, on the kernel's io_uring."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.io.fetch import Fetcher
from mer.io.ring import Ring
from tests._lib.tiny_models import Type, tiny_model

try:
    Ring(1).close()
except OSError as error:
    pytest.skip(f"this system has no io_uring: {error}", allow_module_level=True)

PROMPTS = [[5, 9, 200, 3], [17, 4], [250, 1, 77, 30, 8, 8]]
N_TOKENS = 24


def model(folder: Path, kind: Type = Type.Q4_0) -> Path:
    return tiny_model(
        folder / "m.gguf",
        "qwen3moe",
        weight_type=kind,
        seed=5,
        vocab_size=299,
        n_layers=3,
        n_experts=12,
        top_k=3,
        d_ff=96,
    ).path


async def generate(path: Path, prompts: list[list[int]], **changed: Any) -> tuple[list[tuple[int, ...]], Any]:
    """Return the tokens of all prompts, one after the other, and the statistics."""
    settings: dict[str, Any] = {"memory": "1GiB", "prefetch": "off", "prefix_reuse": False, "threads": 2} | changed
    async with mer.open_engine(path, **settings) as engine:
        done = [await engine.generate(prompt, max_tokens=N_TOKENS, ignore_eos=True) for prompt in prompts]
        return [tuple(one.tokens) for one in done], engine.statistics()


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16, Type.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("slots", [3, 7, 20, 35])
def test_tokens_are_those_of_reads_by_the_reader(tmp_path: Path, kind: Type, slots: int) -> None:
    path = model(tmp_path, kind)

    async def main() -> None:
        want, by_threads = await generate(path, PROMPTS, slots=slots, io_engine="threads")
        got, by_jobs = await generate(path, PROMPTS, slots=slots, io_engine="io_uring")
        assert got == want
        assert by_threads.settings.job_reads.startswith("off: ")
        assert by_jobs.settings.job_reads == "on"
        assert by_jobs.worker.jobs < by_threads.worker.jobs
        assert by_jobs.cache.lookups == by_threads.cache.lookups
        assert by_jobs.cache.misses > 0
        assert by_jobs.fetcher.started == by_jobs.fetcher.landed == by_jobs.cache.misses
        assert by_jobs.fetcher.reads_landed == 3 * by_jobs.fetcher.landed
        assert by_jobs.pool.free + by_jobs.pool.ready == slots
        reader = by_jobs.reader
        assert reader.in_flight == 0
        assert reader.by_priority[0].landed == reader.landed
        assert reader.bytes_read == by_jobs.fetcher.bytes_read + by_jobs.dense_bytes_read

    trio.run(main)


def test_a_token_is_one_job_once_the_slots_are_full(tmp_path: Path) -> None:
    async def main() -> None:
        _, few = await generate(model(tmp_path), [PROMPTS[0]], slots=20, io_engine="io_uring")
        assert few.cache.misses > 10
        assert few.worker.jobs <= N_TOKENS + 3 * 2  # the prompt goes layer by layer at worst

    trio.run(main)


@pytest.mark.parametrize("policy", ["lfru", "lfu", "cost"])
def test_the_cache_does_as_well_as_with_the_policy_asked(tmp_path: Path, policy: str) -> None:
    """The numbers that jobs go by are those of the token before, which may cost a few misses and no more."""

    async def main() -> None:
        path = model(tmp_path)
        _, asked = await generate(path, PROMPTS, slots=20, io_engine="threads", policy=policy)
        _, by_jobs = await generate(path, PROMPTS, slots=20, io_engine="io_uring", policy=policy)
        assert by_jobs.settings.job_reads == "on"
        assert by_jobs.cache.misses <= 1.15 * asked.cache.misses

    trio.run(main)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"io_engine": "threads"}, "only io_uring"),
        ({"io_engine": "io_uring", "policy": "layer-lru"}, "layer-lru"),
    ],
)
def test_where_jobs_cannot_read_the_settings_say_why(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    async def main() -> None:
        _, statistics = await generate(model(tmp_path), PROMPTS[:1], slots=9, **settings)
        assert statistics.settings.job_reads.startswith("off: ")
        assert reason in statistics.settings.job_reads

    trio.run(main)


def test_a_file_that_ends_early_is_an_error_of_those_that_need_it(tmp_path: Path) -> None:
    path = model(tmp_path)
    n_bytes = path.stat().st_size

    async def main() -> None:
        async with mer.open_engine(
            path, memory="1GiB", slots=12, io_engine="io_uring", prefetch="off", prefix_reuse=False, threads=2
        ) as engine:
            first = await engine.generate(PROMPTS[0], max_tokens=4, ignore_eos=True)
            assert len(first.tokens) == 4
            os.truncate(path, n_bytes // 3)
            with pytest.raises(mer.ReadError, match="file truncated"):
                await engine.generate(PROMPTS[2], max_tokens=N_TOKENS, ignore_eos=True)
            with trio.fail_after(60):
                while (pool := engine.statistics().pool).free + pool.ready < 12:
                    await trio.lowlevel.checkpoint()
            statistics = engine.statistics()
            assert statistics.pool.ready == statistics.cache.resident
            assert statistics.fetcher.failed > 0
            assert statistics.fetcher.started == statistics.fetcher.landed + statistics.fetcher.failed

    trio.run(main)


def test_reads_that_a_job_gives_up_are_heard_of_by_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every job is told to stop as it begins, or half of its reads are forgotten: tokens and accounts are the same."""
    path = model(tmp_path)
    real = Fetcher.lend
    rng = np.random.default_rng(0)

    def doubtful(self: Fetcher, *arguments: Any) -> Any:
        reads = real(self, *arguments)
        if reads is not None and rng.random() < 0.5:
            reads.stop()
        elif reads is not None and rng.random() < 0.5:
            reads.control[9] = 1  # one read at a time, so that most wait for others
        return reads

    async def main() -> None:
        want, _ = await generate(path, PROMPTS, slots=12, io_engine="threads")
        with monkeypatch.context() as patch:
            patch.setattr(Fetcher, "lend", doubtful)
            got, statistics = await generate(path, PROMPTS, slots=12, io_engine="io_uring")
        assert got == want
        assert statistics.fetcher.started == statistics.fetcher.landed == statistics.cache.misses
        assert statistics.pool.free + statistics.pool.ready == 12

    trio.run(main)
