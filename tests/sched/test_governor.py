"""Which guesses are worth the disk's time, against exact arithmetic, and whether they pay."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mer.sched.governor import Governor, GovernorStatistics, Guess, GuessMode


def a_guess(**changes: Any) -> Guess:
    values: dict[str, Any] = {
        "probability": 0.9,
        "n_bytes": 1000,
        "needed_in_s": 10.0,
        "victim": 0.0,
        "bytes_per_s": 1000.0,
        "chunk_bytes": 100,
        **changes,
    }
    return Guess(**values)


def guess(governor: Governor, n: int, *, right: int) -> None:
    """Start guesses one by one, all of them certain, of which the first ones come true."""
    for at in range(n):
        governor.started((0, 5), 1.0)
        governor.observe(0, [5] if at < right else [6])


@pytest.mark.parametrize("mode", ["markov", "gate", "auto"])
def test_what_is_likely_is_read(mode: GuessMode) -> None:
    governor = Governor(mode)
    assert governor.allowed
    assert governor.approves(a_guess())


@pytest.mark.parametrize("mode", ["markov", "gate"])
def test_only_auto_asks_whether_it_pays(mode: GuessMode) -> None:
    hopeless = a_guess(probability=0.01, needed_in_s=0.0, bytes_per_s=0.0, victim=1.0)
    assert Governor(mode).approves(hopeless)
    assert not Governor("auto").approves(hopeless)
    assert not Governor("auto").approves(a_guess(bytes_per_s=0.0))


def test_small_experts_keep_demand_waiting_for_no_more_than_themselves() -> None:
    assert Governor("auto").approves(a_guess(probability=0.6, n_bytes=1000, chunk_bytes=10_000))


def test_a_guess_is_weighed_against_what_leaves_for_it() -> None:
    doubted = {"probability": 0.5, "needed_in_s": 0.6}
    assert Governor("auto").approves(a_guess(**doubted)), "0.3 s against 0.05 s"
    assert not Governor("auto").approves(a_guess(**doubted, victim=0.6)), "0.3 s against 0.35 s"
    assert Governor("auto").approves(a_guess(**doubted, victim=0.4)), "0.3 s against 0.25 s"
    assert Governor("auto").approves(a_guess(victim=0.95)), "rarely wrong"


@pytest.mark.parametrize("needed_in_s", [0.0, -1.0])
def test_a_guess_that_comes_too_late_hides_nothing(needed_in_s: float) -> None:
    assert not Governor("auto").approves(a_guess(probability=0.99, needed_in_s=needed_in_s))
    assert not Governor("auto").approves(a_guess(probability=1.0, needed_in_s=needed_in_s)), "no gain is no reason"


PARTS = st.integers(0, 64).map(lambda part: part / 64)


@given(
    probability=PARTS,
    n_bytes=st.integers(1, 4096),
    eighths=st.integers(-8, 32),
    victim=PARTS,
    chunk=st.integers(1, 4096),
)
def test_auto_approves_what_gains_more_than_it_risks(
    probability: float, n_bytes: int, eighths: int, victim: float, chunk: int
) -> None:
    """Against fractions; what is on the edge to within rounding is left out. The disk reads 1024 bytes per second."""
    p = Fraction(probability)
    done = min(Fraction(n_bytes), max(Fraction(0), Fraction(eighths, 8) * 1024))
    surplus = p * done - (1 - p) * (min(chunk, n_bytes) + Fraction(victim) * n_bytes)
    assume(surplus == 0 or abs(surplus) > Fraction(1, 1000))
    weighed = a_guess(
        probability=probability,
        n_bytes=n_bytes,
        needed_in_s=eighths / 8,
        victim=victim,
        bytes_per_s=1024.0,
        chunk_bytes=chunk,
    )
    assert Governor("auto").approves(weighed) == (surplus > 0)


def test_guesses_that_keep_failing_are_believed_less() -> None:
    governor = Governor("auto")
    assert governor.hit_ratio == 1.0
    assert governor.approves(a_guess(probability=0.5))
    guess(governor, 32, right=0)
    assert governor.hit_ratio == pytest.approx(8 / 40)
    assert not governor.approves(a_guess(probability=0.5, chunk_bytes=200))  # 0.1 s are less than 0.9 * 0.2 s
    assert governor.approves(a_guess(probability=0.5, chunk_bytes=100))  # 0.1 s are more than 0.9 * 0.1 s
    guess(governor, 72, right=72)
    assert governor.hit_ratio == pytest.approx(80 / 112)
    assert governor.approves(a_guess(probability=0.5, chunk_bytes=200))


def test_guesses_that_do_better_than_claimed_are_not_believed_more() -> None:
    governor = Governor("auto")
    for _ in range(50):
        governor.started((0, 5), 0.1)
        governor.observe(0, [5])
    assert governor.hit_ratio > 3
    assert not governor.approves(a_guess(probability=0.1, chunk_bytes=200))


def test_a_record_is_forgotten_by_and_by() -> None:
    governor = Governor("auto")
    guess(governor, 100_000, right=100_000)
    guess(governor, 1500, right=0)
    assert governor.hit_ratio < 0.2


def test_a_bad_record_fades_while_nothing_is_guessed() -> None:
    governor = Governor("markov")
    guess(governor, 200, right=0)
    governor.end_pass(0.0, 1)
    before = governor.hit_ratio
    guess(governor, 1, right=0)
    governor.end_pass(0.0, 1)
    assert governor.hit_ratio < before, "in this pass something was guessed"
    for _ in range(1000):
        governor.end_pass(0.0, 1)
    assert governor.hit_ratio == pytest.approx(1.0, abs=0.03)
    better = Governor("markov")
    better.started((0, 5), 0.1)
    better.observe(0, [5])
    better.end_pass(0.0, 1)
    good = better.hit_ratio
    better.end_pass(0.0, 1)
    assert better.hit_ratio == good > 1, "a good one stays"


def test_only_the_layer_s_own_event_tells_whether_a_guess_was_right() -> None:
    governor = Governor("markov")
    for key in ((1, 3), (1, 4), (2, 3)):
        governor.started(key, 0.5)
    governor.observe(0, [3, 4])
    assert governor.hit_ratio == 1.0
    governor.observe(1, [3])
    assert governor.hit_ratio == pytest.approx((8 + 1) / (8 + 0.5 + 0.5))
    governor.observe(1, [4])
    assert governor.hit_ratio == pytest.approx(1.0), "a guess counts once"
    governor.observe(2, [1])
    assert governor.hit_ratio == pytest.approx(9 / 9.5)


def run(governor: Governor, costs: Sequence[tuple[float, int]]) -> int:
    """Run a pass for each (seconds, lookups) that it stalls with guesses; without them it stalls 1 ms per lookup.

    Returns:
        In how many passes something was guessed.
    """
    n = 0
    for stall_s, lookups in costs:
        if governor.allowed:
            governor.started((0, 5), 1.0)
            governor.observe(0, [5])
            n += 1
        governor.end_pass(stall_s if governor.allowed else 1e-3 * lookups, lookups)
    return n


def test_what_does_not_pay_is_given_up_in_auto_alone() -> None:
    dear = [(0.015, 10)] * 400
    for mode in ("markov", "gate"):
        governor = Governor(mode)
        assert run(governor, dear) == 400
        assert governor.statistics().verdict is None
    governor = Governor("auto")
    assert governor.statistics() == GovernorStatistics(
        mode="auto", allowed=True, verdict=None, trials=0, selected=0, hit_ratio=1.0
    )
    n = run(governor, dear)
    assert n < 0.1 * 400
    assert not governor.allowed
    assert not governor.approves(a_guess())
    assert governor.statistics() == GovernorStatistics(
        mode="auto", allowed=False, verdict=False, trials=1, selected=n, hit_ratio=1.0
    )


def test_what_pays_goes_on() -> None:
    governor = Governor("auto")
    assert run(governor, [(0.005, 10)] * 300) > 0.9 * 300
    assert governor.statistics().verdict is True


def test_passes_compare_by_lookup() -> None:
    """Batches that grow stall longer, and their guesses pay all the same."""
    governor = Governor("auto")
    run(governor, [(0.9e-3 * lookups, lookups) for lookups in range(10, 110)])
    assert governor.statistics().verdict is True


def test_a_pass_without_lookups_says_nothing() -> None:
    governor = Governor("auto")
    governor.started((0, 5), 1.0)
    for _ in range(100):
        governor.end_pass(0.0, 0)
    assert governor.allowed
    assert governor.statistics().trials == 0
