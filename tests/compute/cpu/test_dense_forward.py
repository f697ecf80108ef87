"""The dense part of a model beside places with the CPU worker's kernels: that worker's logits, to the bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from mer.compute.cpu.dense_forward import DenseForward
from mer.compute.cpu.forward import Forward
from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.scratch import Limits
from mer.compute.cpu.weights import DenseWeights
from mer.compute.division import Division, Shares
from mer.compute.messages import LoadedExpert
from mer.compute.places import Pairs
from mer.io.gguf import read_gguf
from mer.io.thread_reader import ThreadReader
from mer.model.loading import check_model
from tests._lib.resident import Experts, batch, joined, run
from tests._lib.tiny_models import Type, tiny_model

TOKENS = [int(token) for token in np.random.default_rng(7).integers(3, 299, 60)]
BATCHES = [
    batch(TOKENS[:1], table=(5, 2)),
    batch(TOKENS[1:40], 1, table=(5, 2)),
    joined([batch(TOKENS[40:41], 40, table=(5, 2)), batch(TOKENS[50:53], table=(0, 3))]),
    batch(TOKENS[41:42], 41, table=(5, 2)),
]
LIMITS = Limits(batch_tokens=40, outputs=40, sequences=2, sequence_blocks=2, kv_blocks=8, threads=2)
SHAPES: list[dict[str, Any]] = [
    {"weight_type": Type.Q4_0, "d_model": 88, "head_dim": 16},  # rows have padding
    {"weight_type": Type.Q8_0, "arch": "qwen3moe"},
    {"weight_type": Type.F32, "d_ff": 90},
]


def through_places(path: Path, n_places: int) -> list[np.ndarray]:
    """Return the logits of the batches, the experts of each layer dealt to the places, from another one on each time.

    The first place works in the memory of the dense part, the others in their own, with their own copies of experts.
    """
    gguf = read_gguf(path)
    model = check_model(gguf)
    weights = DenseWeights(model.dense, model.spec.norm_factors())

    async def load() -> None:
        with ThreadReader(gguf.paths) as reader:
            await weights.load(reader, lambda _loaded, _total: None)

    trio.run(load)
    forward = Forward(model.spec, LIMITS, weights, model.experts)
    here = CPUPlace(model.spec, LIMITS, model.experts, forward)
    places = [here, *(CPUPlace(model.spec, LIMITS, model.experts) for _ in range(n_places - 1))]
    memories = [Experts(gguf, model.experts, keep=True) for _ in places]
    dense, division, results, turn = DenseForward(model.spec, forward, here), Division(places), [], 0
    with contextlib.ExitStack() as stack:
        for place in places:
            place.open()
            stack.callback(place.close)
        for it in BATCHES:
            dense.begin(it)
            for layer in range(model.spec.n_routed):
                dense.advance(layer)
                pairs = Pairs(dense.routed().expert_ids)
                dealt: list[list[LoadedExpert]] = [[] for _ in places]
                for expert in pairs.spans:
                    turn += 1
                    dealt[turn % n_places].append(memories[turn % n_places].load(layer, expert))
                division.compute(Shares(layer, tuple(map(tuple, dealt))), dense.h, pairs, dense.take)
                dense.combine(layer)
            dense.advance(model.spec.n_routed)
            results.append(dense.results()[0])
    return results


@pytest.mark.parametrize("n_places", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_logits_are_the_workers_wherever_experts_are_computed(
    shape: dict[str, Any], n_places: int, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"n_layers": 3, "n_experts": 7, "top_k": 3, "vocab_size": 299, "seed": 6}
    path = tiny_model(tmp_path / "m.gguf", **shape, **more).path
    want = run(path, BATCHES, threads=2, batch_tokens=LIMITS.batch_tokens)
    for done, got in zip(want, through_places(path, n_places), strict=True):
        assert done.logits is not None
        assert np.array_equal(got, done.logits)
