"""Whole models through the CPU worker: against Hugging Face and the reference, and the same bits however they run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mer.compute.messages import LoadedExpert
from mer.compute.reference.model import ReferenceModel
from mer.config import KVType
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from tests._lib.resident import batch, joined, logits, run
from tests._lib.tiny_models import TinyModel, Type, tiny_model

KINDS = [Type(int(kind)) for kind in sorted(MATRIX_TYPES)]
QUANTIZED = [kind for kind in KINDS if GGMLType(int(kind)).block_size > 1]


def rows_for(kind: Type, **otherwise: Any) -> dict[str, Any]:
    """Return the sizes of a model whose rows are whole blocks of 256, for the types that need these."""
    return {"d_model": 256, "d_ff": 256, "n_heads": 8} if GGMLType(int(kind)).block_size >= 64 else otherwise


def some_tokens(n: int, vocab_size: int = 300, seed: int = 7) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab_size, n)]


def error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return each position's largest error, relative to the largest logit."""
    return np.abs(got - want).max(-1) / np.abs(want).max()


def safe(path: Path, tokens: Sequence[int], int8_activations: bool) -> slice:
    """Return the positions before the first whose routing could flip: logits of the last chosen and the first left out
    expert that differ by less than 1e-4.

    Behind a flip everything may differ, at that position and, through attention, at all later ones.
    """
    model = ReferenceModel(path, int8_activations=int8_activations)
    trace = model.trace(tokens)
    k = model.spec.top_k
    if k == model.spec.n_experts:
        return slice(len(tokens))
    ranked = -np.sort(-trace.router_logits, axis=-1)
    close = ((ranked[..., k - 1] - ranked[..., k]) < 1e-4).any(0)
    end = int(np.argmax(close)) if close.any() else len(tokens)
    assert end >= len(tokens) // 2, "choose another seed: the routing of this model is too close to call"
    return slice(end)


# --- against oracles --------------------------------------------------------------------------------


HF_SHAPES: list[dict[str, Any]] = [
    {"arch": "llama"},
    {"arch": "llama", "n_kv_heads": 3, "n_experts": 3, "top_k": 1, "tied": True, "merged": False, "d_ff": 40},
    {
        "arch": "llama",
        "n_kv_heads": 6,
        "n_experts": 9,
        "top_k": 4,
        "vocab_size": 289,
        "d_model": 84,
        "rope_factor": 2.0,
    },
    {"arch": "qwen3moe"},
    {"arch": "qwen3moe", "n_kv_heads": 3, "n_experts": 7, "top_k": 3, "tied": True, "merged": False, "d_ff": 56},
    {"arch": "qwen3moe", "n_experts": 4, "top_k": 4, "head_dim": 10, "d_model": 52, "rope_base": 1e6, "n_layers": 3},
]


