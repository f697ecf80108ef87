"""All layers in one job: the bits of going layer by layer, and a stop where an expert is not in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from mer.compute.cpu.scratch import Limits
from mer.compute.messages import Advance, Batch, Begin, Combine, Done, Int64Array, RunExperts, RunResident
from mer.errors import ComputeError
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from tests._lib.resident import Resident, batch, joined, open_resident
from tests._lib.tiny_models import TinyModel, Type, tiny_model

KINDS = [Type(int(kind)) for kind in sorted(MATRIX_TYPES)]
TOKENS = [int(token) for token in np.random.default_rng(3).integers(0, 299, 30)]


def limits(threads: int, *, batch_tokens: int = 24) -> Limits:
    return Limits(
        batch_tokens=batch_tokens, outputs=24, sequences=3, sequence_blocks=4, kv_blocks=12, threads=threads, planes=1
    )


def model(folder: Path, kind: Type, **shape: Any) -> TinyModel:
    shape = {"d_ff": 96 if kind.name.startswith("Q") else 90, "n_experts": 6, "top_k": 3} | shape
    if GGMLType(int(kind)).block_size >= 64:
        shape |= {"d_model": 256, "d_ff": 256, "n_heads": 8}
    elif kind.name in ("MXFP4", "IQ4_NL"):
        shape |= {"d_ff": 96}
    arch: Any = "llama" if KINDS.index(kind) % 2 else "qwen3moe"
    return tiny_model(folder / "m.gguf", arch, weight_type=kind, seed=5, vocab_size=299, **shape)


async def addresses(it: Resident, *, without: tuple[tuple[int, int], ...] = ()) -> Int64Array:
    """Return where all experts lie, each arranged by a batch that uses all of them."""
    table = np.zeros((it.spec.n_routed, it.spec.n_experts, 3), np.int64)
    await it.do(Begin(batch([1])))
    for layer in range(it.spec.n_routed):
        loaded = tuple(it.experts.load(layer, expert) for expert in range(it.spec.n_experts))
        await it.do(Advance(layer))
        await it.do(RunExperts(layer, loaded))
        for expert, at in enumerate(loaded):
            table[layer, expert] = at.addresses if (layer, expert) not in without else 0
    return table


async def at_once(it: Resident, table: Int64Array, what: Batch) -> tuple[Done, list[list[list[int]]]]:
    """Run a batch with as few jobs as can be; return the last result, and the experts of all layers."""
    routes: list[list[list[int]]] = []
    done = await it.do(Begin(what), Advance(0), RunResident(0, table), Advance(it.spec.n_routed))
    while True:
        assert done.routes is not None
        routes += done.routes.tolist()
        if done.logits is not None:
            return done, routes
        layer = len(routes) - 1
        assert done.expert_ids is not None
        assert done.expert_ids.tolist() == routes[-1]
        loaded = tuple(it.experts.load(layer, int(expert)) for expert in np.unique(done.expert_ids))
        operations = RunExperts(layer, loaded), Combine(layer)
        if layer + 1 == it.spec.n_routed:
            return await it.do(*operations, Advance(it.spec.n_routed)), routes
        done = await it.do(*operations, Advance(layer + 1), RunResident(layer + 1, table), Advance(it.spec.n_routed))


BATCHES = [
    batch(TOKENS[:1]),
    batch(TOKENS[1:6], 1),
    joined(
        [batch(TOKENS[6:7], 6), batch(TOKENS[7:11], table=(5, 4, 6, 7)), batch(TOKENS[11:12], table=(8, 9, 10, 11))]
    ),
    batch(TOKENS[12:13], 7),
]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_one_job_gives_the_bits_of_many(tmp_path: Path, kind: Type, threads: int) -> None:
    tiny = model(tmp_path, kind)

    async def main() -> None:
        async with open_resident(tiny.path, limits(threads)) as it:
            table = await addresses(it)
            for what in BATCHES:
                attended: list[Done] = []
                want = await it.run(what, attended=attended)
                got, routes = await at_once(it, table, what)
                assert got.logits is not None
                assert want.logits is not None
                assert np.array_equal(got.logits, want.logits)
                assert np.isfinite(got.logits).all()
                assert routes == [done.expert_ids.tolist() for done in attended if done.expert_ids is not None]

    trio.run(main)


@pytest.mark.parametrize("threads", [1, 2])
def test_it_ends_where_an_expert_is_away_and_goes_on_behind(tmp_path: Path, threads: int) -> None:
    """With any one of the experts away, and with most of them."""
    tiny = model(tmp_path, Type.Q4_0, n_layers=4)

    async def main() -> None:
        async with open_resident(tiny.path, limits(threads)) as it:
            every = [(layer, expert) for layer in range(4) for expert in range(6)]
            table = await addresses(it)
            stops = 0
            for what in BATCHES:
                want = await it.run(what)
                for away in [*([key] for key in every), every[::2], every[1:], every]:
                    partial = table.copy()
                    for key in away:
                        partial[key] = 0
                    jobs = it.worker.statistics().jobs
                    got, routes = await at_once(it, partial, what)
                    assert got.logits is not None
                    assert want.logits is not None
                    assert np.array_equal(got.logits, want.logits)
                    used = {(layer, e) for layer, rows in enumerate(routes) for row in rows for e in row}
                    missing = {layer for layer, expert in used if (layer, expert) in away}
                    assert it.worker.statistics().jobs - jobs == 1 + len(missing)
                    stops += len(missing)
            assert stops > 50

    trio.run(main)


def test_batches_that_are_too_large_are_refused(tmp_path: Path) -> None:
    tiny = model(tmp_path, Type.F32)

    async def main() -> None:
        async with open_resident(tiny.path, limits(1)) as it:
            table = await addresses(it)
            assert it.worker.resident_rows == 8, "rows times top_k are as many as a batch may have"
            with pytest.raises(ComputeError, match="9 rows cannot run all layers at once, only one of at most 8"):
                await it.do(Begin(batch(TOKENS[:9])), Advance(0), RunResident(0, table), Advance(it.spec.n_routed))
            done = await it.do(Begin(batch(TOKENS[:8])), Advance(0), RunResident(0, table), Advance(it.spec.n_routed))
            assert done.logits is not None

    trio.run(main)
