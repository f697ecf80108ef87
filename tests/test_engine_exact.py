"""What an engine generates: the same for every number of slots, threads and batch size, and what the reference says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import mer
from mer.compute.reference.model import ReferenceModel
from mer.config import Activations, KVType
from mer.engine import Engine
from mer.sched.events import TokenEvent
from tests._lib.portions import some
from tests._lib.tiny_models import TinyModel, Type, tiny_model

MEMORY = "8GiB"  # more than a test process with everything imported has
N_EXPERTS = 10  # 2 layers of 5
KINDS: dict[str, dict[str, Any]] = {
    "llama-F32": {},
    "llama-Q4_0": {"weight_type": Type.Q4_0},
    "llama-Q4_0-Q6_K": {"weight_type": Type.Q4_0, "down_type": Type.Q6_K, "d_ff": 256},
    "qwen3moe-Q8_0": {"arch": "qwen3moe", "weight_type": Type.Q8_0, "top_k": 3},
}
PROMPTS: list[str | list[int]] = [
    "the cat",
    [7],
    "it was a dark and stormy night; the rain fell in torrents",
    [5, 6, 7, 8, 5, 6, 7, 8],
]
Output = tuple[tuple[int, ...], str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model(folder: Path, kind: str, **more: Any) -> TinyModel:
    suffix = "-".join(f"{key}={value}" for key, value in more.items())
    return tiny_model(folder / f"{kind}{suffix}.gguf", **KINDS[kind], **more)


async def streamed(engine: Engine, prompt: str | Sequence[int], max_tokens: int) -> Output:
    """Generate through a stream, and check the events against the completion."""
    tokens: list[int] = []
    text = ""
    async with engine.stream(prompt, max_tokens=max_tokens, ignore_eos=True) as events:
        async for event in events:
            if isinstance(event, TokenEvent):
                tokens.append(event.token)
                text += event.text
                last = event
    assert last.completion is not None
    assert last.completion.tokens == tuple(tokens)
    assert last.completion.text == text
    return tuple(tokens), text


@cache
def all_resident(folder: Path, kind: str, max_tokens: int = 10) -> list[Output]:
    """Return what each prompt gives alone in an engine with a slot for every expert."""

    async def main() -> list[Output]:
        async with mer.open_engine(model(folder, kind).path, memory=MEMORY, threads=1, io_threads=1) as engine:
            assert engine.plan.slots == N_EXPERTS
            return [await streamed(engine, prompt, max_tokens) for prompt in PROMPTS]

    return trio.run(main)


@pytest.mark.parametrize("slots", some(range(1, N_EXPERTS + 1), every=5))
@pytest.mark.parametrize("kind", KINDS)
async def test_slots_threads_and_batches_change_nothing(folder: Path, kind: str, slots: int) -> None:
    want = await trio.to_thread.run_sync(all_resident, folder, kind)
    got: list[Output | None] = [None] * len(PROMPTS)
    number = slots + list(KINDS).index(kind)
    batch_tokens, max_sequences = ((1, 1), (3, 1), (16, 1 + slots % 3), (None, 1 + slots % 3))[number % 4]
    async with mer.open_engine(
        model(folder, kind).path,
        memory=MEMORY,
        slots=slots,
        threads=1 + number % 2,
        io_threads=(1, 4)[slots % 2],
        batch_tokens=batch_tokens,
        max_sequences=max_sequences,
    ) as engine:

        async def one(index: int) -> None:
            got[index] = await streamed(engine, PROMPTS[index], 10)

        async with trio.open_nursery() as nursery:
            for index in range(len(PROMPTS)):
                nursery.start_soon(one, index)
        assert got == want
        await one(2)  # alone, in an engine that has been used
        assert got == want
        s = engine.statistics()
        assert s.settings.slots == s.pool.n_slots == slots
        assert s.cache.hits + s.cache.misses == s.cache.lookups
        assert s.fetcher.started == s.fetcher.landed + s.fetcher.abandoned + s.fetcher.in_flight
        assert s.fetcher.started <= s.cache.misses + s.read_ahead.issued + s.prefetch.issued
        assert s.reader.bytes_read == s.dense_bytes_read + s.fetcher.bytes_read
        assert s.bytes_read == engine.gguf.header_bytes_read + s.reader.bytes_read
        assert (s.pool.pinned, s.pool.filling, s.pool.quarantined) == (0, 0, 0)
        assert s.scheduler.finished == s.scheduler.submitted == 5
        if slots < 3:
            assert s.cache.evictions > 0


async def test_the_embedded_model_is_the_same_in_any_slots() -> None:
    outputs = set()
    for slots in (1, 5, 17, None):
        async with mer.open_engine(mer.embedded_model_path(), memory=MEMORY, slots=slots) as engine:
            outputs.add(await streamed(engine, "Once upon a time", 40))
    assert len(outputs) == 1


# --- against the reference ---


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
async def test_float32_files_give_the_tokens_of_the_reference(folder: Path, arch: str) -> None:
    tiny = tiny_model(folder / f"reference-{arch}.gguf", arch, seed=5)  # type: ignore[arg-type]
    reference = ReferenceModel(tiny.path)
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=3) as engine:
        for prompt in PROMPTS:
            ids = engine.encode(prompt)
            tokens, _ = await streamed(engine, prompt, 12)
            logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
            logits[:, list(engine.tokenizer.eos_ids)] = -np.inf
            assert tokens == tuple(int(row.argmax()) for row in logits)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["int8", "int15"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "F32" not in kind])
async def test_quantized_files_stay_close_to_the_reference_at_every_position(
    folder: Path, kind: str, activations: Activations
) -> None:
    """Teacher forcing: no token is much less likely than the reference's; all experts are used, so no routing flips."""
    tiny = tiny_model(folder / f"all-{kind}-{activations}.gguf", **KINDS[kind] | {"n_experts": 3, "top_k": 3})
    reference = ReferenceModel(tiny.path, int8_activations=activations == "int8", kv_type="f16")
    async with mer.open_engine(tiny.path, memory=MEMORY, slots=2, activations=activations) as engine:
        assert engine.statistics().settings.activations == activations
        assert engine.statistics().settings.kv_type == "f16"
        for prompt in PROMPTS:
            ids = engine.encode(prompt)
            tokens, _ = await streamed(engine, prompt, 12)
            logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
            logits[:, list(engine.tokenizer.eos_ids)] = -np.inf
            chosen = logits[np.arange(len(tokens)), list(tokens)]
            assert (logits.max(1) - chosen <= 4e-3 * logits.max()).all()


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
async def test_a_kept_type_changes_no_token_with_slots_threads_and_batches(folder: Path, kv_type: KVType) -> None:
    """And the tokens are those of the reference that rounds keys and values alike, or as likely within its steps."""
    tiny = tiny_model(folder / f"kv-{kv_type}.gguf", seed=6, d_model=64, n_heads=2, n_kv_heads=1, sliding_window=20)
    reference = ReferenceModel(tiny.path, kv_type=kv_type)
    outputs = set()
    for slots, threads, batch_tokens in ((2, 1, 3), (N_EXPERTS, 2, None)):
        async with mer.open_engine(
            tiny.path, memory=MEMORY, slots=slots, threads=threads, batch_tokens=batch_tokens, max_sequences=1,
            kv_type=kv_type,
        ) as engine:  # fmt: skip
            assert engine.statistics().settings.kv_type == engine.plan.limits.kv_type == kv_type
            outputs.add(await streamed(engine, PROMPTS[2], 30))
            ids, eos = engine.encode(PROMPTS[2]), list(engine.tokenizer.eos_ids)
    ((tokens, _),) = outputs
    logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
    logits[:, eos] = -np.inf
    chosen = logits[np.arange(len(tokens)), list(tokens)]
    assert (logits.max(1) - chosen <= {"f32": 1e-5, "f16": 1e-3, "q8_0": 1e-2}[kv_type] * logits.max()).all()


