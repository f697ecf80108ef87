"""Reused, saved and restored prefixes in real engines: not a bit of KV and not a token is other than without them."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trio

import mer
from mer.sched.kv_file import PrefixFileError, PrefixWriter
from tests._lib.tiny_models import Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
STORY = "Once upon a time there was a little girl named Lily. She had a red ball and a small dog. " * 6
KINDS: dict[str, dict[str, Any]] = {
    "llama-F32": {},
    "llama-Q4_0": {"weight_type": Type.Q4_0},
    "qwen3moe-Q8_0": {"arch": "qwen3moe", "weight_type": Type.Q8_0, "top_k": 3},
}
IDS = [5 + i * i % 251 for i in range(140)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model(folder: Path, kind: str) -> Path:
    return mer.embedded_model_path() if kind == "embedded" else tiny_model(folder / f"{kind}.gguf", **KINDS[kind]).path


def content(path: Path) -> bytes:
    return path.read_bytes()


async def ask(
    engine: mer.Engine, prompt: list[int], arguments: dict[str, Any], into: dict[int, mer.Completion], number: int
) -> None:
    into[number] = await engine.generate(prompt, **arguments)


@pytest.mark.parametrize("kind", ["embedded", *KINDS])
async def test_keys_and_values_are_the_same_bits_however_they_were_computed(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """In one go; in chunks of a few rows beside others, streamed; and token by token as the answer they once were."""
    first, rest = IDS[:70], 75
    async with mer.open_engine(model(folder, kind), memory=MEMORY, threads=1) as engine:
        answer = await engine.generate(first, max_tokens=rest, ignore_eos=True)
        tokens = [*first, *answer.tokens]
        await engine.save_prefix(tokens[:-1], tmp_path / "as answer")
        assert engine.statistics().scheduler.prompt_tokens == len(first), "the answer was computed again"
    async with mer.open_engine(model(folder, kind), memory=MEMORY, prefix_reuse=False) as engine:
        await engine.save_prefix(tokens[:-1], tmp_path / "in one go")
    arguments: dict[str, Any] = {"memory": MEMORY, "threads": 2, "slots": 8, "batch_tokens": 7, "max_sequences": 3}
    async with mer.open_engine(model(folder, kind), **arguments) as engine, trio.open_nursery() as nursery:
        nursery.start_soon(engine.generate, IDS[::-1])
        nursery.start_soon(engine.generate, tokens[:100])
        await engine.save_prefix(tokens[:-1], tmp_path / "in chunks")
        nursery.cancel_scope.cancel()
    assert content(tmp_path / "as answer") == content(tmp_path / "in one go") == content(tmp_path / "in chunks")


@pytest.mark.parametrize("kind", ["embedded", *KINDS])
async def test_the_output_is_the_same_with_and_without_reuse(folder: Path, tmp_path: Path, kind: str) -> None:
    prompts = [IDS[:130], [*IDS[:128], 9], IDS[:128], IDS, [*IDS[:64], *IDS[:64]]]
    arguments: dict[str, Any] = {
        "max_tokens": 12,
        "sampling": mer.Sampling(temperature=1.5, seed=3),
        "ignore_eos": True,
    }
    async with mer.open_engine(model(folder, kind), memory=MEMORY, prefix_reuse=False) as engine:
        assert not engine.statistics().settings.prefix_reuse
        alone = [await engine.generate(prompt, **arguments) for prompt in prompts]
        assert engine.statistics().scheduler.reused_tokens == 0
        await engine.save_prefix(prompts[0], tmp_path / "saved")
    for restored in (False, True):
        async with mer.open_engine(model(folder, kind), memory=MEMORY, batch_tokens=48, max_sequences=5) as engine:
            assert engine.statistics().settings.prefix_reuse
            if restored:
                assert await engine.load_prefix(tmp_path / "saved") == 128
            for _ in range(2):  # at once, and again
                got: dict[int, mer.Completion] = {}
                async with trio.open_nursery() as nursery:
                    for number, prompt in enumerate(prompts):
                        nursery.start_soon(ask, engine, prompt, arguments, got, number)
                for number, want in enumerate(alone):
                    assert (got[number].tokens, got[number].text) == (want.tokens, want.text)
            assert [got[number].usage.cached_tokens for number in range(len(prompts))] == [128, 128, 64, 128, 64]
            statistics = engine.statistics()
            n_prompts = 2 * sum(map(len, prompts))
            assert statistics.scheduler.prompt_tokens + statistics.scheduler.reused_tokens == n_prompts
            if restored:
                assert statistics.scheduler.prompt_tokens <= n_prompts - (128 + 128 + 64 + 128 + 64) - 512 + 64
            assert statistics.kv.available == statistics.kv.n_blocks


async def test_a_chat_goes_on_where_it_was(folder: Path) -> None:
    async with mer.open_engine(mer.embedded_model_path(), memory=MEMORY) as engine:
        first = await engine.generate(STORY, max_tokens=60, ignore_eos=True)
        more = await engine.generate([*engine.encode(STORY), *first.tokens, 7, 8, 9], max_tokens=1)
        whole = first.usage.prompt_tokens + 60 - 1
        assert more.usage.cached_tokens == whole // 64 * 64 > first.usage.prompt_tokens // 64 * 64


async def test_prefixes_of_other_models_and_other_arithmetic_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x"
    async with mer.open_engine(model(folder, "llama-Q4_0"), memory=MEMORY, activations="int8") as engine:
        await engine.save_prefix(IDS, path)
    for kind, options, text in (
        ("llama-Q4_0", {"activations": "int15"}, "with int8 activations, and this engine computes with int15"),
        ("llama-Q4_0", {"activations": "int8", "kv_type": "f32"}, "holds f16 keys and values, and .* keeps f32"),
        ("llama-F32", {}, "another model"),
        ("qwen3moe-Q8_0", {"activations": "int8"}, "another model"),
    ):
        async with mer.open_engine(model(folder, kind), memory=MEMORY, **options) as engine:  # type: ignore[arg-type]
            with pytest.raises(PrefixFileError, match=text):
                await engine.load_prefix(path)
            assert engine.statistics().kv.cached == 0


async def test_cancelling_while_a_thread_writes_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    write = PrefixWriter.write
    async with mer.open_engine(model(folder, "llama-F32"), memory=MEMORY) as engine:
        with trio.CancelScope() as scope:

            def write_and_cancel(writer: PrefixWriter, block: Any) -> None:
                assert [name for name in os.listdir(tmp_path) if name.startswith(".x.")]
                write(writer, block)
                trio.from_thread.run_sync(scope.cancel)

            with patch.object(PrefixWriter, "write", write_and_cancel):
                await engine.save_prefix(IDS, tmp_path / "x")
        assert scope.cancelled_caught
        assert os.listdir(tmp_path) == []
        assert await engine.save_prefix(IDS, tmp_path / "x") == 128
        assert engine.statistics().kv.available == engine.statistics().kv.n_blocks
