"""The CUDA worker behind its channels, on torch's `cpu` device: against the reference, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mer
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.device import Device
from mer.compute.cuda.opening import choose_kernels
from mer.compute.cuda.passes import TokenPasses
from mer.compute.cuda.worker import CUDAWorker
from mer.compute.messages import (
    Advance,
    Batch,
    Begin,
    Combine,
    ComputeWorker,
    Done,
    Job,
    LoadedExpert,
    Operation,
    ReadBlocks,
    RunExperts,
    RunResident,
    Stage,
    WriteBlocks,
)
from mer.compute.reference.model import ReferenceModel
from mer.errors import ComputeError
from mer.model.transformer import OVER_CHOSEN
from tests._lib.resident import Experts, batch, joined
from tests._lib.tiny_models import Type, tiny_model
from tests._lib.workers import open_cuda

LIMITS = Limits(batch_tokens=64, outputs=64, sequences=4, sequence_blocks=4, kv_blocks=12, threads=1)
TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, 299, 80)]
N_LAYERS, N_EXPERTS = 3, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def path_of(folder: Path, arch: str, kind: Type) -> Path:
    shape: dict[str, Any] = {"n_layers": N_LAYERS, "n_experts": N_EXPERTS, "vocab_size": 299, "seed": 6}
    return tiny_model(folder / f"{arch}-{kind.name}.gguf", arch, weight_type=kind, **shape).path  # type: ignore[arg-type]


class Running:
    """A worker with all experts at hand in memory."""

    def __init__(self, worker: CUDAWorker, experts: Experts) -> None:
        self.worker, self.experts = worker, experts

    async def do(self, *operations: Operation) -> Done:
        """Run one job and return its result; raise its error."""
        await self.worker.jobs.send(Job(operations))
        done = await self.worker.results.receive()
        if done.error is not None:
            raise done.error
        return done

    def loaded(self, layer: int, numbers: Sequence[int]) -> tuple[LoadedExpert, ...]:
        """Return experts as the store names them."""
        return tuple(self.experts.load(layer, n) for n in numbers)

    async def run(self, it: Batch) -> tuple[np.ndarray, list[np.ndarray]]:
        """Take a batch through the layers one by one; return its logits and the routes."""
        operations: list[Operation] = [Begin(it)]
        routes = []
        for layer in range(N_LAYERS):
            done = await self.do(*operations, Advance(layer))
            assert done.expert_ids is not None
            routes.append(done.expert_ids)
            union = np.unique(done.expert_ids).tolist()
            operations = [RunExperts(layer, self.loaded(layer, union)), Combine(layer)]
        done = await self.do(*operations, Advance(N_LAYERS))
        assert done.logits is not None
        assert done.arranged == frozenset()
        return done.logits, routes


@asynccontextmanager
async def running(path: Path, slots: int = N_LAYERS * N_EXPERTS) -> AsyncIterator[Running]:
    async with open_cuda(path, LIMITS, slots) as (worker, resident):
        assert isinstance(worker, ComputeWorker)
        yield Running(worker, resident.experts)


@pytest.mark.parametrize("slots", [1, 4, 15])
@pytest.mark.parametrize(("arch", "kind"), [("llama", Type.F32), ("qwen3moe", Type.Q8_0)])
async def test_logits_are_the_references(folder: Path, arch: str, kind: Type, slots: int) -> None:
    """One sequence in chunks over several KV blocks, whose numbers are in no order."""
    path = path_of(folder, arch, kind)
    trace = ReferenceModel(path).trace(TOKENS)
    async with running(path, slots) as it:
        start = 0
        for n in (1, 50, 13, 1, 1, 14):
            logits, routes = await it.run(batch(TOKENS[start : start + n], start, table=(9, 2, 5, 1)))
            assert np.array_equal(np.stack(routes), trace.expert_ids[:, start : start + n])
            want = trace.logits[start : start + n]
            assert np.abs(logits - want).max() < 2e-5 * np.abs(want).max()
            start += n
        assert start == len(TOKENS)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_whole_pass_is_what_the_layers_give(folder: Path, n: int) -> None:
    """Also with lengths that need other numbers of blocks, and with sizes that come again."""
    path = path_of(folder, "llama", Type.Q8_0)
    prompts = [TOKENS[: 60 + 3 * i] for i in range(n)]
    async with running(path) as it:
        for number, prompt in enumerate(prompts):
            await it.run(batch(prompt[:40], table=(number, 6 + number)))
            await it.run(batch(prompt[40:], 40, table=(number, 6 + number)))
        for layer in range(N_LAYERS):  # the rest of the experts
            await it.do(RunExperts(layer, it.loaded(layer, range(N_EXPERTS))))
        assert it.worker.tier.full
        (block,) = (await it.do(ReadBlocks((5,)))).kv or ()
        bad = np.full(len(block), 0xFF, np.uint8)  # NaN where a pass begins a block
        begun = tuple(6 + i for i in range(n) if len(prompts[i]) < 64)
        await it.do(WriteBlocks(begun, (bad,) * len(begun)))
        addresses = np.zeros((N_LAYERS, N_EXPERTS, 3), np.int64)
        for step in range(8):
            rows = joined([batch([TOKENS[step + i]], 60 + 3 * i + step, table=(i, 6 + i)) for i in range(n)])
            assert TokenPasses.takes(rows)
            done = await it.do(Begin(rows), Advance(0), RunResident(0, addresses), Advance(N_LAYERS))
            want, routes = await it.run(rows)
            assert done.logits is not None
            assert done.routes is not None
            assert np.array_equal(done.routes, np.stack(routes))
            assert np.allclose(done.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
            done = await it.do(Begin(rows), Advance(0))  # and from behind a layer's attention on
            done = await it.do(RunExperts(0, it.loaded(0, np.unique(routes[0]).tolist())), Combine(0), Advance(1))
            done = await it.do(RunResident(1, addresses), Advance(N_LAYERS))
            assert done.routes is not None
            assert np.array_equal(done.routes, np.stack(routes[1:]))
            assert done.logits is not None
            assert np.allclose(done.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())


async def test_layers_stop_where_an_expert_is_not_there(folder: Path) -> None:
    path = path_of(folder, "llama", Type.F32)
    addresses = np.zeros((N_LAYERS, N_EXPERTS, 3), np.int64)
    async with running(path, slots=7) as it:
        want, routes = await it.run(batch(TOKENS[:1]))
        tier = it.worker.tier
        there = all(tier.resident(layer, e) for layer, ids in enumerate(routes) for e in np.unique(ids).tolist())
        assert there  # as many as three layers of two
        done = await it.do(Begin(batch(TOKENS[:1])), Advance(0), RunResident(0, addresses), Advance(N_LAYERS))
        assert done.logits is not None
        assert np.allclose(done.logits, want, rtol=0, atol=1e-5 * np.abs(want).max())
        for token in TOKENS[1:20]:
            done = await it.do(Begin(batch([token])), Advance(0), RunResident(0, addresses), Advance(N_LAYERS))
            assert done.routes is not None
            assert done.expert_ids is not None
            assert np.array_equal(done.expert_ids, done.routes[-1])
            missing = [e for e in done.expert_ids[0].tolist() if not tier.resident(len(done.routes) - 1, e)]
            assert bool(missing) == (done.logits is None)
            if done.logits is None:
                want, routes = await it.run(batch([token]))
                assert np.array_equal(done.routes, np.stack(routes)[: len(done.routes)])
                break
        else:
            raise AssertionError("no token missed an expert")


async def test_predictions_are_the_next_routers(folder: Path) -> None:
    path = path_of(folder, "qwen3moe", Type.F32)
    reference = ReferenceModel(path)
    from mer.compute.reference.blocks.norm import rms_norm
    from mer.compute.reference.blocks.router import route

    async with running(path) as it:
        operations: list[Operation] = [Begin(batch(TOKENS[:9]))]
        x = reference.trace(TOKENS[:9]).hidden
        for layer in range(N_LAYERS):
            done = await it.do(*operations, Advance(layer, predict=True))
            assert done.expert_ids is not None
            if layer + 1 == N_LAYERS:
                assert done.predicted_ids is None
                break
            before = x[layer] + reference.attend(reference.spec.layers[layer], x[layer])
            h = rms_norm(before, reference.vector(f"blk.{layer + 1}.ffn_norm.weight"), reference.spec.norm.eps)
            logits = h @ reference.matrix(f"blk.{layer + 1}.ffn_gate_inp.weight").weights.T
            want, _ = route(logits, reference.spec.top_k, OVER_CHOSEN)
            assert done.predicted_ids is not None
            assert np.array_equal(done.predicted_ids, want)
            union = np.unique(done.expert_ids).tolist()
            operations = [RunExperts(layer, it.loaded(layer, union)), Combine(layer)]


async def test_kv_blocks_are_read_and_written(folder: Path) -> None:
    path = path_of(folder, "llama", Type.F32)
    async with running(path) as it:
        await it.run(batch(TOKENS[:64], table=(3,)))
        want, _ = await it.run(batch(TOKENS[64:70], 64, table=(3, 4)))
        kv = (await it.do(ReadBlocks((3, 4)))).kv
        assert kv is not None
        assert not kv[0].flags.writeable
        await it.run(batch(TOKENS[10:50], table=(3,)))  # something else
        await it.do(WriteBlocks((7, 0), kv))
        got, _ = await it.run(batch(TOKENS[64:70], 64, table=(7, 0)))
        assert np.array_equal(got, want)


async def test_stages_are_refused_and_leave_the_worker_well(folder: Path) -> None:
    path = path_of(folder, "llama", Type.F32)
    async with running(path, slots=2) as it:
        assert it.worker.staged_pairs == 0
        done = await it.do(Begin(batch(TOKENS[:2])), Advance(0))
        assert done.expert_ids is not None
        whole = it.experts.load(0, int(done.expert_ids[0, 0]))
        part = LoadedExpert(whole.expert, whole.addresses, whole.raw, Stage.INNER)
        with pytest.raises(ComputeError, match="runs experts whole, not in stages"):
            await it.do(RunExperts(0, (part,)))
        assert it.worker.tier.n_resident == 0
        await it.run(batch(TOKENS[:2]))


def test_a_closed_worker_is_of_no_use_and_torch_says_no_to_a_card_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(mer.MerError, match=r"torch cannot use the device 'cuda:0' .*--device cpu works"):
        Device("cuda:0")
    assert choose_kernels(Device("torch-cpu")).form == "torch"
