"""Whole models through `CPUWorker` with every expert in memory: no cache, no slots, no scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.compute.cpu.forward import Forward
from mer.compute.cpu.matrix import stored_bytes
from mer.compute.cpu.program import Memory
from mer.compute.cpu.scratch import Limits
from mer.compute.cpu.weights import DenseWeights
from mer.compute.cpu.worker import CPUWorker
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
    RunExperts,
)
from mer.config import KVType
from mer.io.extents import ExpertMap
from mer.io.gguf import GGUFFile, read_gguf
from mer.io.thread_reader import ThreadReader
from mer.model.loading import check_model
from mer.model.spec import ModelSpec

Logits = npt.NDArray[np.float32]
Split = Callable[[Sequence[LoadedExpert]], Sequence[Sequence[LoadedExpert]]]


def together(experts: Sequence[LoadedExpert]) -> Sequence[Sequence[LoadedExpert]]:
    """Run all experts of a layer in one job."""
    return [experts]


def batch(
    tokens: Sequence[int],
    start: int = 0,
    *,
    table: Sequence[int] = (2, 0, 1, 3),
    outputs: Sequence[int] | None = None,
) -> Batch:
    """Return the batch of one sequence's tokens from position `start` on; all rows give logits unless `outputs`."""
    n = len(tokens)
    return Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.arange(start, start + n, dtype=np.int32),
        sequences=np.zeros(n, np.int32),
        tables=np.array([table], np.int32),
        outputs=np.arange(n, dtype=np.int32) if outputs is None else np.array(outputs, np.int32),
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Return one batch of several sequences' batches; their tables are of one length."""
    starts = np.cumsum([0, *(len(b.tokens) for b in batches)])[: len(batches)]
    return Batch(
        tokens=np.concatenate([b.tokens for b in batches]),
        positions=np.concatenate([b.positions for b in batches]),
        sequences=np.concatenate([np.full(len(b.tokens), i, np.int32) for i, b in enumerate(batches)]),
        tables=np.concatenate([b.tables for b in batches]),
        outputs=np.concatenate([b.outputs + first for b, first in zip(batches, starts, strict=True)]).astype(np.int32),
    )


@attrs.define
class Experts:
    """The experts' bytes as they lie in the file, each copied into memory when it is first asked for.

    Args:
        gguf: the file.
        experts: where they lie.
        keep: whether an expert stays as the worker has arranged it, or comes raw from the file each time.
    """

    gguf: GGUFFile
    experts: ExpertMap
    keep: bool
    _loaded: dict[tuple[int, int], tuple[Memory, tuple[int, int, int]]] = attrs.field(factory=dict)

    def load(self, layer: int, expert: int) -> LoadedExpert:
        """Return an expert of a layer."""
        key = layer, expert
        if self.keep and key in self._loaded:
            return LoadedExpert(expert, self._loaded[key][1], raw=(False, False))
        parts = self.experts.experts[layer][expert].parts
        memory = Memory(sum(stored_bytes(p.type, p.rows, p.cols) + 64 for p in parts))
        addresses = []
        for part in parts:
            address = memory.cut(stored_bytes(part.type, part.rows, part.cols))
            with open(self.gguf.paths[part.file], "rb") as stream:
                stream.seek(part.offset)
                memory.view(address, part.n_bytes)[:] = np.frombuffer(stream.read(part.n_bytes), np.uint8)
            addresses.append(address)
        gate, up, down = addresses
        self._loaded[key] = memory, (gate, up, down)
        return LoadedExpert(expert, (gate, up, down), raw=(True, True))


