"""Predictions of a router asked in advance, against plain counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import ConfigError
from mer.sched.predict import bar
from mer.sched.predictors.gate import MIN_OFFERS, GatePredictor


def ids(*rows: list[int]) -> npt.NDArray[np.int32]:
    return np.array(rows, dtype=np.int32)


def teach(gate: GatePredictor, offer: npt.NDArray[np.int32], used: list[int], times: int) -> None:
    """Let layer 1 use the same experts again and again after the same offer."""
    for _ in range(times):
        gate.observe(0, [0])
        gate.offer(1, offer)
        gate.observe(1, used)


def predicted(gate: GatePredictor, offer: npt.NDArray[np.int32]) -> dict[int, float]:
    """Return what a fresh offer for layer 1 makes of its experts."""
    gate.observe(0, [0])
    gate.offer(1, offer)
    assert all(layer == 1 for (layer, _), _ in gate.predict(1))
    return {expert: probability for (_, expert), probability in gate.predict(1)}


ROUTERS = st.lists(
    st.tuples(
        st.lists(st.permutations(range(5)), min_size=1, max_size=9),  # ranking of each token
        st.integers(1, 5),  # ranks offered
        st.sets(st.integers(0, 4), min_size=1),
    ),
    min_size=20,
    max_size=60,
)


@pytest.mark.slow
@given(events=ROUTERS)
@settings(deadline=None, max_examples=50)
def test_probabilities_are_the_precision_of_the_best_rank(
    events: list[tuple[list[list[int]], int, set[int]]],
) -> None:
    gate = GatePredictor(2, 5, 2, n_ranks=5)
    named: Counter[tuple[int, int]] = Counter()
    right: Counter[tuple[int, int]] = Counter()
    uses: Counter[int] = Counter()
    share = 2 / 5
    for visits, (tokens, n_ranks, used) in enumerate(events):
        gate.observe(0, [0, 1])
        gate.offer(1, np.array(tokens, dtype=np.int64)[:, :n_ranks])
        size = next(i for i, most in enumerate((1, 3, 7, 10**9)) if len(tokens) <= most)
        best = {}
        for expert in range(5):
            rank = min(token.index(expert) for token in tokens)
            if rank < n_ranks:
                best[expert] = rank
        expected = {}
        for expert, rank in best.items():
            at = rank, size
            probability = (right[at] + 2 * share) / (named[at] + 2)
            reached = probability >= bar(share, visits) and named[at] >= MIN_OFFERS
            if reached:
                expected[1, expert] = probability
        found = gate.predict(1)
        assert dict(found) == pytest.approx(expected)
        assert [probability for _, probability in found] == sorted(expected.values(), reverse=True)
        gate.observe(1, sorted(used))
        for expert, rank in best.items():
            named[rank, size] += 1
            right[rank, size] += expert in used
        uses.update(used)
        share += (len(used) / 5 - share) / (visits + 1)


def test_a_router_is_believed_as_far_as_it_was_right() -> None:
    gate = GatePredictor(2, 16, 2)
    for at in range(400):
        first, second = at % 8, 8 + at % 8
        teach(gate, ids([first, second]), [first, second if at // 8 % 2 else 7 - first], 1)
    found = predicted(gate, ids([3, 12]))
    assert found[3] == pytest.approx(1.0, abs=0.01)
    assert found[12] == pytest.approx(0.5, abs=0.02)


def test_the_best_rank_of_a_batch_counts() -> None:
    """What any token puts first is used, and what all put second is not."""
    gate = GatePredictor(2, 8, 2)
    for at in range(160):
        first, second, neither = at % 8, (at + 1) % 8, (at + 2) % 8
        teach(gate, ids([first, second], [second, first], [first, neither]), [first, second], 1)
    found = predicted(gate, ids([3, 4], [4, 5], [3, 6]))
    assert list(found) == [3, 4]
    assert found[3] == found[4] > 0.99


def test_a_rank_predicts_after_some_offers() -> None:
    gate = GatePredictor(2, 8, 1)
    for _ in range(100):
        gate.observe(0, [0])
        gate.observe(1, [3])
    teach(gate, ids([3]), [3], MIN_OFFERS - 1)
    assert predicted(gate, ids([3])) == {}
    gate.observe(1, [3])
    assert list(predicted(gate, ids([3]))) == [3]


def test_a_router_that_is_never_right_is_not_believed() -> None:
    gate = GatePredictor(2, 8, 1)
    for expert in range(8):
        teach(gate, ids([expert]), [(expert + 1) % 8], 20)
    assert predicted(gate, ids([3])) == {}


def test_sizes_of_batches_are_counted_apart() -> None:
    gate = GatePredictor(2, 8, 1)
    teach(gate, ids([3]), [3], 40)
    assert list(predicted(gate, ids([3]))) == [3]
    for n_tokens in (2, 4, 8):
        assert predicted(gate, ids(*[[3]] * n_tokens)) == {}
        teach(gate, ids(*[[3]] * n_tokens), [3], 10)
        assert list(predicted(gate, ids(*[[3]] * n_tokens))) == [3]


def test_a_router_that_has_changed_is_found_out() -> None:
    """However long it has been right before: counts are halved."""
    gate = GatePredictor(2, 8, 1)
    teach(gate, ids([3]), [3], 20_000)
    assert predicted(gate, ids([3]))[3] > 0.99
    teach(gate, ids([3]), [4], 4000)
    assert predicted(gate, ids([3])) == {}


def test_an_offer_holds_until_its_event_or_the_end_of_the_pass() -> None:
    gate = GatePredictor(3, 8, 1)
    offer = ids([3])
    for _ in range(40):
        for layer in range(3):
            gate.offer(layer, offer)
            gate.observe(layer, [3])
    assert gate.predict(0) == [], "no offer"
    gate.offer(0, offer)
    assert [key for key, _ in gate.predict(0)] == [(0, 3)]
    assert gate.predict(0) == gate.predict(0)
    gate.observe(0, [3])
    assert gate.predict(0) == [], "its event has come"
    gate.offer(0, offer)
    assert gate.predict(0) == [], "it is not ahead"
    gate.offer(1, offer)
    gate.offer(2, offer)
    assert [key for key, _ in gate.predict(2)] == [(2, 3)]
    gate.offer(2, ids([5]))
    assert [key for key, _ in gate.predict(2)] == [(2, 5)], "a later offer replaces an earlier one; 5 was never used"
    gate.offer(2, offer)
    gate.observe(0, [3])  # the pass has ended early
    assert gate.predict(1) == gate.predict(2) == []


def test_what_cannot_be_is_refused() -> None:
    for n_ranks in (0, 9):
        with pytest.raises(ConfigError, match=f"ranks 1 to 8 of them, not {n_ranks}"):
            GatePredictor(2, 8, 2, n_ranks=n_ranks)
    gate = GatePredictor(2, 8, 2)
    for layer, offer in ((2, ids([0])), (-1, ids([0])), (0, ids([0, 1, 2])), (0, np.zeros(2, dtype=np.int32))):
        with pytest.raises(ValueError, match="no offer of up to 2 ranks for one of 2 layers"):
            gate.offer(layer, offer)
    for expert in (-1, 8):
        with pytest.raises(ValueError, match="experts must be numbers below 8"):
            gate.offer(0, ids([0, expert]))
