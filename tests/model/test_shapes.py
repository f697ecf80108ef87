"""Known models' shapes, of which benchmarks make files: they have the parameters that their publishers name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

BILLIONS = {
    "mixtral": 46.7,
    "qwen3": 30.5,
    "qwen3-235b": 235.1,
    "gemma4-26b": 25.2,
    "glm-4.5-air": 106.9,
    "minimax-m2": 228.7,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 116.8,
    "olmoe": 6.9,
    "llama-8b": 8.0,
    "llama-70b": 70.6,
}


@pytest.fixture(scope="module")
def shapes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("shapes")
        sys.modules.pop("shapes")


def test_every_shape_is_tested(shapes: Any) -> None:
    assert set(shapes.SHAPES) == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_has_the_parameters_of_its_model(shapes: Any, name: str) -> None:
    shape = shapes.SHAPES[name]
    total = sum(float(np.prod(tensor.shape)) for tensor in shape.tensors())
    assert total / 1e9 == pytest.approx(BILLIONS[name], abs=0.06)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_shape_can_be_made_smaller(shapes: Any, name: str) -> None:
    shape = shapes.SHAPES[name].changed(2, vocab=1000, d_ff=256)
    spec = shape.spec()
    assert (len(spec.layers), spec.vocab_size, spec.d_ff) == (2, 1000, 256 if spec.routed else 0)
