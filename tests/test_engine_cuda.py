"""Engines on the CUDA worker, on torch's `cpu` device: every capacity of both tiers, faults, and what is in force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trio

import mer
from mer.compute.cuda.device import Device
from mer.compute.cuda.experts import DeviceExperts
from mer.compute.cuda.products import TorchKernels
from mer.compute.cuda.sizes import kv_layout
from mer.compute.reference.model import ReferenceModel
from mer.engine import Engine
from mer.errors import ComputeError, ConfigError, DeviceError, EngineClosed, NotEnoughMemory
from tests._lib.portions import some
from tests._lib.tiny_models import TinyModel, Type, tiny_model

MEMORY = "8GiB"
DEVICE = "torch-cpu"
N_EXPERTS = 10  # 2 layers of 5
KINDS: dict[str, dict[str, Any]] = {
    "llama-F32": {},
    "llama-Q4_0-Q6_K": {"weight_type": Type.Q4_0, "down_type": Type.Q6_K, "d_ff": 256},
    "qwen3moe-Q8_0": {"arch": "qwen3moe", "weight_type": Type.Q8_0, "top_k": 3},
    "llama-mixed": {
        "weight_type": Type.Q8_0,
        "merged": False,
        "types": {"blk.0.ffn_gate.1.weight": Type.Q4_0, "blk.1.ffn_down.2.weight": Type.F16},
    },
}
PROMPTS: list[str | list[int]] = [
    "the cat",
    [7],
    "it was a dark and stormy night; the rain fell in torrents",
    [5, 6, 7, 8, 5, 6, 7, 8],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model(folder: Path, kind: str, **more: Any) -> TinyModel:
    suffix = "-".join(f"{key}={value}" for key, value in more.items())
    return tiny_model(folder / f"{kind}{suffix}.gguf", **KINDS[kind] | more)


async def generated(engine: Engine, prompts: list[str | list[int]] = PROMPTS) -> list[tuple[int, ...]]:
    """Generate for all prompts at once."""
    got: list[tuple[int, ...]] = [()] * len(prompts)

    async def one(index: int) -> None:
        got[index] = (await engine.generate(prompts[index], max_tokens=8, ignore_eos=True)).tokens

    async with trio.open_nursery() as nursery:
        for index in range(len(prompts)):
            nursery.start_soon(one, index)
    return got


def assert_near(reference: ReferenceModel, ids: list[int], tokens: tuple[int, ...], share: float = 1e-4) -> None:
    """Check by teacher forcing that no token is much less likely than the most likely one of exact arithmetic."""
    logits = reference.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
    logits[:, 2] = -np.inf  # the end of the sequence, which the tests ignore
    chosen = logits[np.arange(len(tokens)), list(tokens)]
    assert (logits.max(1) - chosen <= share * logits.max()).all()


@cache
def reference(path: Path) -> ReferenceModel:
    return ReferenceModel(path)


CAPACITIES = [*itertools.product([3, 5, 10], [3, 6, 10]), (4, 4), (3, 9), (7, 5)]
CASES = [(kind, *c) for i, kind in enumerate(KINDS) for j, c in enumerate(CAPACITIES) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("kind", "slots", "vram_slots"), some(CASES, every=5))
async def test_every_capacity_of_both_tiers_gives_the_tokens_of_the_reference(
    folder: Path, kind: str, slots: int, vram_slots: int
) -> None:
    """The weights are exact in float32 on this device, so that only near ties could flip a token or a route."""
    number = CAPACITIES.index((slots, vram_slots))
    tiny = model(folder, kind)
    async with mer.open_engine(
        tiny.path,
        memory=MEMORY,
        device=DEVICE,
        hybrid="off",
        slots=slots,
        vram_slots=vram_slots,
        batch_tokens=(3, 16, None)[number % 3],
        max_sequences=(1, 3, None)[number % 3],
        policy=(None, "layer-lru", "lfu", "cost")[number % 4],
    ) as engine:
        got = await generated(engine)
        again = (await engine.generate(PROMPTS[2], max_tokens=8, ignore_eos=True)).tokens
        assert again == got[2]
        for prompt, tokens in zip(PROMPTS, got, strict=True):
            assert_near(reference(tiny.path), engine.encode(prompt), tokens)
        s = engine.statistics()
        vram = s.worker.vram
        assert vram is not None
        assert (vram.slots, s.settings.slots) == (vram_slots, slots)
        assert vram.resident <= vram.slots
        assert vram.held == 0
        assert vram.hits + vram.uploads == s.worker.expert_runs
        assert vram.uploads - vram.staged == vram.resident + vram.evictions
        assert (vram.upload_bytes > 0) == (vram.uploads > 0)
        assert s.cache.hits + s.cache.misses == s.cache.lookups
        assert (s.pool.pinned, s.pool.filling, s.pool.quarantined) == (0, 0, 0)
        if vram_slots == N_EXPERTS:
            assert vram.evictions == vram.staged == 0
            assert vram.uploads == vram.resident


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_the_processor_computes_beside_the_device(folder: Path, kind: str) -> None:
    """Experts go back and forth between both sides: re-arranged in memory by one, copied from there by the other."""
    tiny = model(folder, kind)
    exact = "F32" in kind
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, slots=6, vram_slots=3) as engine:
        for _ in range(4):
            for prompt, tokens in zip(PROMPTS, await generated(engine), strict=True):
                assert_near(reference(tiny.path), engine.encode(prompt), tokens, 1e-4 if exact else 5e-2)
        s = engine.statistics()
        assert s.settings.vram is not None
        assert s.worker.vram is not None
        assert (s.settings.vram.hybrid, s.settings.vram.dense) == ("auto", "device")
        assert s.worker.vram.cpu_runs > 0
        assert s.worker.vram.uploads > 0
        assert s.worker.vram.hits + s.worker.vram.uploads + s.worker.vram.cpu_runs == s.worker.expert_runs
        assert (s.pool.pinned, s.pool.filling, s.pool.quarantined) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("hybrid", ["auto", "off"])
@pytest.mark.parametrize("kind", KINDS)
async def test_the_dense_part_stays_with_the_processor_if_vram_has_no_room(
    folder: Path, kind: str, hybrid: Any
) -> None:
    tiny = model(folder, kind)
    config = mer.EngineConfig(path=tiny.path, memory=MEMORY, device=DEVICE, hybrid=hybrid, vram="1GiB")
    vram = mer.plan_memory(mer.load_model(config), config).vram
    assert vram is not None
    assert vram.dense == "device"
    exact = "F32" in kind
    async with mer.open_engine(
        tiny.path, memory=MEMORY, device=DEVICE, hybrid=hybrid, vram=vram.floor_bytes - 1, slots=5, activations="int15"
    ) as engine:
        for prompt, tokens in zip(PROMPTS, await generated(engine), strict=True):
            assert_near(reference(tiny.path), engine.encode(prompt), tokens, 1e-4 if exact else 1e-2)
        s = engine.statistics()
        assert s.settings.vram is not None
        assert (s.settings.vram.dense, s.settings.vram.hybrid) == ("cpu", hybrid)
        assert s.settings.vram.dense_reason.startswith("VRAM with it must be at least")
        assert sum(s.settings.vram.parts.values()) <= s.settings.vram.budget_bytes
        assert s.worker.vram is not None
        assert s.worker.vram.uploads > 0
        if hybrid == "off":
            assert s.worker.vram.cpu_runs == 0


async def test_an_expert_on_the_device_needs_no_slot(folder: Path) -> None:
    """With room for all on the device, each is read once, though memory has room for few."""
    tiny = model(folder, "llama-F32")
    async with mer.open_engine(
        tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", slots=1, prefetch="off"
    ) as engine:
        for _ in range(3):
            await generated(engine)
        s = engine.statistics()
        assert s.worker.vram is not None
        assert s.cache.misses == s.worker.vram.uploads == s.worker.vram.resident <= N_EXPERTS
        assert s.fetcher.started == s.cache.misses + s.read_ahead.issued


async def test_two_runs_are_the_same(folder: Path) -> None:
    tiny = model(folder, "llama-Q4_0-Q6_K")
    runs = []
    for _ in range(2):
        async with mer.open_engine(
            tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", slots=3, vram_slots=4, prefetch="off"
        ) as engine:
            tokens = [(await engine.generate(p, max_tokens=8, ignore_eos=True)).tokens for p in PROMPTS]
            runs.append((tokens, attrs_of(engine)))
    assert runs[0] == runs[1]


def attrs_of(engine: Engine) -> tuple[int, ...]:
    vram = engine.statistics().worker.vram
    assert vram is not None
    return vram.hits, vram.uploads, vram.staged, vram.evictions


@pytest.mark.slow
async def test_long_prompts_and_many_sequences(folder: Path) -> None:
    """Chunks that cross KV blocks, decoding beside them, and blocks that are used again."""
    tiny = model(folder, "llama-F32")
    rng = np.random.default_rng(3)
    prompts: list[str | list[int]] = [rng.integers(3, 300, n).tolist() for n in (130, 1, 64, 63, 100)]
    async with mer.open_engine(
        tiny.path,
        memory=MEMORY,
        device=DEVICE,
        hybrid="off",
        slots=4,
        vram_slots=4,
        context=160,
        max_sequences=3,
        batch_tokens=48,
    ) as engine:
        for _ in range(2):
            for prompt, tokens in zip(prompts, await generated(engine, prompts), strict=True):
                assert_near(reference(tiny.path), list(prompt), tokens)  # type: ignore[arg-type]
        assert engine.statistics().scheduler.reused_tokens > 0


async def test_prefixes_are_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    tiny = model(folder, "qwen3moe-Q8_0")
    prompt = np.random.default_rng(4).integers(3, 300, 140).tolist()
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", context=200) as engine:
        want = (await engine.generate(prompt, max_tokens=8, ignore_eos=True)).tokens
        assert await engine.save_prefix(prompt, tmp_path / "p") == 128
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", context=200) as engine:
        assert await engine.load_prefix(tmp_path / "p") == 128
        done = await engine.generate(prompt, max_tokens=8, ignore_eos=True)
        assert (done.tokens, done.usage.cached_tokens) == (want, 128)
    async with mer.open_engine(tiny.path, memory=MEMORY, device="cpu", context=200) as engine:
        with pytest.raises(mer.MerError, match=r"save one with this model|activations"):
            await engine.load_prefix(tmp_path / "p")


@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
async def test_keys_and_values_are_kept_as_set(folder: Path, tmp_path: Path, kv_type: mer.config.KVType) -> None:
    """Against the reference that rounds them so, also from a file; the smaller they are, the less memory they take."""
    tiny = model(folder, "llama-F32", head_dim=32)
    prompt = np.random.default_rng(5).integers(3, 300, 140).tolist()
    exact = ReferenceModel(tiny.path, kv_type=kv_type)

    def opened() -> AbstractAsyncContextManager[Engine]:
        return mer.open_engine(
            tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", context=200, kv_type=kv_type, max_sequences=1
        )

    async with opened() as engine:
        assert engine.statistics().settings.kv_type == kv_type
        vram = engine.plan.vram
        assert vram is not None
        blocks = engine.plan.limits.kv_blocks
        assert dict(vram.parts)["KV cache"] == blocks * kv_layout(exact.spec, kv_type).block_bytes
        want = (await engine.generate(prompt, max_tokens=8, ignore_eos=True)).tokens
        assert_near(exact, prompt, want)
        assert await engine.save_prefix(prompt, tmp_path / "p") == 128
    async with opened() as engine:
        assert await engine.load_prefix(tmp_path / "p") == 128
        done = await engine.generate(prompt, max_tokens=8, ignore_eos=True)
        assert (done.tokens, done.usage.cached_tokens) == (want, 128)


async def test_a_cancelled_generation_leaves_nothing_behind(folder: Path) -> None:
    tiny = model(folder, "llama-F32")
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", slots=2, vram_slots=2) as engine:
        want = await generated(engine, PROMPTS[:1])
        for n_events in range(4):
            async with engine.stream(PROMPTS[2], max_tokens=20, ignore_eos=True) as events:
                for _ in range(n_events):
                    await events.receive()
        assert await generated(engine, PROMPTS[:1]) == want
        s = engine.statistics()
        assert s.scheduler.cancelled >= 3
        assert (s.pool.pinned, s.pool.quarantined) == (0, 0)


# --- faults -----------------------------------------------------------------------------------------


def failing(at: int, error: Exception, original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does as `original`, and raises at one of its calls."""
    calls = itertools.count()

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("at", [0, 1, 4, 7, 12])
@pytest.mark.parametrize("where", ["upload", "matmul"])
async def test_a_device_out_of_memory_fails_the_batch_and_the_engine_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    tiny = model(folder, "llama-F32")
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", slots=3, vram_slots=3) as engine:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        owner: Any = Device if where == "upload" else TorchKernels
        with monkeypatch.context() as patch:
            patch.setattr(owner, where, failing(at, error, getattr(owner, where)))
            with pytest.raises(DeviceError, match=r"ran out of memory .CUDA out of memory.; lower") as caught:
                await engine.generate(PROMPTS[2], max_tokens=8, ignore_eos=True)
            assert not caught.value.fatal
        for prompt, tokens in zip(PROMPTS, await generated(engine), strict=True):
            assert_near(reference(tiny.path), engine.encode(prompt), tokens)
        s = engine.statistics()
        assert (s.pool.pinned, s.pool.quarantined, s.scheduler.failed) == (0, 0, 1)
        assert s.worker.vram is not None
        assert s.worker.vram.held == 0


