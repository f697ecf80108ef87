"""Steps on rows of float32 against float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from mer.compute.kernels.activation import NUMBERS
from mer.compute.kernels.elementwise import activate, combine, fill_entries, gather, rms_norm
from mer.compute.kernels.entry import EXPERT_BIT, PAIR, ROW
from mer.compute.kernels.ir import V16F32, load, load_i64, store
from mer.compute.kernels.numba_api import intrinsic
from mer.compute.kernels.step import step
from mer.compute.kernels.vector import exp_of_negative, exp_vector
from mer.compute.kernels.words import Words, columns
from mer.compute.reference.blocks.feed_forward import activated, silu
from mer.compute.reference.blocks.norm import rms_norm as reference_norm
from mer.model.operators import GEGLU, SWIGLU, Activation
from tests._lib.steps import F32, Areas, address, run_step


def _in_place(emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic that replaces 16 floats at an address by what `emit` makes of them."""

    @intrinsic
    def replace(_ctx: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
            store(b, emit(b, load(b, args[0], 0, V16F32, 4)), args[0], 0, 4)
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return replace


_exp16, _negative_exp16 = _in_place(exp_vector), _in_place(exp_of_negative)


class VectorWords(Words):
    """x (float32), n (a multiple of 16)."""

    x: int
    n: int


VECTOR = columns(VectorWords)


@step(VectorWords)
def exponential(row: int, _thread: int, _n_threads: int) -> None:
    """Write x = e**x."""
    for start in range(load_i64(row, VECTOR.n) // 16):
        _exp16(load_i64(row, VECTOR.x) + 64 * start)


@step(VectorWords)
def negative_exponential(row: int, _thread: int, _n_threads: int) -> None:
    """Write x = e**x for x of at most 0."""
    for start in range(load_i64(row, VECTOR.n) // 16):
        _negative_exp16(load_i64(row, VECTOR.x) + 64 * start)


def exponentials(x: F32) -> F32:
    areas = Areas()
    area = areas.floats(-(-len(x) // 16) * 16)
    area[:] = 0
    area[: len(x)] = x
    run_step(exponential, address(area), len(area))
    areas.check()
    return area[: len(x)].copy()


def test_exponentials_of_negative_numbers() -> None:
    x = np.concatenate([np.linspace(-87.3, 0, 30_000), -np.geomspace(1e-30, 87.2, 2_000)]).astype(np.float32)
    special = np.array([0, -0.0, np.nan, -np.inf, -3e38, np.nextafter(np.float32(-87.3), np.float32(-np.inf))])
    areas = Areas()
    area = areas.floats(-(-(len(x) + len(special)) // 16) * 16)
    area[:] = 0
    area[: len(x)], area[len(x) : len(x) + len(special)] = x, special
    run_step(negative_exponential, address(area), len(area))
    areas.check()
    want = np.exp(x.astype(np.float64))
    assert (np.abs(area[: len(x)] - want) <= 1.5 * np.spacing(want.astype(np.float32))).all()
    assert np.array_equal(area[len(x) : len(x) + len(special)], [1, 1, np.nan, 0, 0, 0], equal_nan=True)


def normalized(
    x: F32,
    weight: F32,
    eps: float,
    *,
    index: list[int] | None = None,
    pad: float = np.nan,
    n_threads: int = 1,
) -> F32:
    areas = Areas()
    n, d = len(x) if index is None else len(index), x.shape[1]
    stride = -(-d // 16) * 16
    out = areas.floats(n, stride)
    run_step(
        rms_norm, areas.put_rows(x, pad), 4 * stride, 0 if index is None else areas.put(np.array(index, np.int32)), n,
        d, areas.put_rows(weight[None], 0), areas.put(np.array([eps], np.float32)), address(out), 4 * stride,
        n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    return out[:, :d].copy()


# --- RMSNorm ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 200), n=st.integers(1, 9), seed=st.integers(0, 2**32), n_threads=st.integers(1, 4),
    scale=st.sampled_from([1e-12, 1.0, 1e12]), eps=st.sampled_from([1e-6, 1e-5, 0.5]),
)  # fmt: skip
def test_rms_norm(d: int, n: int, seed: int, n_threads: int, scale: float, eps: float) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * scale).astype(np.float32)
    weight = rng.normal(size=d).astype(np.float32)
    want = reference_norm(x.astype(np.float64), weight, float(np.float32(eps)))
    got = normalized(x, weight, eps, n_threads=n_threads)
    assert np.allclose(got, want, rtol=(d / 16 + 16) * 2.0**-24, atol=1e-40)
    index = [int(row) for row in rng.integers(0, n, 5)]
    assert np.array_equal(normalized(x, weight, eps, index=index, n_threads=n_threads), got[index])


def test_rms_norm_of_zeros_without_eps_is_nan_in_that_row_alone() -> None:
    x = np.ones((3, 24), np.float32)
    x[1] = 0
    got = normalized(x, np.ones(24, np.float32), 0.0)
    assert np.isnan(got).all(1).tolist() == [False, True, False]
    assert (got[[0, 2]] == 1).all()


def test_what_pads_a_row_has_no_effect() -> None:
    x = np.random.default_rng(4).normal(size=(2, 21)).astype(np.float32)
    weight = np.ones(21, np.float32)
    assert np.array_equal(normalized(x, weight, 1e-5, pad=np.nan), normalized(x, weight, 1e-5, pad=0.0))


# --- exponential and SwiGLU -------------------------------------------------------------------------


def ulps(got: F32, want: np.ndarray) -> float:
    """Return the largest error in units of the last place of the float32 result."""
    return float((np.abs(got - want) / np.spacing(want.astype(np.float32))).max())


def test_exponential_over_its_whole_range() -> None:
    x = np.linspace(-87.3, 88.3, 400_001).astype(np.float32)
    assert ulps(exponentials(x), np.exp(x.astype(np.float64))) <= 1.5
    near = np.concatenate([np.geomspace(1e-30, 1, 10_000), -np.geomspace(1e-30, 1, 10_000), [0.0, -0.0]])
    near = near.astype(np.float32)
    assert ulps(exponentials(near), np.exp(near.astype(np.float64))) <= 1.5
    assert exponentials(np.zeros(1, np.float32))[0] == 1


def test_exponential_beyond_its_range() -> None:
    x = np.array([-np.inf, -1e30, -20_000, -200, -88, np.nan, 89, 200, np.inf], np.float32)
    got = exponentials(x)
    assert got[:3].tolist() == [0, 0, 0]
    assert (got[3:5] > 0).all()
    assert (got[3:5] < 1.3e-38).all()
    assert np.isnan(got[5])
    assert (got[6:] > 2e38).all()
    assert np.isfinite(got[6:]).all()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_swiglu(n_threads: int) -> None:
    gate = np.concatenate([np.linspace(-87, 87, 20_000), np.geomspace(1e-30, 1, 1000), -np.geomspace(1e-30, 1, 1000)])
    gate = np.append(gate, [0.0, -200.0, 1e30, np.nan]).astype(np.float32)
    gate = np.append(gate, np.zeros(-len(gate) % 16, np.float32))
    up = np.random.default_rng(1).normal(size=len(gate)).astype(np.float32)
    areas = Areas()
    result = areas.floats(len(gate) // 16, 16)
    result[:] = gate.reshape(-1, 16)
    entries = areas.put_entries([(5, 0, 0), (9, 100, 0), (len(result) - 300, 300, 0)])
    run_step(activate, entries, 3, address(result), areas.put(up), 64, 0, n_threads=n_threads)
    areas.check()
    untouched = np.ones(len(result), bool)
    for rows in (slice(5), slice(100, 109), slice(300, None)):
        untouched[rows] = False
    assert np.array_equal(result[untouched].ravel(), gate.reshape(-1, 16)[untouched].ravel())
    run_step(activate, areas.put_entries([(95, 5, 0), (191, 109, 0)]), 2, address(result), areas.put(up), 64, 0)
    result = result.reshape(-1)
    want = silu(gate.astype(np.float64)) * up
    precise = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up  # silu loses digits far below 0
    ordinary = np.isfinite(gate) & (gate > -87.2)
    assert np.allclose(result[ordinary], precise[ordinary], rtol=5 * 2.0**-23, atol=1e-44)
    assert np.allclose(result[~np.isnan(gate)], want[~np.isnan(gate)], rtol=1e-5, atol=1e-12)
    assert np.array_equal(np.isnan(result), np.isnan(gate))


ACTIVATIONS = {
    "swiglu": SWIGLU,
    "geglu": GEGLU,
    "clamped": Activation(limit=1.5),
    "every number": Activation(alpha=1.702, beta=0.03, limit=7.0, shift=1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_their_numbers(name: str) -> None:
    record = ACTIVATIONS[name]
    rng = np.random.default_rng(7)
    gate, up = (rng.normal(size=(2, 6, 64)) * 6).astype(np.float32)
    gate[0, :5], up[0, 3:8] = [np.nan, 1e30, -1e30, 90, -90], [1, 1e30, -1e30, np.nan, 90]
    areas = Areas()
    result = areas.floats(6, 64)
    result[:] = gate
    numbers = areas.put(np.array([getattr(record, name) for name in NUMBERS], np.float32))
    run_step(activate, areas.put_entries([(6, 0, 0)]), 1, address(result), areas.put(up), 256, numbers, n_threads=2)
    areas.check()
    with np.errstate(over="ignore", invalid="ignore"):
        want = activated(record, gate.astype(np.float64), up.astype(np.float64))
        near = np.abs(result - want) <= 1e-6 * np.abs(want) + 1e-6
    assert np.array_equal(np.isnan(result), np.isnan(gate) | np.isnan(up))
    # 1e-30 of a number of 1e30 is what the smallest power leaves of it
    assert near[~np.isnan(result) & (np.abs(want) < 1e20)].all()


# --- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 3])
def test_gather(n_threads: int) -> None:
    x = np.random.default_rng(2).normal(size=(6, 48)).astype(np.float32)
    index = np.array([5, 0, 0, 3, 1, 2], np.int32)
    areas = Areas()
    out = areas.floats(7, 48)
    entries = areas.put_entries([(2, 4, 1), (0, 0, 0), (3, 0, 3)])
    run_step(gather, entries, 3, areas.put(x), 192, areas.put(index), address(out), n_threads=n_threads)
    areas.check()
    assert np.array_equal(out[[4, 5]], x[[0, 0]])
    assert np.array_equal(out[:3], x[[3, 1, 2]])
    assert np.isnan(out[[3, 6]]).all()


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("word", [ROW, PAIR])
def test_biases_go_to_the_rows_of_their_experts(word: int, n_threads: int) -> None:
    biases = np.random.default_rng(3).normal(size=(7, 21)).astype(np.float32)
    areas = Areas()
    out = areas.floats(9, 32)
    entries = [(2, 4, 1, 5), (0, 0, 0, 1), (3, 0, 3, 2)]  # rows, first row, first pair, expert
    words = [(0, 0, 0, n, row, pair, 3 | expert << EXPERT_BIT, 0) for n, row, pair, expert in entries]
    table = areas.put(np.array(words, np.int64))
    run_step(fill_entries, table, 3, address(out), 128, word, areas.put(biases), 84, n_threads=n_threads)
    areas.check()
    want = np.full((9, 32), np.nan, np.float32)
    for n, row, pair, expert in entries:
        first = row if word == ROW else pair
        want[first : first + n, :21] = biases[expert]
    assert np.array_equal(out, want, equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 6), k=st.integers(1, 5), vectors=st.integers(1, 5), n_threads=st.integers(1, 4))
def test_combine_adds_in_router_order(n: int, k: int, vectors: int, n_threads: int) -> None:
    rng = np.random.default_rng([n, k, vectors])
    x, y = rng.normal(size=(n, 16 * vectors)), rng.normal(size=(n * k, 16 * vectors)) * 1e3
    weights, places = rng.random((n, k)).astype(np.float32), rng.permutation(n * k).astype(np.int32).reshape(n, k)
    areas = Areas()
    result = areas.floats(n, 16 * vectors)
    result[:] = x
    want = result.copy()
    for j in range(k):  # each step rounded once, as a fused multiply-add does
        product = weights[:, j, None].astype(np.float64) * y[places[:, j]].astype(np.float32)
        want = (want + product).astype(np.float32)
    run_step(
        combine, address(result), 64 * vectors, n, 16 * vectors, areas.put(y.astype(np.float32)), areas.put(weights),
        areas.put(places), k, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    assert np.array_equal(result, want)
