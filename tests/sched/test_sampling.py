"""Sampling against a plain oracle: the filters by enumeration, in exact order, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mer.config import Sampling
from mer.errors import RequestError
from mer.sched import sampling as sampling_module
from mer.sched.sampling import Sampler

finite = st.floats(-1e4, 1e4, width=32)
temperatures = st.floats(0.05, 20)


def distribution(logits: Sequence[float], sampling: Sampling, banned: set[int]) -> dict[int, float]:
    """Return the probability of every token that may be drawn, most likely first, by the definitions of the filters."""
    order = sorted((t for t in range(len(logits)) if t not in banned), key=lambda t: (-logits[t], t))
    if sampling.top_k:
        order = order[: sampling.top_k]
    weight = {t: math.exp((logits[t] - logits[order[0]]) / sampling.temperature) for t in order}
    total = math.fsum(weight.values())
    p = {t: w / total for t, w in weight.items()}
    kept: list[int] = []
    for t in order:
        if kept and math.fsum(p[k] for k in kept) >= sampling.top_p:
            break
        kept.append(t)
    kept = [t for t in kept if p[t] >= sampling.min_p * p[order[0]] and p[t] > 0]
    total = math.fsum(p[t] for t in kept)
    return {t: p[t] / total for t in kept}


@pytest.mark.slow
@given(
    st.lists(finite, min_size=2, max_size=8),
    temperatures,
    st.integers(0, 9),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]) | st.floats(0, 1),
    st.sets(st.integers(0, 1), max_size=1),
    st.integers(0, 2**40),
)
@pytest.mark.parametrize("head", [1, 3, None])
def test_every_draw_is_the_inverse_of_the_distribution_function(
    head: int | None,
    values: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    banned: set[int],
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if head is not None:  # few tokens are treated as many
            patch.setattr(sampling_module, "_FEW", 1)
            patch.setattr(sampling_module, "_HEAD", head)
        check_draws(values, temperature, top_k, top_p, min_p, banned, seed)


def check_draws(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float, banned: set[int], seed: int
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    logits = np.array(values, np.float32)
    want = distribution(logits.tolist(), sampling, banned)
    cumulative = np.cumsum(list(want.values()))
    # what rounding may decide either way is not what this test is about: the weights are float32
    full = distribution(logits.tolist(), Sampling(temperature=temperature, top_k=top_k), banned)
    assume(all(abs(c - top_p) > 1e-5 for c in np.cumsum(list(full.values()))) or top_p in (0, 1))
    assume(all(abs(p - min_p * max(full.values())) > 1e-5 * p for p in full.values()) or min_p in (0, 1))
    sampler = Sampler(sampling, banned)
    uniforms = np.random.Generator(np.random.PCG64(seed)).random(20)  # one for each token, and no more
    for u in uniforms:
        drawn = sampler.draw(logits)
        assert drawn in want
        if np.abs(cumulative - u).min() > 1e-5:
            assert drawn == list(want)[int((cumulative < u).sum())]
    assert logits.tolist() == np.array(values, np.float32).tolist(), "the caller's logits are not touched"


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, seed=5),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=3.0, top_p=0.99, seed=5),
        Sampling(temperature=1.5, min_p=0.02, seed=5),
    ],
)
def test_a_large_vocabulary_gives_the_draws_of_all_of_it_sorted(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    rng = np.random.default_rng(1)
    rows = np.round(rng.normal(scale=3, size=(20, 30_001)), 1).astype(np.float32)  # with many that are equal
    drawn = [Sampler(sampling).draw(row) for row in rows]
    monkeypatch.setattr(sampling_module, "_FEW", 1 << 20)
    assert drawn == [Sampler(sampling).draw(row) for row in rows]


@pytest.mark.slow
def test_frequencies_are_the_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02, seed=3)
    logits = np.array([1.0, 0.5, 2.0, -1.0, 0.0, 1.5, -3.0], np.float32)
    want = distribution(logits.tolist(), sampling, {5})
    sampler = Sampler(sampling, {5})
    n = 20_000
    drawn = np.bincount([sampler.draw(logits) for _ in range(n)], minlength=7) / n
    for token in range(7):
        p = want.get(token, 0.0)
        assert abs(drawn[token] - p) <= 5 * math.sqrt(p * (1 - p) / n)


@given(st.lists(finite, min_size=1, max_size=9), st.sets(st.integers(1, 8)))
def test_greedy_takes_the_largest_and_of_equals_the_first(values: list[float], banned: set[int]) -> None:
    logits = np.array(values, np.float32)
    banned = {t for t in banned if t < len(values)}
    want = max((t for t in range(len(values)) if t not in banned), key=lambda t: (logits[t], -t))
    assert Sampler(Sampling(), banned).draw(logits) == want
    assert Sampler(Sampling(temperature=1, top_k=1), banned).draw(logits) == want
    assert Sampler(Sampling(temperature=1, top_p=0), banned).draw(logits) == want


@given(st.integers(0, 2**70), st.floats(0.1, 3))
def test_a_seed_gives_the_same_draws_again(seed: int, temperature: float) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(10, 50)).astype(np.float32)
    sampling = Sampling(temperature=temperature, seed=seed)
    one, two = Sampler(sampling), Sampler(sampling)
    assert one.seed == two.seed == seed
    assert [one.draw(row) for row in rows] == [two.draw(row) for row in rows]


def test_a_seed_that_was_drawn_is_told_and_repeats_the_draws() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    first = Sampler(Sampling(temperature=1.0))
    tokens = [first.draw(row) for row in rows]
    again = Sampler(Sampling(temperature=1.0, seed=first.seed))
    assert [again.draw(row) for row in rows] == tokens
    assert Sampler(Sampling(temperature=1.0)).seed != first.seed


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e30, 1e308, 1.7e308])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e38])
def test_no_temperature_overflows(temperature: float, scale: float) -> None:
    logits = np.array([-3, 1, 2, 3, 3, -1], np.float32) * np.float32(scale)
    sampler = Sampler(Sampling(temperature=temperature, seed=1), {5})
    drawn = {sampler.draw(logits) for _ in range(200)}
    if temperature < 1e-20 and scale == 1.0:
        assert drawn == {3, 4}
    elif temperature > 1e20 and scale == 1.0:
        assert drawn == {0, 1, 2, 3, 4}
    assert 5 not in drawn


def test_a_banned_token_is_not_drawn_whatever_number_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=0), {0, 2})
    largest = np.nextafter(1.0, 0.0)
    monkeypatch.setattr(sampler, "_rng", type("Largest", (), {"random": staticmethod(lambda: largest)}))
    for n in range(3, 300):
        assert sampler.draw(np.linspace(0, 3, n, dtype=np.float32)) not in (0, 2)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, -math.inf, 10**400, "1", None]),
        ("top_p", [-0.1, 1.1, math.nan, math.inf, "1", None]),
        ("min_p", [-0.1, 1.1, math.nan, "1", None]),
        ("top_k", [-1, 1.0, True, "1", None]),
        ("seed", [-1, 1.5, False, "1"]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(field: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=field):
            Sampling(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, top_k=2)]
)
def test_a_vocabulary_that_is_banned_as_a_whole_is_an_error_and_no_token(sampling: Sampling) -> None:
    with pytest.raises(RequestError, match="all 3 tokens"):
        Sampler(sampling, {0, 1, 2}).draw(np.zeros(3, np.float32))
