"""Workers of every kind with all experts of a model in memory: for tests that run over all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import trio

import mer
from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.opening import open_device
from mer.compute.cuda.sizes import vram_classes
from mer.compute.cuda.worker import CUDAWorker
from mer.compute.messages import AWAY, Batch, Done, LoadedExpert, Tier
from mer.io.thread_reader import ThreadReader
from mer.model.loading import load_model
from mer.sched.policies.layer_lru import LayerLRU
from tests._lib.resident import Experts, Resident, open_resident, together

WORKERS = ("cpu", "torch-cpu")
"""The devices of the workers."""


@attrs.define(kw_only=True)
class TieredExperts(Experts):
    """Experts of which a worker has some in memory of its own."""

    tier: Tier

    def load(self, layer: int, expert: int) -> LoadedExpert:
        """Return an expert as the scheduler names it."""
        if self.tier.resident(layer, expert):
            return LoadedExpert(expert, AWAY, (False, False))
        return super().load(layer, expert)


@asynccontextmanager
async def open_cuda(path: Path, limits: Limits, slots: int | None = None) -> AsyncIterator[tuple[CUDAWorker, Resident]]:
    """Run a CUDA worker on torch's `cpu` device, with so many slots for experts; by default every expert has one."""
    model = load_model(mer.EngineConfig(path=path))
    slots = slots or model.spec.n_routed * model.spec.n_experts
    with ThreadReader(model.gguf.paths) as reader:
        opened = await open_device(
            "torch-cpu",
            spec=model.spec,
            limits=limits,
            dense=model.dense,
            experts=model.experts,
            classes=vram_classes(model.experts),
            counts=(slots,) if model.spec.n_routed else (),
            policy=LayerLRU(model.spec.n_routed, slots),
            reader=reader,
            on_read=lambda done, total: None,
            arithmetic="",
            hybrid=False,
            forward=None,
        )
    worker = opened.worker
    experts = TieredExperts(model.gguf, model.experts, keep=False, tier=worker.tier)
    worker.start_threads()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            yield worker, Resident(model.spec, worker, experts, together)
            worker.jobs.close()
    finally:
        worker.close()
        worker.close()


@asynccontextmanager
async def open_worker(device: str, path: Path, limits: Limits) -> AsyncIterator[Resident]:
    """Run the worker of a device during the block."""
    if device == "cpu":
        async with open_resident(path, limits) as resident:
            yield resident
    else:
        async with open_cuda(path, limits) as (_, resident):
            yield resident


def run_on(device: str, path: Path, batches: Sequence[Batch], **limits: Any) -> list[Done]:
    """Load a model and return the last result of each batch, in order.

    Args:
        device: whose worker runs them.
        path: GGUF file.
        batches: what to run, one after another.
        **limits: fields of `Limits` that the batches do not determine.
    """
    most = Limits(
        batch_tokens=max(len(b.tokens) for b in batches),
        outputs=max(len(b.outputs) for b in batches),
        sequences=max(len(b.tables) for b in batches),
        sequence_blocks=max(b.tables.shape[1] for b in batches),
        **{"kv_blocks": 1 + max(int(b.tables.max()) for b in batches), "threads": 2} | limits,
    )

    async def main() -> list[Done]:
        async with open_worker(device, path, most) as it:
            return [await it.run(batch) for batch in batches]

    return trio.run(main)


def logits_of(done: Done) -> np.ndarray:
    """Return a result's logits."""
    assert done.logits is not None
    return done.logits
