"""Experts that the processor computes beside other places, against the reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mer.compute.cpu.place import CPUPlace
from mer.compute.cpu.scratch import Limits
from mer.compute.places import Pairs
from mer.compute.reference.model import ReferenceModel
from tests._lib.resident import Experts
from tests._lib.tiny_models import Type, tiny_model


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q6_K, Type.F16])
def test_outputs_are_the_references(tmp_path: Path, kind: Type, n: int) -> None:
    shape: dict[str, Any] = {"d_model": 256, "d_ff": 256, "n_heads": 8} if kind is Type.Q6_K else {}
    path = tiny_model(tmp_path / "m.gguf", weight_type=kind, merged=False, **shape).path
    reference = ReferenceModel(path)
    limits = Limits(batch_tokens=8, outputs=8, sequences=1, sequence_blocks=1, kv_blocks=1, threads=2, planes=2)
    place = CPUPlace(reference.spec, limits, reference.experts)
    memory = Experts(reference.gguf, reference.experts, keep=True)
    rng = np.random.default_rng(n)
    place.open()
    try:
        for layer in (1, 0, 1):  # the last time as they were re-arranged
            h = rng.normal(0.2, 1, (n, reference.spec.d_model)).astype(np.float32)
            pairs = Pairs(np.stack([rng.permutation(5)[:2] for _ in range(n)]).astype(np.int32))
            unused = next(it for it in range(5) if it not in pairs.spans) if n == 1 else None
            numbers = [*reversed(list(pairs.spans)[:2]), *([] if unused is None else [unused])]
            place.start(layer, [memory.load(layer, number) for number in numbers], h, pairs)
            y = place.finish(timed=True)
            assert y is not None
            rows = pairs.of(numbers) // 2
            of = [number for number in numbers for _ in range(pairs.count(number))]
            assert len(y) == len(rows) == len(of) > 0
            for number, row, got in zip(of, rows, y, strict=True):
                (want,) = reference.expert(layer, number, h[row : row + 1].astype(np.float64))
                assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()
    finally:
        place.close()
        place.close()


def test_the_cost_is_that_of_the_weights_and_of_many_rows(tmp_path: Path) -> None:
    """Layers and experts of unequal sizes; nothing is known before the first run."""
    types = {"blk.0.ffn_down.1.weight": Type.F32}
    reference = ReferenceModel(tiny_model(tmp_path / "m.gguf", weight_type=Type.Q8_0, merged=False, types=types).path)
    limits = Limits(batch_tokens=8, outputs=8, sequences=1, sequence_blocks=1, kv_blocks=1, threads=1, planes=2)
    place = CPUPlace(reference.spec, limits, reference.experts)
    memory = Experts(reference.gguf, reference.experts, keep=True)
    small, large = (memory.load(0, number) for number in (0, 1))
    assert place.cost(0, [small, large], [1, 1]) is None
    place.open()
    try:
        place.start(0, [small], np.ones((1, reference.spec.d_model), np.float32), Pairs(np.array([[0, 3]], np.int32)))
        place.finish(timed=False)
    finally:
        place.close()
    cost = place.cost(0, [small, large, small, small, small], [1, 1, 4, 8, 400])
    assert cost is not None
    assert cost.start_s == 0
    a, b, *more = cost.expert_s
    sizes = [reference.experts.experts[0][number].n_bytes for number in (0, 1)]
    assert a > 0
    assert b / a == pytest.approx(sizes[1] / sizes[0])
    assert b > 1.5 * a
    assert more[0] == a
    assert all(x < y for x, y in itertools.pairwise(more))
