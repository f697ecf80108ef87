"""Trials of something whose worth is known."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.trial import BLOCK_PASSES, MAX_ROUNDS, PASSES_PER_LOOK, PATIENCE, Trial

ROUND = [bool(number.bit_count() % 2) for number in range(8) for _ in range(BLOCK_PASSES)]
"""Sides of a round, pass by pass: the sequence of Thue and Morse."""
Cost = Callable[[int, bool, int], float]  # of a pass, by its number, its side, and how many passes this side has had


def run(trial: Trial, n_passes: int, cost: Cost, *, acts: bool = True) -> list[bool]:
    """Return on which sides passes were; `acts` says whether what is allowed does anything."""
    sides: list[bool] = []
    streak = 0
    for at in range(n_passes):
        side = trial.allowed
        streak = streak + 1 if sides and sides[-1] == side else 0
        sides.append(side)
        trial.end_pass(cost(at, side, streak), acted=side and acts)
    return sides


def gain(share: float, noise: float = 0.0, seed: int = 0) -> Cost:
    """Return costs that are lower by a share where it is allowed."""
    rng = random.Random(seed)
    return lambda _at, side, _streak: 100.0 * (1.0 - share * side) * (1.0 + noise * rng.gauss(0.0, 1.0))


def passes_to_verdict(trial: Trial, cost: Cost) -> int:
    for n in range(1, 1000):
        run(trial, 1, cost)
        if trial.trials:
            return n
    raise AssertionError("no verdict")


def test_nothing_is_tried_before_it_does_something() -> None:
    trial = Trial()
    assert all(run(trial, PATIENCE, gain(-9.0), acts=False))
    assert (trial.trials, trial.verdict) == (0, None)


def test_it_looks_for_something_to_try_now_and_then_and_begins_when_there_is() -> None:
    trial = Trial()
    run(trial, PATIENCE, gain(0.1), acts=False)
    looks = run(trial, 10 * PASSES_PER_LOOK, gain(0.1), acts=False)
    assert sum(looks) == 10
    assert all(looks[at] for at in range(looks.index(True), len(looks), PASSES_PER_LOOK))
    while not trial.allowed:
        trial.end_pass(1.0, acted=False)
    assert run(trial, 1 + len(ROUND), gain(0.1)) == [True, *ROUND]
    assert trial.verdict is True


def test_sides_take_turns_in_a_balanced_order() -> None:
    trial = Trial()
    assert run(trial, 1 + len(ROUND), gain(0.1)) == [True, *ROUND]
    assert (trial.trials, trial.verdict) == (1, True)


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.5, True), (0.02, True), (0.009, False), (0.0, False), (-0.001, False), (-0.5, False)]
)
def test_clear_cases_take_one_round(share: float, verdict: bool) -> None:
    trial = Trial()
    passes = passes_to_verdict(trial, gain(share))
    assert (trial.verdict, trial.allowed) == (verdict, verdict)
    assert passes == (1 + len(ROUND) * (MAX_ROUNDS if share == 0.009 else 1))


def test_noise_takes_more_rounds() -> None:
    """A gain of half a standard deviation: sure after some rounds, and hardly ever missed or mistaken."""
    verdicts, passes = [], []
    for seed in range(40):
        trial = Trial()
        passes.append(passes_to_verdict(trial, gain(0.05, 0.1, seed)))
        verdicts.append(trial.verdict)
    assert verdicts.count(True) >= 28
    assert len(set(passes)) > 3
    assert max(passes) <= 1 + len(ROUND) * MAX_ROUNDS


def test_what_makes_no_difference_hardly_ever_wins() -> None:
    verdicts = []
    for seed in range(200):
        trial = Trial()
        passes_to_verdict(trial, gain(0.0, 0.1, seed))
        verdicts.append(trial.verdict)
    assert verdicts.count(True) <= 20  # one in 44 for each look; looks are up to eight, but most end at the first


@pytest.mark.parametrize("slope", [-0.5, 0.5])
@pytest.mark.parametrize("curve", [-0.004, 0.0, 0.004])
def test_drifts_are_not_taken_for_an_effect(slope: float, curve: float) -> None:
    """Drifts of first and second order cancel, but for what the passes after a change leave out."""

    def cost(at: int, side: bool, _streak: int) -> float:
        return 100.0 + slope * at + curve * at * at

    trial = Trial()
    run(trial, 1 + len(ROUND) * MAX_ROUNDS, cost)
    assert trial.verdict is False

    def better(at: int, side: bool, streak: int) -> float:
        return cost(at, side, streak) * (0.8 if side else 1.0)

    trial = Trial()
    run(trial, 1 + len(ROUND) * MAX_ROUNDS, better)
    assert trial.verdict is True


@pytest.mark.parametrize("verdict", [True, False])
def test_the_first_pass_after_a_change_does_not_count(verdict: bool) -> None:
    """It costs what the pass before was on the other side for."""

    def cost(_at: int, side: bool, streak: int) -> float:
        better = side == verdict
        return (50.0 if better else 100.0) if streak else (1000.0 if better else 0.0)

    trial = Trial()
    run(trial, 1 + len(ROUND), cost)
    assert (trial.trials, trial.verdict) == (1, verdict)


def test_a_disaster_ends_a_trial_at_once() -> None:
    trial = Trial()
    assert passes_to_verdict(trial, gain(-1.1)) == 1 + 2 * BLOCK_PASSES
    assert trial.verdict is False
    trial = Trial()
    assert passes_to_verdict(trial, gain(-0.9)) == 1 + len(ROUND)


def test_a_round_in_which_nothing_was_done_says_nothing() -> None:
    trial = Trial()
    trial.end_pass(1.0, acted=True)
    run(trial, len(ROUND), gain(0.5), acts=False)
    assert (trial.trials, trial.verdict, trial.allowed) == (0, None, True)
    assert run(trial, 1 + len(ROUND), gain(0.5)) == [True, *ROUND], "the next one to act begins a trial"
    assert trial.verdict is True


def test_who_stops_acting_while_in_doubt_has_lost() -> None:
    trial = Trial()
    run(trial, 1 + len(ROUND), gain(0.009))
    assert trial.trials == 0
    run(trial, len(ROUND), gain(0.009), acts=False)
    assert (trial.trials, trial.verdict) == (1, False)


@pytest.mark.parametrize(("share", "spent"), [(0.5, 16), (-0.5, 17), (-1.5, 5)])
def test_trials_take_a_twentieth_and_less_each_time(share: float, spent: int) -> None:
    """Of the passes of a trial that went to the side that lost; the pass that begins the next trial is with it."""
    trial = Trial()
    waits: list[int] = []
    while len(waits) < 9:
        while trial.trials == len(waits):
            run(trial, 1, gain(share))
        verdict = trial.allowed
        n = 0
        while trial.allowed == verdict:
            run(trial, 1, gain(share))
            n += 1
        waits.append(n - verdict)
    assert waits == [20 * spent * 2 ** min(number, 5) for number in range(9)]


def test_a_changed_verdict_is_tested_soon_again() -> None:
    trial = Trial()
    for _ in range(4):
        passes_before = trial.trials
        while trial.trials == passes_before:
            run(trial, 1, gain(-0.5))
    while trial.trials == 4:
        run(trial, 1, gain(0.5))
    assert trial.verdict is True
    run(trial, 20 * 16, gain(0.5))
    assert run(trial, 1 + len(ROUND), gain(0.5)) == [True, *ROUND]


@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([-2.0, -0.1, 0.0, 0.009, 0.05]),
    noise=st.sampled_from([0.0, 0.02, 0.3]),
    idle=st.sampled_from([0.0, 0.3, 0.95]),
)
@settings(deadline=None, max_examples=40)
def test_what_does_not_pay_takes_few_passes(seed: int, share: float, noise: float, idle: float) -> None:
    """Up to 5 % of the passes and 129 while all verdicts are against it, whatever the costs; see docs/prefetch.md."""
    rng = random.Random(seed)
    cost = gain(share, noise, seed)
    trial = Trial()
    acted = 0
    for n in range(1, 4001):
        acts = trial.allowed and rng.random() >= idle
        acted += acts
        trial.end_pass(abs(cost(n, acts, 0)), acted=acts)
        if trial.verdict:
            return
        assert acted <= 0.05 * n + 129


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), noise=st.sampled_from([0.0, 0.1]))
@settings(deadline=None, max_examples=20)
def test_what_pays_is_done_without_in_few_passes(seed: int, noise: float) -> None:
    cost = gain(0.4, noise, seed)
    trial = Trial()
    sides: list[bool] = []
    for _ in range(4000):
        sides += run(trial, 1, cost)
        if trial.verdict is False:
            return
        assert sides.count(False) <= 0.05 * len(sides) + 128


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -float("inf")])
def test_a_cost_must_be_a_number(cost: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Trial().end_pass(cost, acted=True)