async def test_the_processor_is_free_again_after_a_device_has_failed_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = model(folder, "llama-F32")
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, slots=6, vram_slots=2) as engine:
        await generated(engine)
        for at in range(6):
            error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            with monkeypatch.context() as patch:
                patch.setattr(DeviceExperts, "run", failing(at, error, DeviceExperts.run))
                with pytest.raises(DeviceError):
                    await engine.generate(PROMPTS[2], max_tokens=8, ignore_eos=True)
            for prompt, tokens in zip(PROMPTS, await generated(engine), strict=True):
                assert_near(reference(tiny.path), engine.encode(prompt), tokens)


async def test_guesses_do_not_keep_a_whole_token_from_being_one_job(folder: Path) -> None:
    """Every expert is on the device, few are in memory, and the prefetcher may guess."""
    path = model(folder, "llama-F32").path
    async with mer.open_engine(
        path, memory=MEMORY, device=DEVICE, slots=3, prefetch="markov", prefix_reuse=False
    ) as engine:
        while engine.statistics().worker.vram.resident < N_EXPERTS:  # type: ignore[union-attr]
            await generated(engine)
        before = engine.statistics().worker.jobs
        await engine.generate([7], max_tokens=20, ignore_eos=True)
        assert engine.statistics().worker.jobs == before + 20


