"""Scores of predictors against their squared errors, and whom of several is heard."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.sched.predict import Prediction
from mer.sched.predictors.best import BestPredictor, PredictionScore, ScoredPredictor

N = 5  # experts of a layer


@attrs.define
class Scripted:
    """Says what it is told to, for any layer."""

    name: str = "scripted"
    answer: Callable[[int], dict[int, float]] = lambda _layer: {}
    seen: list[tuple[int, tuple[int, ...]]] = attrs.Factory(list)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        self.seen.append((layer, tuple(experts)))

    def predict(self, layer: int) -> list[Prediction]:
        return [Prediction((layer, expert), p) for expert, p in self.answer(layer).items()]


def always(name: str, **layers: dict[int, float]) -> Scripted:
    """Return a predictor with the same answer for a layer at any time; layers are named l0, l1, ..."""
    return Scripted(name, lambda layer: layers.get(f"l{layer}", {}))


def test_shares_of_nothing_are_0() -> None:
    nothing = PredictionScore(predicted=0, right=0, used=0)
    assert (nothing.precision, nothing.recall) == (0.0, 0.0)
    some = PredictionScore(predicted=4, right=3, used=6)
    assert (some.precision, some.recall) == (0.75, 0.5)


@given(
    st.lists(
        st.tuples(st.dictionaries(st.integers(0, N - 1), st.floats(0, 1)), st.sets(st.integers(0, N - 1), min_size=1)),
        min_size=1,
        max_size=20,
    )
)
@settings(deadline=None)
def test_skill_is_what_predictions_take_from_the_squared_error(events: list[tuple[dict[int, float], set[int]]]) -> None:
    """Averaged over all events at first, and then over a window of 64 that fades."""
    inner = Scripted()
    scored = ScoredPredictor(inner, 1)
    scored.observe(0, [0])
    average = 0.0
    events = events * (200 // len(events))
    for n, (answer, used) in enumerate(events, 1):
        inner.answer = lambda _layer, answer=answer: answer  # type: ignore[misc]
        scored.predict(0)
        scored.observe(0, sorted(used))
        truth = np.array([expert in used for expert in range(N)], dtype=float)
        claimed = np.array([answer.get(expert, 0.0) for expert in range(N)])
        gain = float((truth**2).sum() - ((truth - claimed) ** 2).sum())
        average += (gain - average) / min(64, n)
        assert scored.skill(0) == pytest.approx(average, abs=1e-9)
    score = scored.score()
    assert score.predicted == sum(len(answer) for answer, _ in events)
    assert score.right == sum(len(used & set(answer)) for answer, used in events)
    assert score.used == sum(len(used) for _, used in events)
    assert scored.score(0) == score


def test_the_last_answer_before_an_event_counts() -> None:
    inner = Scripted()
    scored = ScoredPredictor(inner, 2)
    scored.observe(0, [0])
    for answer in ({0: 1.0, 1: 1.0}, {2: 0.5}):
        inner.answer = lambda _layer, answer=answer: answer  # type: ignore[misc]
        assert scored.predict(1) == [Prediction((1, expert), p) for expert, p in answer.items()]
    scored.observe(1, [2])
    assert scored.score() == scored.score(1) == PredictionScore(predicted=1, right=1, used=1)
    assert scored.skill(1) == pytest.approx(0.75)
    assert scored.score(0) == PredictionScore(predicted=0, right=0, used=0)


def test_what_nobody_asked_about_does_not_count() -> None:
    inner = always("any", l0={0: 1.0}, l1={1: 1.0}, l2={2: 1.0})
    scored = ScoredPredictor(inner, 3)
    scored.predict(0)  # before the first event nothing is ahead
    scored.observe(0, [0])
    scored.observe(1, [1])
    scored.predict(1)  # behind
    scored.predict(2)
    scored.observe(0, [0])  # the pass has ended early
    scored.observe(1, [1])
    scored.observe(2, [2])
    assert scored.score() == PredictionScore(predicted=0, right=0, used=0)
    assert inner.seen == [(0, (0,)), (1, (1,)), (0, (0,)), (1, (1,)), (2, (2,))]
    scored.predict(1)  # of the next pass
    scored.observe(0, [0])
    scored.observe(1, [4])
    assert scored.score() == PredictionScore(predicted=1, right=0, used=1)
    assert scored.skill(1) == -1.0
    scored.observe(2, [2])
    scored.observe(0, [0])
    scored.observe(1, [4])
    assert scored.score() == PredictionScore(predicted=1, right=0, used=1), "an answer is for one event"


def test_the_better_one_is_heard_layer_by_layer() -> None:
    left = always("left", l0={0: 0.9}, l1={4: 0.9})
    right = always("right", l0={4: 0.9}, l1={1: 0.9})
    best = BestPredictor([left, right], 2)
    for _ in range(3):
        for layer in range(2):
            best.predict(layer)
            best.observe(layer, [layer])
    assert [best.choice(layer) for layer in range(2)] == ["left", "right"]
    assert best.predict(0) == [Prediction((0, 0), 0.9)]
    assert best.predict(1) == [Prediction((1, 1), 0.9)]
    assert left.seen == right.seen == [(0, (0,)), (1, (1,))] * 3
    for _ in range(300):
        for layer in range(2):
            best.predict(layer)
            best.observe(layer, [4])
    assert [best.choice(layer) for layer in range(2)] == ["right", "left"], "the skill is that of the last events"


def test_who_claims_more_than_comes_true_is_not_heard() -> None:
    """Both name the same experts, of which every other one is used."""
    bold, honest = always("bold", l0={0: 1.0, 1: 1.0}), always("honest", l0={0: 0.5, 1: 0.5})
    best = BestPredictor([bold, honest], 1)
    for at in range(100):
        best.predict(0)
        best.observe(0, [at % 2])
    assert best.choice(0) == "honest"


def test_silence_is_not_heard_and_equals_go_by_order() -> None:
    silent, wrong = always("silent"), always("wrong", l0={3: 0.5})
    best = BestPredictor([silent, wrong], 1)
    best.observe(0, [0])
    assert best.choice(0) == "silent"
    for _ in range(10):
        assert best.predict(0) == [Prediction((0, 3), 0.5)]
        best.observe(0, [0])
    first, second = always("first", l0={1: 0.5}), always("second", l0={2: 0.5})
    best = BestPredictor([first, second], 1)
    best.observe(0, [0])
    assert best.predict(0) == [Prediction((0, 1), 0.5)]
    with pytest.raises(ConfigError, match="give at least one"):
        BestPredictor([], 1)
