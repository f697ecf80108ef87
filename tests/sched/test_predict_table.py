"""The table of successors and the weighing of features, against plain Python."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.predictors.regression import OnlineRegression
from mer.sched.predictors.successors import MAX_VISITS, WINDOW, SuccessorTable

N_FIRST, N_SECOND, E = 6, 12, 5
EVENTS = st.lists(
    st.tuples(
        st.sets(st.integers(0, N_FIRST - 1), min_size=1, max_size=3),
        st.sets(st.integers(N_FIRST, N_FIRST + N_SECOND - 1), max_size=3),
        st.sets(st.integers(0, E - 1), max_size=E),
    ),
    max_size=40,
)


def table(first_bytes: int = 1 << 20, second_bytes: int = 1 << 20) -> SuccessorTable:
    return SuccessorTable(E, (N_FIRST, N_SECOND), (first_bytes, second_bytes))


def numbers(*groups: set[int]) -> np.ndarray:
    return np.array([number for group in groups for number in sorted(group)], dtype=np.int64)


def successors(experts: set[int]) -> np.ndarray:
    row = np.zeros(E + 1, dtype=np.uint16)
    row[[*experts, E]] = 1
    return row


@given(events=EVENTS, base=st.lists(st.floats(0.01, 0.99), min_size=E, max_size=E))
@settings(deadline=None)
def test_lifts_are_smoothed_frequencies_less_the_base_rate(
    events: list[tuple[set[int], set[int], set[int]]], base: list[float]
) -> None:
    counted = table()
    visits: Counter[int] = Counter()
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    rates = np.array(base, dtype=np.float32)
    for first, second, used in events:
        visit = counted.look_up(numbers(first, second), len(first))
        lift = counted.lift(visit, rates)
        assert lift.shape == (2 if second else 1, E)
        for order, contexts in enumerate([first, second] if second else [first]):
            for expert in range(E):
                rate = float(rates[expert])
                raw = sum((counts[c][expert] - visits[c] * rate) / (visits[c] + 4) for c in contexts)
                chance = sum(visits[c] / (visits[c] + 4) ** 2 for c in contexts) * rate * (1 - rate)
                expected = raw * raw**2 / (raw**2 + 4 * chance) if raw else 0.0
                assert lift[order, expert] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        counted.add(visit, successors(used))
        for context in first | second:
            visits[context] += 1
            counts[context].update(used)


def test_weights_scale_what_each_context_adds() -> None:
    counted = table()
    for _ in range(50):
        counted.add(counted.look_up(numbers({0}), 1), successors({1}))
        counted.add(counted.look_up(numbers({1}), 1), successors({2}))
    base = np.full(E, 0.2, dtype=np.float32)
    visit = counted.look_up(numbers({0, 1}), 2)
    lift = counted.lift(visit, base, np.array([1.0, 0.0], dtype=np.float32))[0]
    alone = counted.lift(counted.look_up(numbers({0}), 1), base)[0]
    assert lift == pytest.approx(alone)
    assert lift[1] > 0.7
    assert lift[2] < 0


@given(events=EVENTS, rows=st.tuples(st.integers(1, N_FIRST), st.integers(1, N_SECOND)))
@settings(deadline=None)
def test_contexts_that_share_rows_are_never_taken_for_each_other(
    events: list[tuple[set[int], set[int], set[int]]], rows: tuple[int, int]
) -> None:
    """Counts are those of a context since it last took its row, or nothing."""
    row_bytes = 2 * (E + 1) + 10
    counted = table(rows[0] * row_bytes, rows[1] * row_bytes)
    assert counted.n_bytes <= sum(rows) * row_bytes
    history: defaultdict[int, list[set[int]]] = defaultdict(list)
    for first, second, used in events:
        contexts = numbers(first, second)
        visit = counted.look_up(contexts, len(first))
        for context, row in zip(contexts.tolist(), visit.counts.tolist(), strict=True):
            latest = history[context][len(history[context]) - row[-1] :] if row[-1] else []
            assert row[-1] <= len(history[context])
            assert row[:-1] == [sum(expert in used for used in latest) for expert in range(E)]
        counted.add(visit, successors(used))
        for context in first | second:
            history[context].append(used)


def test_what_recurs_keeps_its_row() -> None:
    counted = table(second_bytes=1)
    favourite = numbers({0}, {N_FIRST})
    for at in range(200):
        counted.add(counted.look_up(favourite, 1), successors({1}))
        if at % 2:
            stranger = numbers({0}, {N_FIRST + 1 + at % (N_SECOND - 1)})
            counted.add(counted.look_up(stranger, 1), successors({2}))
    assert counted.look_up(favourite, 1).counts[1, -1] == 200
    for at in range(200):
        stranger = numbers({0}, {N_FIRST + 1 + at % 2})
        counted.add(counted.look_up(stranger, 1), successors({2}))
    assert counted.look_up(favourite, 1).counts[1, -1] == 0, "what never comes again gives way"


def test_counts_are_halved_before_they_overflow() -> None:
    counted = table()
    contexts = numbers({2})
    for _ in range(70_000):
        counted.add(counted.look_up(contexts, 1), successors({3}))
        row = counted.counts[2]
        assert row[3] == row[-1] <= MAX_VISITS
    assert counted.counts[2, -1] >= WINDOW // 2


def test_weights_have_the_least_squared_error() -> None:
    """Against normal equations over all samples at once, none of whose solution is negative here."""
    rng = np.random.default_rng(4)
    regression = OnlineRegression(3)
    truth = np.array([0.7, 0.0, 0.3])
    features = rng.normal(size=(400, 3, 8))
    for sample in features:
        rest = truth @ sample + 0.1 * rng.normal(size=8)
        regression.learn(np.concatenate((sample, rest[None])).astype(np.float32))
    assert regression.weights() == pytest.approx(truth, abs=0.02)
    alone = regression.weights(2)
    assert alone.shape == (1,)
    assert alone == pytest.approx([0.7], abs=0.05)


def test_noise_and_opposites_get_no_weight() -> None:
    rng = np.random.default_rng(5)
    regression = OnlineRegression(2)
    for _ in range(1000):
        noise, opposite = rng.normal(size=(2, 8))
        regression.learn(np.stack((noise, opposite, -opposite)).astype(np.float32))
    assert regression.weights()[0] < 0.05
    assert regression.weights()[1] == 0.0


def test_features_that_stay_zero_do_no_harm() -> None:
    regression = OnlineRegression(2)
    sample = np.zeros((3, 4), dtype=np.float32)
    sample[0] = sample[2] = 1.0
    for _ in range(2000):
        regression.learn(sample)
    regression.moments[1] = regression.moments[:, 1] = 0.0
    for _ in range(8):
        regression.learn(sample)
    assert np.isfinite(regression.weights()).all()
    assert regression.weights()[0] == pytest.approx(1.0, abs=0.01)