async def test_an_error_of_cuda_fails_the_batch_and_closes_the_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = model(folder, "llama-F32")
    error = RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off", slots=3, vram_slots=3) as engine:
        monkeypatch.setattr(Device, "upload", failing(2, error, Device.upload))
        with pytest.raises(DeviceError, match="illegal memory access") as caught:
            await engine.generate(PROMPTS[2], max_tokens=8)
        assert caught.value.fatal
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(EngineClosed, match="its device failed"):
            await engine.generate(PROMPTS[0], max_tokens=8)
        assert engine.statistics().pool.pinned == 0


async def test_another_error_of_a_job_is_a_compute_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = model(folder, "llama-F32")
    async with mer.open_engine(tiny.path, memory=MEMORY, device=DEVICE, hybrid="off") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(TorchKernels, "matmul", failing(5, ValueError("odd"), TorchKernels.matmul))
            with pytest.raises(ComputeError, match="a compute job failed: ValueError: odd"):
                await engine.generate(PROMPTS[0], max_tokens=2)
        await engine.generate(PROMPTS[0], max_tokens=2)


async def test_too_little_vram_is_refused_with_the_arithmetic(folder: Path) -> None:
    path = model(folder, "llama-F32").path
    with pytest.raises(NotEnoughMemory, match=r"a VRAM budget of 64.0 KiB") as caught:
        async with mer.open_engine(path, memory=MEMORY, device=DEVICE, hybrid="off", vram="64KiB"):
            raise AssertionError
    text = str(caught.value)
    for part in ("passing experts", "scratch", "expert slots", "--vram"):
        assert part in text
    needed = caught.value.needed_bytes
    async with mer.open_engine(path, memory=MEMORY, device=DEVICE, hybrid="off", vram=needed, context=64) as engine:
        await engine.generate(PROMPTS[0], max_tokens=2)
    with pytest.raises(NotEnoughMemory):
        async with mer.open_engine(path, memory=MEMORY, device=DEVICE, hybrid="off", vram=needed - 1):
            raise AssertionError


