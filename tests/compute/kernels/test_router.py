"""The router step against the reference and by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.compute.kernels.router import route
from mer.compute.reference.blocks.router import route as reference_route
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
    want_ids, want_weights = reference_route(logits.astype(np.float64), k, normalize=True)
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
