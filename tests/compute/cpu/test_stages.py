"""Experts in stages and routing predicted: the same bits however it is divided, and each stage keeps to its bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import pytest

from mer.compute.cpu.matrix import is_tiled, stored_bytes
from mer.compute.cpu.program import Memory
from mer.compute.cpu.scratch import Limits
from mer.compute.kernels.interleave import rows_of_tiles
from mer.compute.messages import Advance, Begin, Combine, Done, LoadedExpert, RunExperts, Stage
from mer.compute.reference.blocks.norm import rms_norm
from mer.compute.reference.blocks.router import route as reference_route
from mer.compute.reference.model import ReferenceModel
from mer.errors import ComputeError
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from mer.model.transformer import OVER_CHOSEN
from tests._lib.resident import Resident, Split, batch, joined, logits, open_resident, run
from tests._lib.tiny_models import TinyModel, Type, tiny_model

KINDS = [Type(int(kind)) for kind in sorted(MATRIX_TYPES)]
Array = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of each type, in turns of both architectures, whose rows are no multiples of 16."""
    kind: Type = request.param
    shape: dict[str, Any] = {"d_ff": 90 if GGMLType(int(kind)).block_size == 1 else 96}
    if GGMLType(int(kind)).block_size >= 64:
        shape = {"d_model": 256, "d_ff": 256, "n_heads": 8}
    arch: Any = "llama" if KINDS.index(kind) % 2 else "qwen3moe"
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    return tiny_model(path, arch, weight_type=kind, seed=9, vocab_size=299, n_experts=6, top_k=3, **shape)


TOKENS = [int(token) for token in np.random.default_rng(7).integers(0, 299, 22)]
CHUNKS = [1, 3, 17, 1]


def limits(*, batch_tokens: int = 64, threads: int = 2) -> Limits:
    return Limits(
        batch_tokens=batch_tokens, outputs=20, sequences=1, sequence_blocks=4, kv_blocks=8, threads=threads, planes=1
    )


def staged(seed: int) -> Split:
    """Return a split of a layer's experts into jobs, drawn at random: some whole, some in stages, all of them mixed."""
    rng = random.Random(seed)

    def split(experts: Sequence[LoadedExpert]) -> list[list[LoadedExpert]]:
        n_jobs = rng.randint(2, 4)
        jobs: list[list[LoadedExpert]] = [[] for _ in range(n_jobs)]
        for expert in experts:
            if rng.random() < 0.3:
                rng.choice(jobs).append(expert)
            else:
                first, second = sorted(rng.sample(range(n_jobs), 2))
                jobs[first].append(attrs.evolve(expert, stage=Stage.INNER))
                jobs[second].append(attrs.evolve(expert, stage=Stage.OUTER))
        for job in jobs:
            rng.shuffle(job)
        return jobs

    return split


@pytest.mark.slow
def test_stages_change_no_bit(model: TinyModel) -> None:
    """With one, 3 and 17 rows, raw or arranged before, in any order, and on any number of threads."""
    want = logits(model.path, TOKENS, chunks=CHUNKS)
    for seed, (keep, threads) in enumerate([(False, 2), (True, 1), (True, 3)]):
        got = logits(model.path, TOKENS, chunks=CHUNKS, split=staged(seed), keep=keep, threads=threads, batch_tokens=64)
        assert np.array_equal(got, want)


def test_a_batch_that_just_may_use_stages(model: TinyModel) -> None:
    want = logits(model.path, TOKENS[:4])
    assert np.array_equal(logits(model.path, TOKENS[:4], split=staged(1), batch_tokens=12), want)


def test_types_of_experts_may_differ(tmp_path: Path) -> None:
    """Gate unlike up, one expert unlike another, and a down matrix whose rows are not whole blocks."""
    path = tiny_model(
        tmp_path / "m.gguf", "qwen3moe", weight_type=Type.Q8_0, n_experts=6, top_k=3, d_ff=96, merged=False, seed=4,
        types={
            "blk.0.ffn_gate.1.weight": Type.Q4_0, "blk.0.ffn_up.1.weight": Type.F16,
            "blk.1.ffn_up.0.weight": Type.Q4_1, "blk.1.ffn_down.0.weight": Type.BF16,
            "blk.0.ffn_down.4.weight": Type.Q4_0,
        },
    ).path  # fmt: skip
    reference = ReferenceModel(path, int8_activations=True)
    tokens = [token % 299 for token in TOKENS]
    want = logits(path, tokens, chunks=[1] * len(tokens))
    trace = reference.trace(tokens)
    assert np.median(np.abs(want - trace.logits).max(-1) / np.abs(trace.logits).max()) < 1e-2
    for seed in range(2):
        assert np.array_equal(logits(path, tokens, chunks=CHUNKS, split=staged(seed), batch_tokens=64), want)
        assert np.array_equal(logits(path, tokens, chunks=CHUNKS, keep=bool(seed)), want)


# --- what a stage touches ---------------------------------------------------------------------------