async def test_a_device_that_has_less_than_the_plan_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    monkeypatch.setattr(Device, "zeros", failing(20, error, Device.zeros))
    with pytest.raises(NotEnoughMemory, match=r"(?s)ran out of memory while .* opened.*expert slots.*--vram"):
        async with mer.open_engine(model(folder, "llama-F32").path, memory=MEMORY, device=DEVICE, hybrid="off"):
            raise AssertionError


# --- which device -----------------------------------------------------------------------------------


async def test_what_is_in_force_is_reported(folder: Path) -> None:
    async with mer.open_engine(
        model(folder, "llama-F32").path, memory=MEMORY, device=DEVICE, hybrid="off", vram="64MiB"
    ) as engine:
        settings, worker = engine.statistics().settings, engine.statistics().worker
        assert (settings.device, settings.kernels, settings.activations) == (DEVICE, "torch", "float32")
        assert worker.name == DEVICE
        vram = settings.vram
        assert vram is not None
        assert (vram.budget_bytes, vram.budget_source) == (64 << 20, "given")
        assert sum(vram.parts.values()) <= vram.budget_bytes
        assert vram.pinned.startswith("not pinned")
        assert vram.slots == N_EXPERTS
    async with mer.open_engine(model(folder, "llama-F32").path, memory=MEMORY) as engine:
        settings = engine.statistics().settings
        assert (settings.device, settings.vram) == ("cpu", None)
        assert settings.device_reason.startswith("auto: ")


async def test_devices_that_are_not_there_are_refused(folder: Path) -> None:
    path = model(folder, "llama-F32").path
    for device in ("cuda", "cuda:7"):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: .*device 'cpu' works"):
            async with mer.open_engine(path, device=device):
                raise AssertionError
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        mer.EngineConfig(path=path, device="gpu")
    with pytest.raises(ConfigError, match="vram is set, and the device is cpu"):
        async with mer.open_engine(path, device="cpu", vram="1GiB"):
            raise AssertionError
    with pytest.raises(ConfigError, match=r"vram_slots is 1; .* 3 sizes"):
        async with mer.open_engine(
            model(folder, "llama-mixed").path, device=DEVICE, hybrid="off", memory=MEMORY, vram_slots=1
        ):
            raise AssertionError