async def test_heads_that_are_no_whole_blocks_are_refused(folder: Path) -> None:
    with pytest.raises(mer.ConfigError, match=r"kv_type is q8_0, .*blocks of 32 .* heads have 16; f16 and f32 work"):
        async with mer.open_engine(model(folder, "llama-F32").path, memory=MEMORY, kv_type="q8_0"):
            pass


@pytest.mark.parametrize(("kind", "want"), [("llama-F32", "f32"), ("llama-Q4_0", "f16")])
async def test_float32_models_keep_float32(folder: Path, kind: str, want: str) -> None:
    async with mer.open_engine(model(folder, kind).path, memory=MEMORY) as engine:
        assert engine.statistics().settings.kv_type == want


@pytest.mark.parametrize("kind", KINDS)
async def test_merged_split_and_per_expert_files_give_the_same_tokens(folder: Path, kind: str) -> None:
    want = await trio.to_thread.run_sync(all_resident, folder, kind)
    for more in ({"merged": False}, {"split_max_tensors": 7}):
        async with mer.open_engine(model(folder, kind, **more).path, memory=MEMORY, slots=4) as engine:
            assert [await streamed(engine, prompt, 10) for prompt in PROMPTS] == want


# --- sampling ---


async def test_a_seed_repeats_a_generation_whoever_it_is_batched_with(folder: Path) -> None:
    sampling = mer.Sampling(temperature=1.0, top_p=0.95, seed=11)
    async with mer.open_engine(model(folder, "llama-Q4_0").path, memory=MEMORY, slots=3) as engine:
        alone = await engine.generate("the cat", max_tokens=12, sampling=sampling)
        done: list[mer.Completion] = []

        async def one(seed: int) -> None:
            other = mer.Sampling(temperature=1.0, top_p=0.95, seed=seed)
            done.append(await engine.generate("the cat", max_tokens=12, sampling=other))

        async with trio.open_nursery() as nursery:
            for seed in range(8, 14):
                nursery.start_soon(one, seed)
        assert alone.seed == 11
        assert [c.tokens for c in done if c.seed == 11] == [alone.tokens]
        assert len({c.tokens for c in done}) > 1
        free = await engine.generate("the cat", max_tokens=12, sampling=mer.Sampling(temperature=1.0))
        again = await engine.generate("the cat", max_tokens=12, sampling=mer.Sampling(temperature=1.0, seed=free.seed))
        assert again.tokens == free.tokens