@attrs.define
class Places:
    """An expert's matrices, each in memory of its own, as in the file or overwritten."""

    memory: list[Memory]
    raw: list[npt.NDArray[np.uint8]]

    @classmethod
    def of(cls, model: Resident, layer: int, expert: int) -> Places:
        parts = model.experts.experts.experts[layer][expert].parts
        memory, raw = [], []
        for part in parts:
            content = np.fromfile(model.experts.gguf.paths[part.file], np.uint8, part.n_bytes, offset=part.offset)
            memory.append(Memory(stored_bytes(part.type, part.rows, part.cols)))
            memory[-1].bytes[:] = 0xA5
            raw.append(content)
        return cls(memory, raw)

    def fill(self, *numbers: int) -> None:
        for number in numbers:
            self.memory[number].bytes[: len(self.raw[number])] = self.raw[number]

    def spoil(self, *numbers: int) -> None:
        for number in numbers:
            self.memory[number].bytes[:] = 0xA5

    def spoilt(self, number: int) -> bool:
        return bool((self.memory[number].bytes == 0xA5).all())

    def loaded(self, expert: int, stage: Stage) -> LoadedExpert:
        gate, up, down = (memory.address for memory in self.memory)
        return LoadedExpert(expert, (gate, up, down), (True, True), stage)


