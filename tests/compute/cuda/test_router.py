"""The choice of experts in torch, against the reference; logits are given instead of computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mer.compute.cuda.blocks.router import RouterBlock
from mer.compute.cuda.blocks.tools import Tools
from mer.compute.reference.blocks.router import route
from mer.model.operators import (
    Experts,
    Groups,
    Linear,
    Norm,
    Router,
    Routing,
    Scoring,
    Tensor,
    gated_experts,
    vector,
)

F32 = npt.NDArray[np.float32]
E, K = 15, 4
ROUTINGS = [
    Routing(scoring=Scoring.CHOSEN),
    Routing(scoring=Scoring.SOFTMAX, scale=2.5),
    Routing(scoring=Scoring.SOFTMAX, normalize=True),
    Routing(scoring=Scoring.SIGMOID, normalize=True, scale=0.5),
    Routing(scoring=Scoring.SIGMOID, groups=Groups(count=5, used=2)),
    Routing(scoring=Scoring.SOFTMAX, groups=Groups(count=3, used=2), normalize=True),
]


def block(routing: Routing, logits: F32, bias: F32 | None) -> RouterBlock:
    """Return a router that finds these logits, whatever it is given."""
    tensor = None if bias is None else vector("bias", E)
    router = Router(Linear(Tensor("router", (E, 8))), K, routing, tensor)
    weights: Any = SimpleNamespace(vector=lambda name: torch.from_numpy({"bias": bias}[name]))
    tools: Any = SimpleNamespace(weights=weights, linear=lambda linear, h, exact: torch.from_numpy(logits))
    return RouterBlock(Experts(router, gated_experts(0, E, 8, 8)), Norm(vector("norm", 8), 1e-6), cast(Tools, tools))


@pytest.mark.parametrize(
    ("routing", "biased"),
    [(it, biased) for it in ROUTINGS for biased in (False, True) if not biased or it.scoring is not Scoring.CHOSEN],
)
def test_choice_and_weights_are_the_references(routing: Routing, biased: bool) -> None:
    rng = np.random.default_rng(3)
    logits = rng.choice([-9, -1, 0, 0.5, 2, 3], (60, E)).astype(np.float32)  # ties in nearly every row
    logits[::2] += rng.normal(size=(30, E)).astype(np.float32)
    bias = rng.choice([-0.5, 0, 0.25, 1], E).astype(np.float32) if biased else None
    it = block(routing, logits, bias)
    ids, seen = it.choose(torch.zeros(60, 8), torch.zeros(60, 8))
    want_ids, want = route(logits.astype(np.float64), K, routing, bias)
    assert np.array_equal(ids.numpy(), want_ids)
    assert it.weights(ids, seen).numpy() == pytest.approx(want, rel=1e-5)
    assert not it.damaged(seen).any()


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_marks_its_row_alone(routing: Routing, bad: float) -> None:
    logits = np.random.default_rng(1).normal(size=(5, E)).astype(np.float32)
    logits[3, 7] = bad
    it = block(routing, logits, None)
    ids, seen = it.choose(torch.zeros(5, 8), torch.zeros(5, 8))
    assert it.damaged(seen).tolist() == [False, False, False, True, False]
    assert all(len(set(row)) == K for row in ids.tolist())
    want_ids, want = route(np.delete(logits, 3, 0).astype(np.float64), K, routing)
    rest = [0, 1, 2, 4]
    assert np.array_equal(ids.numpy()[rest], want_ids)
    assert it.weights(ids, seen).numpy()[rest] == pytest.approx(want, rel=1e-5)


def test_a_bias_that_is_not_a_number_marks_every_row() -> None:
    bias = np.zeros(E, np.float32)
    bias[2] = np.nan
    it = block(Routing(scoring=Scoring.SIGMOID), np.zeros((2, E), np.float32), bias)
    assert it.damaged(torch.zeros(2, E)).all()


def test_a_softmax_over_the_chosen_takes_neither_bias_nor_groups() -> None:
    with pytest.raises(ValueError, match="groups"):
        Routing(scoring=Scoring.CHOSEN, groups=Groups(count=3, used=1))
    with pytest.raises(ValueError, match="sums to one"):
        Routing(scoring=Scoring.CHOSEN, normalize=True)
    with pytest.raises(ValueError, match="bias"):
        Router(Linear(Tensor("router", (E, 8))), K, Routing(scoring=Scoring.CHOSEN), vector("bias", E))
