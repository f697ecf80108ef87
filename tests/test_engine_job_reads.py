"""Whole engines whose jobs read missing experts by themselves, on the kernel's io_uring."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.io.loan.desk import LoanDesk
from mer.io.loan.words import GIVE_UP_NS
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
    settings: dict[str, Any] = {"memory": "8GiB", "prefetch": "off", "prefix_reuse": False, "threads": 2} | changed
    async with mer.open_engine(path, **settings) as engine:
        done = [await engine.generate(prompt, max_tokens=N_TOKENS, ignore_eos=True) for prompt in prompts]
        return [tuple(one.tokens) for one in done], engine.statistics()


async def slots_given_back(engine: mer.Engine, slots: int) -> None:
    """Wait until nothing is being computed or read any more."""
    with trio.fail_after(60):
        await trio.lowlevel.checkpoint()
        while (pool := engine.statistics().pool).free + pool.ready < slots:
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.F16, Type.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize("slots", [3, 20])
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
        assert by_jobs.cache.misses >= by_jobs.fetcher.by_jobs > by_jobs.fetcher.handed_over
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
            path, memory="8GiB", slots=12, io_engine="io_uring", prefetch="off", prefix_reuse=False, threads=2
        ) as engine:
            first = await engine.generate(PROMPTS[0], max_tokens=4, ignore_eos=True)
            assert len(first.tokens) == 4
            os.truncate(path, n_bytes // 3)
            with pytest.raises(mer.ReadError, match="file truncated"):
                await engine.generate(PROMPTS[2], max_tokens=N_TOKENS, ignore_eos=True)
            await slots_given_back(engine, 12)
            statistics = engine.statistics()
            assert statistics.pool.ready == statistics.cache.resident
            assert statistics.fetcher.failed > 0
            assert statistics.fetcher.started == statistics.fetcher.landed + statistics.fetcher.failed

    trio.run(main)


def impatient(monkeypatch: pytest.MonkeyPatch, share: float = 1.0) -> None:
    """Let a share of the jobs wait for no read that has not ended when they come to it."""
    real, rng = LoanDesk.lend, np.random.default_rng(0)

    def lend(self: LoanDesk, *arguments: Any) -> Any:
        reads = real(self, *arguments)
        if reads is not None:
            reads.control[GIVE_UP_NS] = 0 if rng.random() < share else 1 << 40
        return reads

    monkeypatch.setattr(LoanDesk, "lend", lend)
    monkeypatch.setattr("mer.io.loan.desk._LOANS_TO_SKIP", 0)


@pytest.mark.parametrize("io_threads", [1, 2, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_reads_that_a_job_does_not_wait_for_are_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, io_threads: int
) -> None:
    path = model(tmp_path)

    async def main() -> None:
        want, _ = await generate(path, PROMPTS, slots=12, io_engine="threads")
        impatient(monkeypatch)
        got, statistics = await generate(
            path, PROMPTS, slots=12, io_engine="io_uring", threads=threads, io_threads=io_threads
        )
        assert got == want
        fetcher = statistics.fetcher
        assert fetcher.handed_over > 10
        assert fetcher.started == fetcher.landed == statistics.cache.misses >= fetcher.by_jobs >= fetcher.handed_over
        assert statistics.pool.free + statistics.pool.ready == 12
        assert statistics.reader.started == statistics.reader.landed
        assert statistics.reader.bytes_read == fetcher.bytes_read + statistics.dense_bytes_read

    trio.run(main)


def test_after_a_slow_read_jobs_read_nothing_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        impatient(monkeypatch)
        monkeypatch.setattr("mer.io.loan.desk._LOANS_TO_SKIP", 10**9)
        _, statistics = await generate(model(tmp_path), PROMPTS, slots=12, io_engine="io_uring")
        fetcher = statistics.fetcher  # a read may have landed before its job looked; that one was not slow
        assert 0 < fetcher.handed_over <= fetcher.by_jobs < 0.1 * fetcher.started

    trio.run(main)


@pytest.mark.parametrize("seed", range(4))
def test_many_at_once_with_cancellations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Everyone who stays gets what they get alone, and all accounts balance."""
    path = model(tmp_path)
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(6, 30))

    async def main() -> None:
        want, _ = await generate(path, PROMPTS, slots=slots, io_engine="threads")
        impatient(monkeypatch, 0.2)
        async with mer.open_engine(
            path,
            memory="8GiB",
            slots=slots,
            io_engine="io_uring",
            prefetch="auto" if seed % 2 else "off",
            threads=1 + seed // 2,
        ) as engine:
            done = []

            async def call(number: int, patience: int) -> None:
                prompt = PROMPTS[number % 3]
                with trio.CancelScope() as scope:
                    async with engine.stream(prompt, max_tokens=N_TOKENS, ignore_eos=True) as stream:
                        tokens = []
                        async for event in stream:
                            if isinstance(event, mer.TokenEvent):
                                tokens.append(event.token)
                            if len(tokens) > patience:
                                scope.cancel()
                if not scope.cancelled_caught:
                    assert tuple(tokens) == want[number % 3]
                    done.append(number)

            for _ in range(3):
                async with trio.open_nursery() as nursery:
                    for number in range(6):
                        nursery.start_soon(call, number, 100 if rng.random() < 0.5 else int(rng.integers(0, N_TOKENS)))
            await slots_given_back(engine, slots)
            statistics = engine.statistics()
            assert done
            assert statistics.fetcher.by_jobs > 0
            assert statistics.pool.ready == statistics.cache.resident
            fetcher = statistics.fetcher
            assert fetcher.started == fetcher.landed + fetcher.failed + fetcher.abandoned
            assert fetcher.reads_started == fetcher.reads_landed + fetcher.reads_cancelled

    trio.run(main)