@pytest.mark.parametrize("shape", HF_SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_float_models_equal_hugging_face(shape: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m.gguf", **shape)
    tokens = some_tokens(40, model.shape.vocab_size)
    want = model.hf_logits(tokens)
    part = safe(model.path, tokens, int8_activations=False)
    assert (error(logits(model.path, tokens), want)[part] < 1e-4).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("window", [1, 7, 63, 65, 100])
def test_windows_equal_hugging_face(arch: Any, window: int, tmp_path: Path) -> None:
    """Prompts longer than the window, and windows below, about and above a tile; in one chunk and in several."""
    path = tmp_path / "m.gguf"
    model = tiny_model(path, arch, sliding_window=window, n_experts=3, top_k=3)  # so that no routing can flip
    tokens = some_tokens(170, model.shape.vocab_size)
    want = model.hf_logits(tokens)
    got = logits(path, tokens)
    assert (error(got, want) < 1e-4).all()
    whole = tiny_model(tmp_path / "whole.gguf", arch, n_experts=3, top_k=3).hf_logits(tokens)
    assert (error(got, whole)[:window] < 1e-4).all()
    assert (error(got, whole)[2 * window :] > 1e-3).all()
    assert (error(ReferenceModel(path).logits(tokens), want) < 1e-5).all()
    assert np.array_equal(logits(path, tokens, chunks=[1, 70, 2, 97], threads=3), got)


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_kept_types_equal_the_reference_that_rounds_alike(arch: Any, kv_type: KVType, tmp_path: Path) -> None:
    """A float32 rounding now and then moves a value over a tie: one step of it, among all that a token attends to.

    A step is 2**-11 of a value as F16 and 1/254 of its block's largest as Q8_0. Without rounding the reference is as
    far off as many steps are.
    """
    path = tmp_path / "m.gguf"
    tiny_model(path, arch, seed=4, n_experts=3, top_k=3, n_heads=3, n_kv_heads=1, head_dim=32, sliding_window=90)
    tokens = some_tokens(150)
    got = logits(path, tokens, kv_type=kv_type)
    errors = error(got, ReferenceModel(path, kv_type=kv_type).logits(tokens))
    step = {"f16": 2.0**-11, "q8_0": 1 / 254}[kv_type]
    assert errors.max() < step
    assert np.median(errors) < step / 20
    plain = error(got, ReferenceModel(path).logits(tokens))
    assert np.median(plain) > 5 * np.median(errors)
    for chunks, threads in (([1] * 3 + [61, 2, 84], 1), ([150], 3), ([64, 86], 4)):
        again = logits(path, tokens, kv_type=kv_type, chunks=chunks, threads=threads)
        assert np.array_equal(again, got)


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("kind", [Type.F16, Type.BF16])
def test_half_models_equal_the_reference(arch: Any, kind: Type, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch, weight_type=kind, seed=2).path
    tokens = some_tokens(40)
    part = safe(path, tokens, int8_activations=False)
    assert (error(logits(path, tokens), ReferenceModel(path).logits(tokens))[part] < 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_equal_the_reference_on_int8_activations(arch: Any, kind: Type, tmp_path: Path) -> None:
    """Where no activation is rounded the other way, only float32 summation differs: some 1e-7.

    A float32 rounding now and then moves an activation over a tie between two int8 values: one step of 1/127 of its
    block's largest. Among some hundred addends that is about 1e-3 of a result, at this position and the later ones,
    and the next layer's roundings move after it. So most positions must be exact, and all within a few such steps.
    """
    errors = []
    for seed in (3, 4, 5):
        path = tiny_model(tmp_path / f"{seed}.gguf", arch, weight_type=kind, seed=seed, **rows_for(kind)).path
        tokens = some_tokens(24, seed=seed)
        want = ReferenceModel(path, int8_activations=True).logits(tokens)
        part = safe(path, tokens, int8_activations=True)
        errors.append(error(logits(path, tokens), want)[part])
    every = np.concatenate(errors)
    assert (every < 0.08).all()
    assert np.median(every) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_on_15_bit_activations_are_close_to_the_reference_on_float_ones(
    arch: Any, kind: Type, tmp_path: Path
) -> None:
    """A rounding is off by at most 1/32512 of its block's largest, and all experts are used: no routing can flip."""
    shape = {"n_experts": 3, "top_k": 3} | rows_for(kind)
    path = tiny_model(tmp_path / "m.gguf", arch, weight_type=kind, seed=3, **shape).path
    tokens = some_tokens(40)
    want = ReferenceModel(path).logits(tokens)
    fine = logits(path, tokens, planes=2)
    assert (error(fine, want) < 1e-3).all()
    assert error(logits(path, tokens), want).max() > 10 * error(fine, want).max()
    assert np.array_equal(logits(path, tokens, planes=2, chunks=[1, 9, 2, 28], threads=3), fine)


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUANTIZED)
def test_types_may_differ_between_tensors(kind: Type, tmp_path: Path) -> None:
    """Rows that are not multiples of 16, float beside quantized, and two block sizes at once."""
    model = tiny_model(
        tmp_path / "m.gguf", weight_type=Type.Q8_0, expert_type=kind, down_type=Type.F16, n_experts=4,
        types={"blk.1.attn_q.weight": Type.F32, "blk.0.attn_output.weight": Type.Q6_K, "output.weight": Type.BF16},
        d_model=256, d_ff=200, n_heads=8, vocab_size=270, seed=1,
    )  # fmt: skip
    tokens = some_tokens(16, 270)
    want = ReferenceModel(model.path, int8_activations=True).logits(tokens)
    got = logits(model.path, tokens)
    part = safe(model.path, tokens, int8_activations=True)
    assert (error(got, want)[part] < 0.04).all()
    assert np.array_equal(logits(model.path, tokens, chunks=[1, 5, 10], threads=3), got)


# --- the same bits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of each type, in turns of both architectures, whose rows are no multiples of 16."""
    kind: Type = request.param
    shape = rows_for(kind, d_ff=96 if kind in QUANTIZED else 90)
    arch: Any = "llama" if KINDS.index(kind) % 2 else "qwen3moe"
    return tiny_model(tmp_path_factory.mktemp("m") / "m.gguf", arch, weight_type=kind, seed=9, vocab_size=299, **shape)


TOKENS = some_tokens(90, 299)


@pytest.fixture(scope="module")
def want(model: TinyModel) -> npt.NDArray[np.float32]:
    return logits(model.path, TOKENS)


Array = npt.NDArray[np.float32]


@pytest.mark.parametrize("chunks", [[1] * 3 + [7, 2, 78], [33, 57], [63, 1, 1, 25], [64, 26]])
def test_chunks_change_no_bit(model: TinyModel, want: Array, chunks: list[int]) -> None:
    assert np.array_equal(logits(model.path, TOKENS, chunks=chunks), want)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(model: TinyModel, want: Array, threads: int) -> None:
    assert np.array_equal(logits(model.path, TOKENS, threads=threads), want)
    assert np.array_equal(logits(model.path, TOKENS[:12], chunks=[1] * 12, threads=threads), want[:12])


def test_kv_blocks_change_no_bit(model: TinyModel, want: Array) -> None:
    for table in ([0, 1], [7, 3], [1, 0, 5]):
        assert np.array_equal(logits(model.path, TOKENS, table=table, chunks=[80, 10]), want)


def test_tables_may_grow_from_batch_to_batch(model: TinyModel, want: Array) -> None:
    """Batches of as many tokens, but with wider and wider tables of two sequences."""
    batches = []
    for start, blocks in ((0, 1), (30, 2), (60, 3)):
        tables = [6, 2, 5][:blocks], [0, 7, 3][:blocks]
        batches.append(joined([batch(TOKENS[start : start + 30], start, table=table) for table in tables]))
    rows = [done.logits for done in run(model.path, batches)]
    got = np.stack([part.reshape(2, 30, -1) for part in rows if part is not None], 1).reshape(2, 90, -1)
    assert np.array_equal(got, np.stack([want, want]))


def test_experts_change_no_bit_whether_fresh_or_arranged_before(model: TinyModel, want: Array) -> None:
    assert np.array_equal(logits(model.path, TOKENS, chunks=[5, 40, 1, 44], keep=False), want)
    assert np.array_equal(logits(model.path, TOKENS, chunks=[5, 40, 1, 44], keep=True), want)


def test_jobs_of_experts_change_no_bit(model: TinyModel, want: Array) -> None:
    def one_by_one(experts: Sequence[LoadedExpert]) -> list[list[LoadedExpert]]:
        return [[expert] for expert in reversed(experts)]

    def in_two(experts: Sequence[LoadedExpert]) -> list[Sequence[LoadedExpert]]:
        return [experts[1::2], experts[::2]]

    for split in (one_by_one, in_two):
        assert np.array_equal(logits(model.path, TOKENS, chunks=[60, 1, 29], split=split), want)


def test_sequences_together_change_no_bit(model: TinyModel, want: Array) -> None:
    others = [some_tokens(n, 299, seed=n) for n in (3, 70, 1)]
    alone = [want, *(logits(model.path, tokens) for tokens in others)]
    sequences = list(zip([TOKENS, *others], [[7, 2], [0, 6], [5, 1], [3, 4]], strict=True))

    def part(start: int, end: int) -> list[Any]:
        live = [(tokens, table) for tokens, table in sequences if len(tokens) > start]
        return [batch(tokens[start:end], start, table=table) for tokens, table in live]

    rows: list[list[Array]] = [[] for _ in sequences]
    edges = (0, 1, 2, 66, 67, 90)
    batches = [part(start, end) for start, end in itertools.pairwise(edges)]
    for done, parts, start in zip(run(model.path, [joined(b) for b in batches]), batches, edges, strict=False):
        assert done.logits is not None
        live = [i for i, (tokens, _) in enumerate(sequences) if len(tokens) > start]
        pieces = np.split(done.logits, np.cumsum([len(b.tokens) for b in parts])[:-1])
        for i, piece in zip(live, pieces, strict=True):
            rows[i].append(piece)
    for got, expected in zip(rows, alone, strict=True):
        assert np.array_equal(np.concatenate(got), expected)


def test_only_the_rows_asked_for_give_logits(model: TinyModel, want: Array) -> None:
    done = run(model.path, [batch(TOKENS, outputs=[89, 0, 17])])[0]
    assert done.logits is not None
    assert np.array_equal(done.logits, want[[89, 0, 17]])


@pytest.mark.parametrize("n_tokens", [1, 7])
def test_every_expert_that_is_routed_to_runs_within_the_limits(n_tokens: int, tmp_path: Path) -> None:
    """Also if the batch's rows fill the scratch rows exactly, expert by expert."""
    path = tiny_model(tmp_path / "m.gguf", n_experts=4, top_k=4, weight_type=Type.Q8_0).path
    tokens = some_tokens(14)
    want = logits(path, tokens)
    assert np.array_equal(logits(path, tokens, chunks=[n_tokens] * (14 // n_tokens)), want)
