"""The router step against the reference and by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.compute.cpu.matrix import float_stride
from mer.compute.kernels.router import route, route_by_score
from mer.compute.reference.blocks.router import route as reference_route
from mer.model.operators import LEAST_SUM, Groups, Routing, Scoring
from mer.model.transformer import OVER_CHOSEN
from tests._lib.steps import F32, Areas, address, run_step

Ints = npt.NDArray[np.int32]


def routed(logits: F32, k: int, n_threads: int = 1) -> tuple[Ints, F32, Ints]:
    """Return ids [n, k], weights [n, k] and damaged [n]."""
    areas = Areas()
    n, n_experts = logits.shape
    ids, weights, damaged = areas.ints(n, k), areas.floats(n, k), areas.ints(n)
    damaged[:] = 0
    stride = 4 * (-(-n_experts // 16) * 16)
    run_step(
        route, areas.put_rows(logits), stride, n, n_experts, k, address(ids), address(weights), address(damaged),
        0, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    return ids.copy(), weights.copy(), damaged.copy()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n_threads=st.integers(1, 4))
def test_any_finite_logits(data: st.DataObject, n_threads: int) -> None:
    n_experts = data.draw(st.integers(1, 40), "n_experts")
    k = data.draw(st.integers(1, n_experts), "k")
    values = st.sampled_from([-3.0, 0.0, 0.5, 2.0, 40.0]) | st.floats(-50, 50, width=32)  # ties are likely
    logits = data.draw(hnp.arrays(np.float32, (5, n_experts), elements=values), "logits")
    ids, weights, damaged = routed(logits, k, n_threads)
    want_ids, want_weights = reference_route(logits.astype(np.float64), k, OVER_CHOSEN)
    assert np.array_equal(ids, want_ids)
    assert np.allclose(weights, want_weights, rtol=3e-7, atol=1e-45)
    assert not damaged.any()


def test_zeros_of_both_signs_are_equal_and_vectors_of_16_are_one_row() -> None:
    logits = np.full((1, 40), -1, np.float32)
    logits[0, [35, 3, 17, 16]] = [0.0, -0.0, 0.0, -0.0]
    assert routed(logits, 6)[0].tolist() == [[3, 16, 17, 35, 0, 1]]


def test_of_equal_logits_the_lower_number_comes_first() -> None:
    ids, weights, _ = routed(np.array([[1, 5, 5, 1, 5], [2, 2, 2, 2, 2]], np.float32), 4)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    assert weights[1].tolist() == [0.25] * 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_logit_that_is_not_finite_marks_its_row_alone(bad: float, place: int) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    clean = routed(logits, 3)
    logits[2, place] = bad
    ids, weights, damaged = routed(logits, 3)
    assert damaged.tolist() == [0, 0, 1, 0]
    rest = [0, 1, 3]
    assert np.array_equal(ids[rest], clean[0][rest])
    assert np.array_equal(weights[rest], clean[1][rest])
    assert ((ids >= 0) & (ids < 7)).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_logits_choose_experts_that_exist_and_differ(data: st.DataObject) -> None:
    """The rows of an expert never outnumber the tokens, even in a damaged model."""
    n_experts = data.draw(st.integers(1, 40), "n_experts")
    k = data.draw(st.integers(1, n_experts), "k")
    values = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 1.0, -3e38])
    logits = data.draw(hnp.arrays(np.float32, (4, n_experts), elements=values), "logits")
    ids, _, damaged = routed(logits, k)
    assert all(len(set(row)) == k and set(row) <= set(range(n_experts)) for row in ids.tolist())
    assert np.array_equal(damaged, ~np.isfinite(logits).all(1))


def test_damage_found_before_is_kept() -> None:
    areas = Areas()
    ids, weights, damaged = areas.ints(2, 1), areas.floats(2, 1), areas.ints(2)
    damaged[:] = [1, 0]
    logits = areas.put_rows(np.ones((2, 3), np.float32))
    run_step(route, logits, 64, 2, 3, 1, address(ids), address(weights), address(damaged), 0)
    assert damaged.tolist() == [1, 0]


def test_without_a_place_for_damage_none_is_reported() -> None:
    areas = Areas()
    ids, weights = areas.ints(1, 2), areas.floats(1, 2)
    logits = areas.put_rows(np.array([[np.nan, 1, 3]], np.float32))
    run_step(route, logits, 64, 1, 3, 2, address(ids), address(weights), 0, 0)
    areas.check()
    assert ids.tolist() == [[2, 1]]


# --- other scores than the logits -------------------------------------------------------------------


def scored(
    logits: F32,
    k: int,
    routing: Routing,
    bias: F32 | None = None,
    n_threads: int = 1,
    factors: F32 | None = None,
) -> tuple[Ints, F32, Ints]:
    """Return ids [n, k], weights [n, k] and damaged [n]; weights are multiplied by their experts' factors [E]."""
    areas = Areas()
    n, n_experts = logits.shape
    ids, weights, damaged = areas.ints(n, k), areas.floats(n, k), areas.ints(n)
    damaged[:] = 0
    groups = routing.groups
    stride = float_stride(n_experts)
    scores_stride = stride + (0 if groups is None else float_stride(groups.count))
    logit_bytes = areas.put_rows(logits)
    run_step(
        route_by_score, logit_bytes, stride, n, n_experts, k, address(ids), address(weights), address(damaged),
        address(areas.floats(n, scores_stride // 4)), scores_stride,
        0 if bias is None else areas.put(bias), int(routing.scoring is Scoring.SIGMOID),
        0 if groups is None else groups.count << 32 | groups.used,
        areas.put(np.array([LEAST_SUM], np.float32)) if routing.normalize else 0,
        areas.put(np.array([routing.scale], np.float32)), 0 if factors is None else areas.put(factors),
        n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    return ids.copy(), weights.copy(), damaged.copy()


@settings(max_examples=100, deadline=None)
@given(data=st.data(), n_threads=st.integers(1, 4))
def test_any_scores(data: st.DataObject, n_threads: int) -> None:
    per_group, count = data.draw(st.integers(2, 7), "per group"), data.draw(st.integers(1, 9), "groups")
    n_experts = per_group * count
    k = data.draw(st.integers(1, n_experts), "k")
    used = data.draw(st.integers(-(-k // per_group), count), "used")
    routing = Routing(
        scoring=data.draw(st.sampled_from([Scoring.SOFTMAX, Scoring.SIGMOID]), "scoring"),
        groups=Groups(count=count, used=used) if data.draw(st.booleans(), "in groups") else None,
        normalize=data.draw(st.booleans(), "normalize"),
        scale=data.draw(st.sampled_from([1.0, 2.5]), "scale"),
    )
    values = st.sampled_from([-3.0, 0.0, 0.5, 2.0, -40.0]) | st.floats(-20, 20, width=32)  # ties are likely
    logits = data.draw(hnp.arrays(np.float32, (5, n_experts), elements=values), "logits")
    biases = hnp.arrays(np.float32, n_experts, elements=st.sampled_from([-0.5, 0.0, 0.25, 8.0]))
    bias = data.draw(st.none() | biases, "bias")
    factors = data.draw(st.none() | biases, "factors")
    ids, weights, damaged = scored(logits, k, routing, bias, n_threads, factors)
    want_ids, want_weights = reference_route(logits.astype(np.float64), k, routing, bias)
    if factors is not None:
        want_weights = want_weights * factors[want_ids]
    assert np.array_equal(ids, want_ids)
    assert np.allclose(weights, want_weights, rtol=3e-7, atol=1e-45)
    assert not damaged.any()


@pytest.mark.parametrize("groups", [None, Groups(count=3, used=2)])
@pytest.mark.parametrize("scoring", [Scoring.SOFTMAX, Scoring.SIGMOID])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4, 8])
def test_what_is_not_finite_marks_its_row_alone(
    bad: float, place: int, scoring: Scoring, groups: Groups | None
) -> None:
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(4, 9)).astype(np.float32), rng.normal(size=9).astype(np.float32)
    routing = Routing(scoring=scoring, groups=groups, normalize=True, scale=1.5)
    clean = scored(logits, 4, routing, bias)
    assert clean[2].tolist() == [0, 0, 0, 0]
    logits[2, place] = bad
    ids, weights, damaged = scored(logits, 4, routing, bias)
    assert damaged.tolist() == [0, 0, 1, 0]
    rest = [0, 1, 3]
    assert np.array_equal(ids[rest], clean[0][rest])
    assert np.array_equal(weights[rest], clean[1][rest])
    assert len(set(ids[2].tolist())) == 4
    assert set(ids[2].tolist()) <= set(range(9))


def test_a_bias_that_is_not_a_number_marks_every_row_and_wins_none() -> None:
    bias = np.array([0, np.nan, 0.5, 0, 0], np.float32)
    ids, _, damaged = scored(np.zeros((2, 5), np.float32), 4, Routing(scoring=Scoring.SIGMOID), bias)
    assert damaged.tolist() == [1, 1]
    assert ids.tolist() == [[2, 0, 3, 4]] * 2


def test_sigmoids_that_round_to_one_are_told_apart_by_their_logits() -> None:
    ids, weights, _ = scored(np.array([[30, 40, 20, 50, -5]], np.float32), 3, Routing(scoring=Scoring.SIGMOID))
    assert ids.tolist() == [[3, 1, 0]]
    assert weights.tolist() == [[1, 1, 1]]


def test_sums_below_the_least_one_are_not_scaled_up_to_one() -> None:
    routing = Routing(scoring=Scoring.SIGMOID, normalize=True)
    _, weights, _ = scored(np.array([[-12, -13, -14], [-5, -6, -7]], np.float32), 2, routing)
    assert weights[0] == pytest.approx([2**14 / (1 + np.exp(12)), 2**14 / (1 + np.exp(13))])
    assert weights[1].sum() == pytest.approx(1)