@pytest.mark.parametrize("n_tokens", [1, 3])
async def test_a_stage_reads_and_arranges_its_own_matrices_only(model: TinyModel, n_tokens: int) -> None:
    async with open_resident(model.path, limits()) as it:
        plain = await it.run(batch(TOKENS[:n_tokens]))
        operations: list[Any] = [Begin(batch(TOKENS[:n_tokens]))]
        for layer in range(it.spec.n_routed):
            done = await it.do(*operations, Advance(layer))
            assert done.expert_ids is not None
            operations = [Combine(layer)]
            for expert in np.unique(done.expert_ids).tolist():
                places = Places.of(it, layer, expert)
                places.fill(0, 1)
                await it.do(RunExperts(layer, (places.loaded(expert, Stage.INNER),)))
                assert places.spoilt(2)
                part = it.experts.experts.experts[layer][expert].parts[0]
                if is_tiled(part.type):
                    tiles = places.memory[0].bytes[: stored_bytes(part.type, part.rows, part.cols)]
                    tiles = tiles.reshape(-(-part.rows // 16), -1)
                    raw = rows_of_tiles(int(part.type), tiles, part.type.block_bytes, np.arange(part.rows))
                    assert np.array_equal(raw.ravel(), places.raw[0])
                else:
                    assert np.array_equal(places.memory[0].bytes[: part.n_bytes], places.raw[0])
                places.spoil(0, 1)
                places.fill(2)
                await it.do(RunExperts(layer, (places.loaded(expert, Stage.OUTER),)))
                assert places.spoilt(0)
                assert places.spoilt(1)
        done = await it.do(*operations, Advance(it.spec.n_routed))
        assert done.logits is not None
        assert plain.logits is not None
        assert np.array_equal(done.logits, plain.logits)


async def test_an_expert_that_no_row_needs_is_arranged_all_the_same(model: TinyModel) -> None:
    async with open_resident(model.path, limits()) as it:
        plain = await it.run(batch(TOKENS[:1]))
        done = await it.do(Begin(batch(TOKENS[:1])), Advance(0))
        assert done.expert_ids is not None
        other = next(e for e in range(6) if e not in done.expert_ids)
        places = Places.of(it, 0, other)
        places.fill(0, 1, 2)
        routed = [it.experts.load(0, expert) for expert in np.unique(done.expert_ids).tolist()]
        await it.do(RunExperts(0, (places.loaded(other, Stage.WHOLE), *routed)), Combine(0))
        for number, part in enumerate(it.experts.experts.experts[0][other].parts):
            as_in_file = np.array_equal(places.memory[number].bytes[: part.n_bytes], places.raw[number])
            assert as_in_file == (not is_tiled(part.type))
        done = await it.do(Advance(1))
        assert done.expert_ids is not None
        routed = [it.experts.load(1, expert) for expert in np.unique(done.expert_ids).tolist()]
        done = await it.do(RunExperts(1, tuple(routed)), Combine(1), Advance(it.spec.n_routed))
        assert done.logits is not None
        assert plain.logits is not None
        assert np.array_equal(done.logits, plain.logits)


# --- errors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "m.gguf", weight_type=Type.Q4_0, n_experts=6, top_k=3).path


async def attended(it: Resident, n_tokens: int) -> list[LoadedExpert]:
    """Begin a batch and return the experts that its first layer needs."""
    done = await it.do(Begin(batch(TOKENS[:n_tokens])), Advance(0))
    assert done.expert_ids is not None
    return [it.experts.load(0, expert) for expert in np.unique(done.expert_ids).tolist()]


@pytest.mark.parametrize("stage", [Stage.INNER, Stage.OUTER])
async def test_a_batch_with_too_many_pairs_cannot_run_stages(small: Path, stage: Stage) -> None:
    async with open_resident(small, limits(batch_tokens=8)) as it:
        assert it.worker.staged_pairs == 8
        plain = await it.run(batch(TOKENS[:3]))
        first, *_ = await attended(it, 3)
        with pytest.raises(
            ComputeError, match=rf"9 \(token, choice\) pairs .* at most 8; run expert {first.expert} of"
        ):
            await it.do(RunExperts(0, (attrs.evolve(first, stage=stage),)))
        again = await it.run(batch(TOKENS[:3]))
        assert plain.logits is not None
        assert again.logits is not None
        assert np.array_equal(plain.logits, again.logits)


async def test_one_token_may_always_use_stages(small: Path) -> None:
    async with open_resident(small, limits(batch_tokens=1), split=staged(0)) as it:
        assert it.worker.staged_pairs == 3
        await it.run(batch(TOKENS[:1]))


async def test_stages_out_of_turn_are_errors(small: Path) -> None:
    async with open_resident(small, limits()) as it:
        first, *_ = await attended(it, 1)
        inner, outer = (attrs.evolve(first, stage=stage) for stage in (Stage.INNER, Stage.OUTER))
        with pytest.raises(
            ComputeError, match=f"outer stage of expert {first.expert} of layer 0 comes before its inner"
        ):
            await it.do(RunExperts(0, (outer,)))
        await attended(it, 1)
        await it.do(RunExperts(0, (inner,)))
        with pytest.raises(ComputeError, match=f"inner stage of expert {first.expert} of layer 0 comes twice"):
            await it.do(RunExperts(0, (inner,)))
        await attended(it, 1)
        await it.do(RunExperts(0, (inner,)))
        await attended(it, 1)  # the batch was given up
        with pytest.raises(ComputeError, match="comes before its inner"):
            await it.do(RunExperts(0, (outer,)))


# --- prediction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
async def test_the_next_layers_router_is_applied_to_the_stream_before_the_experts(arch: Any, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch, n_experts=9, top_k=3, n_layers=3, seed=6).path
    reference = ReferenceModel(path)
    hidden = reference.trace(TOKENS).hidden
    predictions = []
    for layer in range(2):
        x = hidden[layer] + reference.attend(reference.spec.layers[layer], hidden[layer])
        h = rms_norm(x, reference.vector(f"blk.{layer + 1}.ffn_norm.weight"), reference.spec.norm.eps)
        router = h @ reference.matrix(f"blk.{layer + 1}.ffn_gate_inp.weight").weights.T
        ranked = -np.sort(-router, axis=-1)[:, :4]
        assert (-np.diff(ranked, axis=-1)).min() > 1e-5, "choose another seed: the routing is too close to call"
        predictions.append(reference_route(router, 3, OVER_CHOSEN)[0])
    async with open_resident(path, limits(threads=3)) as it:
        plain = await it.run(batch(TOKENS, outputs=[21]))
        results: list[Done] = []
        done = await it.run(batch(TOKENS, outputs=[21]), attended=results)
        assert plain.logits is not None
        assert done.logits is not None
        assert np.array_equal(done.logits, plain.logits)
        last = results.pop()
        assert last.predicted_ids is None
        for result, want in zip(results, predictions, strict=True):
            assert result.predicted_ids is not None
            assert result.predicted_ids.dtype == np.int32
            assert np.array_equal(result.predicted_ids, want)
        assert (await it.do(Begin(batch(TOKENS[:2])), Advance(0))).predicted_ids is None


async def test_predicting_changes_no_other_result(model: TinyModel) -> None:
    async with open_resident(model.path, limits()) as it:
        for n in (1, 3, 17):
            plain, results = await it.run(batch(TOKENS[:n])), list[Done]()
            done = await it.run(batch(TOKENS[:n]), attended=results)
            assert plain.logits is not None
            assert done.logits is not None
            assert np.array_equal(done.logits, plain.logits)
            assert done.damaged is not None
            assert done.damaged.tolist() == []


async def test_damage_in_the_next_layers_router_is_not_reported_for_this_one(tmp_path: Path) -> None:
    path = tiny_model(
        tmp_path / "m.gguf", n_experts=5, top_k=2, tensors={"blk.1.ffn_norm.weight": np.full(96, np.nan, np.float32)}
    ).path
    async with open_resident(path, limits()) as it:
        done = await it.do(Begin(batch(TOKENS[:4])), Advance(0, predict=True))
        assert done.damaged is not None
        assert done.damaged.tolist() == []
        assert done.predicted_ids is not None
        assert done.predicted_ids.shape == (4, 2)


def test_several_sequences_in_stages_change_no_bit(small: Path) -> None:
    parts = [batch(TOKENS[:2], table=(4, 5)), batch(TOKENS[3:9], table=(0, 1)), batch(TOKENS[5:6], table=(7, 3))]
    alone = [run(small, [part])[0].logits for part in parts]
    (done,) = run(small, [joined(parts)], split=staged(3), batch_tokens=64)
    assert done.logits is not None
    assert np.array_equal(done.logits, np.concatenate([part for part in alone if part is not None]))
