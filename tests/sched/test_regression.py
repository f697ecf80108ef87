"""Weights against least squares within bounds, found by trying which of them are at a bound."""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.predictors.regression import OnlineRegression

Matrix = npt.NDArray[np.float64]


def within_bounds(features: Matrix, truth: Matrix) -> Matrix:
    """Return the weights from 0 to 1 of least squared error; features are [F, N]."""
    best, least = np.zeros(len(features)), float(truth @ truth)
    for state in product((0.0, 1.0, None), repeat=len(features)):
        weights = np.array([0.0 if value is None else value for value in state])
        free = [i for i, value in enumerate(state) if value is None]
        if free:
            rest = truth - weights @ features
            weights[free] = np.linalg.lstsq(features[free].T, rest, rcond=None)[0]
        if (weights < -1e-9).any() or (weights > 1 + 1e-9).any():
            continue
        error = float(((truth - weights @ features) ** 2).sum())
        if error < least:
            best, least = weights, error
    return best


def decayed(samples: list[npt.NDArray[np.float32]]) -> Matrix:
    """Return samples side by side, so scaled that squares of one count 0.998 times as much as those of the next."""
    parts = [sample * 0.998 ** ((len(samples) - 1 - at) / 2) for at, sample in enumerate(samples)]
    return np.concatenate(parts, axis=1, dtype=np.float64)


def drawn_samples(seed: int, mix: Matrix, weights: Matrix, n: int) -> list[npt.NDArray[np.float32]]:
    """Return samples of correlated features and of a noisy sum of them."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        features = mix @ rng.normal(size=(len(weights), 6))
        truth = weights @ features + 0.5 * rng.normal(size=6)
        samples.append(np.concatenate((features, truth[None])).astype(np.float32))
    return samples


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.lists(st.sampled_from([-1.0, -0.2, 0.0, 0.3, 0.6, 1.0, 2.0]), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=25)
def test_weights_have_the_least_squared_error_within_bounds(seed: int, weights: list[float]) -> None:
    n = len(weights)
    mix = np.eye(n) + np.random.default_rng(seed).uniform(-0.3, 0.3, size=(n, n))
    samples = drawn_samples(seed, mix, np.array(weights), 240)
    regression = OnlineRegression(n)
    for n_missing in range(1, n):
        regression.weights(n_missing)
    for sample in samples:
        regression.learn(sample)
    everything = decayed(samples)
    assert regression.n == pytest.approx(6 * sum(0.998**age for age in range(240)))
    assert regression.moments == pytest.approx(everything @ everything.T, rel=1e-4, abs=0.01)
    for n_missing in range(n):
        used = everything[: n - n_missing]
        expected = within_bounds(used, everything[-1])
        if not n_missing:
            assert regression.least == pytest.approx(expected, abs=2e-3)
        variance = (everything[-1] ** 2).sum() / regression.n
        evidence = expected**2 * (used**2).sum(axis=1)
        drawn = expected * evidence / (evidence + 4 * variance)
        assert regression.weights(n_missing) == pytest.approx(drawn, abs=4e-3)


def test_a_weight_of_twice_its_standard_error_counts_half() -> None:
    """Squared, the error of a single weight is the truth's mean square by the sum of the feature's squares."""
    weight, square, n = 0.2, 50.0, 30.0
    for errors in (0.5, 1.0, 2.0, 4.0):
        mean_square = weight**2 * square / errors**2
        moments = np.array([[square, weight * square], [weight * square, mean_square * n]])
        regression = OnlineRegression(1)
        regression.resume([weight], moments, n)
        assert regression.weights() == pytest.approx([weight * errors**2 / (errors**2 + 4)])
    assert regression.least == [weight]


def test_what_follows_a_resumption_is_what_would_have_followed() -> None:
    samples = drawn_samples(1, np.eye(3) + 0.3, np.array([0.5, 0.0, 0.7]), 96)
    regression, other = OnlineRegression(3), OnlineRegression(3)
    for sample in samples[:48]:
        regression.learn(sample)
    moments = regression.moments.copy()
    other.resume(regression.least, moments, regression.n)
    assert other.weights() == pytest.approx(regression.weights())
    for sample in samples[48:]:
        regression.learn(sample)
        other.learn(sample)
    assert other.least == regression.least
    assert (other.weights() == regression.weights()).all()
    assert other.weights(1) == pytest.approx(regression.weights(1))
    assert not (moments == other.moments).any(), "the moments of another are copied"
    least = regression.least
    before = least.copy()
    for sample in samples[:8]:
        regression.learn(sample)
    assert regression.least != least == before, "what was read does not change"


def test_old_samples_are_forgotten() -> None:
    regression = OnlineRegression(1)
    right = np.array([[1.0, -1.0], [1.0, -1.0]], dtype=np.float32)
    wrong = np.array([[1.0, -1.0], [-1.0, 1.0]], dtype=np.float32)
    for _ in range(1000):
        regression.learn(right)
    assert regression.weights()[0] > 0.9
    for _ in range(400):
        regression.learn(wrong)
    assert regression.weights()[0] == 0.0


def test_before_anything_is_known_nothing_counts() -> None:
    regression = OnlineRegression(4)
    for n_missing in range(4):
        assert regression.weights(n_missing).tolist() == [0.0] * (4 - n_missing)
