"""Damage and neighbours, on every worker: what one sequence does reaches no other, and no later one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mer.compute.cpu.scratch import Limits
from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.messages import ReadBlocks, WriteBlocks
from mer.compute.reference.model import ReferenceModel
from tests._lib.resident import Resident, batch, joined
from tests._lib.tiny_models import Type, tiny_model
from tests._lib.workers import WORKERS, logits_of, open_worker, run_on

LIMITS = Limits(batch_tokens=80, outputs=80, sequences=4, sequence_blocks=4, kv_blocks=12, threads=2)
NAN_TOKEN = 5
TOKENS = [int(token) for token in np.random.default_rng(7).integers(6, 299, 80)]  # NAN_TOKEN is none of them
SHAPES: list[dict[str, Any]] = [
    {"weight_type": Type.F32, "d_ff": 90},
    {"weight_type": Type.Q8_0, "d_ff": 96},
    {"weight_type": Type.Q4_0, "d_ff": 40},  # gate and up have padding rows, down is F32
    {"weight_type": Type.Q4_0, "d_ff": 96, "d_model": 88, "head_dim": 16},  # the residual stream has padding
]

Logits = npt.NDArray[np.float32]


@pytest.fixture(params=WORKERS)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def assert_same(device: str, got: Logits, want: Logits) -> None:
    """Check logits that other rows in the batch must not change: by no bit, where the worker promises that.

    torch sums in another order for another number of rows.
    """
    if device == "cpu":
        assert np.array_equal(got, want)
    else:
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def with_a_bad_token(folder: Path, **shape: Any) -> tuple[Path, Path]:
    """Return a model, and the same one with NaN in the embedding of one token."""
    shape = {**shape, "vocab_size": 299, "types": {"token_embd.weight": Type.F32}}
    good = tiny_model(folder / "good.gguf", **shape)
    embedding = good.weights["token_embd.weight"].copy()
    embedding[NAN_TOKEN, 3] = np.nan
    return good.path, tiny_model(folder / "bad.gguf", **shape, tensors={"token_embd.weight": embedding}).path


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_a_damaged_token_is_reported_and_harms_no_other_sequence_nor_a_later_batch(
    device: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    good, bad = with_a_bad_token(tmp_path, **shape)
    tokens = TOKENS[:20]
    want = logits_of(run_on(device, good, [batch(tokens)])[0])
    hurt = joined([batch([11, 12, NAN_TOKEN, 13], table=[4, 5]), batch(tokens, table=[0, 1])])
    again = joined([batch(tokens, table=[5, 2]), batch(tokens[:4], table=[3, 4])])
    first, second = run_on(device, bad, [hurt, again])
    assert first.damaged is not None
    # A GPU masks the rows behind each row of a prompt, and 0 * NaN is NaN: the whole sequence fails there.
    assert set(first.damaged.tolist()) == ({2, 3} if device == "cpu" else {0, 1, 2, 3})
    assert not np.isfinite(logits_of(first)[2:4]).any()
    assert_same(device, logits_of(first)[4:], want)
    assert second.damaged is not None
    assert second.damaged.tolist() == []
    assert_same(device, logits_of(second), np.concatenate([want, want[:4]]))


def test_a_batch_of_nothing_but_damaged_tokens_is_reported(device: str, tmp_path: Path) -> None:
    """Every router logit is NaN then; damage behind the last router shows in the logits alone."""
    shape: dict[str, Any] = {"n_experts": 4, "top_k": 3}
    nan = np.full(96, np.nan, np.float32)
    bad = tiny_model(tmp_path / "bad.gguf", **shape, tensors={"output_norm.weight": nan})
    worse = tiny_model(tmp_path / "worse.gguf", **shape, tensors={"blk.0.ffn_norm.weight": nan})
    tokens = TOKENS[:20]
    done = run_on(device, worse.path, [batch(tokens), batch(tokens[:1], 20)])
    for result, n in zip(done, (20, 1), strict=True):
        assert result.damaged is not None
        assert result.damaged.tolist() == list(range(n))
        assert np.isnan(logits_of(result)).all()
    late = run_on(device, bad.path, [batch(tokens)])[0]
    assert late.damaged is not None
    assert late.damaged.tolist() == []  # the final norm comes after the last router
    assert np.isnan(logits_of(late)).all()


@pytest.mark.parametrize("nan_block", [0, 7])
def test_what_a_failed_generation_leaves_in_its_block_reaches_nobody(
    device: str, nan_block: int, tmp_path: Path
) -> None:
    """Sequences of unequal length decode together, and the tables of the short ones are padded on a GPU.

    What pads them is masked, but 0 * NaN is NaN: it must not be a block of anybody else, such as the first of all.
    """
    good, bad = with_a_bad_token(tmp_path, weight_type=Type.F32)
    long, short = TOKENS[: KV_TILE + 3], TOKENS[40:44]
    alone = [run_on(device, good, [batch(it[:-1]), batch(it[-1:], len(it) - 1)])[1] for it in (short, long)]
    want = np.concatenate([logits_of(done) for done in alone])
    failed, *_, together = run_on(
        device,
        bad,
        [
            batch([NAN_TOKEN, 11, 12], table=[nan_block]),
            batch(long[:-1], table=[2, 3]),
            batch(short[:-1], table=[4]),
            joined([batch(short[-1:], len(short) - 1, table=[4, 0]), batch(long[-1:], len(long) - 1, table=[2, 3])]),
        ],
        kv_blocks=12,
    )
    assert np.isnan(logits_of(failed)).all()
    assert together.damaged is not None
    assert together.damaged.tolist() == []
    assert_same(device, logits_of(together), want)


async def fill_with_nan(it: Resident, *blocks: int) -> None:
    """Overwrite KV blocks with NaN."""
    (block,) = (await it.do(ReadBlocks((blocks[0],)))).kv or ()
    await it.do(WriteBlocks(blocks, (np.full(len(block), 0xFF, np.uint8),) * len(blocks)))


async def test_a_block_that_once_had_nan_is_as_good_as_new(device: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.gguf", vocab_size=299).path
    async with open_worker(device, path, LIMITS) as it:
        want = logits_of(await it.run(batch(TOKENS[:3], table=(2, 5))))
        await fill_with_nan(it, 2, 5)
        assert np.array_equal(logits_of(await it.run(batch(TOKENS[:3], table=(2, 5)))), want)


async def test_nan_in_every_block_that_is_nobodys_reaches_nobody(device: str, tmp_path: Path) -> None:
    """Prompts and decoding sequences in one batch, behind which nothing but NaN lies."""
    path = tiny_model(tmp_path / "m.gguf", vocab_size=299).path
    parts = [TOKENS[:5], TOKENS[20:37], TOKENS[40:44], TOKENS[: KV_TILE + 1]]
    tables = [(0, 7, 0), (4, 3, 0), (8, 9, 0), (1, 2, 0)]
    async with open_worker(device, path, LIMITS) as it:
        want = np.concatenate(
            [logits_of(await it.run(batch(p)))[-n:] for p, n in zip(parts, (5, 17, 1, 1), strict=True)]
        )
        await fill_with_nan(it, *range(LIMITS.kv_blocks))
        for tokens, table in list(zip(parts, tables, strict=True))[2:]:
            await it.run(batch(tokens[:-1], table=table))
        rows = [
            batch(parts[0], table=tables[0]),
            batch(parts[1], table=tables[1]),
            batch(parts[2][-1:], 3, table=tables[2]),
            batch(parts[3][-1:], KV_TILE, table=tables[3]),
        ]
        assert_same(device, logits_of(await it.run(joined(rows))), want)


async def test_sequences_do_not_see_each_other(device: str, tmp_path: Path) -> None:
    """A prompt, a longer one and two that decode in one batch, with tables that have room to spare."""
    path = tiny_model(tmp_path / "m.gguf", vocab_size=299, n_layers=3, n_experts=5).path
    reference = ReferenceModel(path)
    parts = [TOKENS[:5], TOKENS[20:37], TOKENS[40:44], TOKENS[50:70]]
    tables = [(0, 7), (4, 3), (8, 9), (1, 2)]
    async with open_worker(device, path, LIMITS) as it:
        for tokens, table in list(zip(parts, tables, strict=True))[2:]:
            await it.run(batch(tokens[:-1], table=table))
        logits = logits_of(
            await it.run(
                joined(
                    [
                        batch(parts[0], table=tables[0]),
                        batch(parts[1], table=tables[1]),
                        batch(parts[2][-1:], 3, table=tables[2]),
                        batch(parts[3][-1:], 19, table=tables[3]),
                    ]
                )
            )
        )
    want = np.concatenate([reference.logits(p)[-n:] for p, n in zip(parts, (5, 17, 1, 1), strict=True)])
    assert np.abs(logits - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
def test_far_positions_are_as_good_as_near_ones(device: str, arch: Any, tmp_path: Path) -> None:
    """What a window lets see depends on distances alone, so that no logit says where a text stands.

    An angle in float32 would be off by 4e-3 near position 100,000, and the logits by 5e-4.
    """
    shape: dict[str, Any] = {"rope_factor": 2.0} if arch == "llama" else {}
    path = tiny_model(tmp_path / "m.gguf", arch, sliding_window=8, n_experts=3, top_k=3, vocab_size=299, **shape).path
    tokens, far = TOKENS[:40], 100_000
    near = logits_of(run_on(device, path, [batch(tokens)])[0])
    table = [0] * (far // KV_TILE) + [1, 2]  # those before the window are never looked at
    got = logits_of(run_on(device, path, [batch(tokens, far, table=table)])[0])
    inside = slice(2 * 8, None)  # both layers' windows
    assert np.abs(got - near)[inside].max() < 1e-5 * np.abs(near).max()
    assert np.abs(got - near)[:4].max() > 1e-2 * np.abs(near).max()