@attrs.define
class Resident:
    """A model whose worker is running."""

    spec: ModelSpec
    worker: ComputeWorker
    experts: Experts
    split: Split

    async def do(self, *operations: Operation) -> Done:
        """Run one job and return its result; raise its error."""
        await self.worker.jobs.send(Job(operations))
        done = await self.worker.results.receive()
        if done.error is not None:
            raise done.error
        return done

    async def run(self, batch: Batch, *, attended: list[Done] | None = None) -> Done:
        """Take a batch through all layers and return its last job's result.

        Args:
            batch: what to run.
            attended: if given, every layer predicts the next one, and the results of attention are appended here.
        """
        operations: list[Operation] = [Begin(batch)]
        for layer in range(self.spec.n_routed):
            done = await self.do(*operations, Advance(layer, predict=attended is not None))
            assert done.expert_ids is not None
            if attended is not None:
                attended.append(done)
            loaded = [self.experts.load(layer, int(expert)) for expert in np.unique(done.expert_ids)]
            *first, last = (RunExperts(layer, tuple(group)) for group in self.split(loaded))
            for group in first:
                await self.do(group)
            operations = [last, Combine(layer)]
        return await self.do(*operations, Advance(self.spec.n_routed))


@asynccontextmanager
async def open_resident(
    path: str | Path,
    limits: Limits,
    *,
    keep: bool = True,
    split: Split = together,
) -> AsyncIterator[Resident]:
    """Load a model and run its worker while the block is open.

    Args:
        path: GGUF file.
        limits: the largest batch, and the threads that compute.
        keep: as for `Experts`.
        split: how a layer's experts are divided into jobs.
    """
    gguf = read_gguf(path)
    model = check_model(gguf)
    spec, experts = model.spec, model.experts
    weights = DenseWeights(model.dense, model.spec.norm_factors())
    with ThreadReader(gguf.paths) as reader:
        await weights.load(reader, lambda _loaded, _total: None)
    worker = CPUWorker(Forward(spec, limits, weights, experts), limits.threads)
    worker.start_threads()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.run)
            yield Resident(spec, worker, Experts(gguf, experts, keep), split)
            worker.jobs.close()
    finally:
        worker.close()


def run(
    path: str | Path,
    batches: Sequence[Batch],
    *,
    threads: int = 2,
    keep: bool = True,
    split: Split = together,
    kv_blocks: int = 8,
    planes: int = 1,
    kv_type: KVType = "f32",
    batch_tokens: int = 0,
) -> list[Done]:
    """Load a model and return the last result of each batch, in order.

    Args:
        path: GGUF file.
        batches: what to run, one after another.
        threads: threads that compute.
        keep: as for `Experts`.
        split: how a layer's experts are divided into jobs.
        kv_blocks: KV blocks in all.
        planes: of activations that meet quantized weights; 1 is int8, 2 is 15 bits.
        kv_type: how keys and values are kept.
        batch_tokens: rows that the worker is made for, if more than the largest batch has.
    """
    limits = Limits(
        batch_tokens=max(batch_tokens, *(len(b.tokens) for b in batches)),
        outputs=max(len(b.outputs) for b in batches),
        sequences=max(len(b.tables) for b in batches),
        sequence_blocks=max(b.tables.shape[1] for b in batches),
        kv_blocks=kv_blocks,
        threads=threads,
        planes=planes,
        kv_type=kv_type,
    )

    async def main() -> list[Done]:
        async with open_resident(path, limits, keep=keep, split=split) as model:
            return [await model.run(batch) for batch in batches]

    return trio.run(main)


def logits(
    path: str | Path,
    tokens: Sequence[int],
    *,
    chunks: Sequence[int] | None = None,
    table: Sequence[int] = (2, 0, 1, 3),
    threads: int = 2,
    keep: bool = True,
    split: Split = together,
    planes: int = 1,
    kv_type: KVType = "f32",
    batch_tokens: int = 0,
) -> Logits:
    """Return the logits [T, V] of one sequence, fed in chunks of the given lengths."""
    batches, start = [], 0
    for length in [len(tokens)] if chunks is None else chunks:
        batches.append(batch(tokens[start : start + length], start, table=table))
        start += length
    assert start == len(tokens)
    done = run(
        path, batches, threads=threads, keep=keep, split=split, planes=planes, kv_type=kv_type,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    results = [result.logits for result in done]
    return np.concatenate([part for part in results if part is not None])
