"""Markov predictions against chains whose probabilities are known."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.sched.predict import MIN_USES, MIN_VISITS, Prediction, distance
from mer.sched.predictors.markov import MarkovPredictor
from mer.sched.simulate import Event
from tests._lib.chains import Chain, cyclic, uniform
from tests._lib.routing import routings


def replay(
    predictor: MarkovPredictor, events: Iterable[Event], ahead: int = 1
) -> list[tuple[list[Prediction], set[int]]]:
    """Return every prediction made so many layers ahead, and what its layer then used."""
    pending: dict[int, list[Prediction]] = {}
    pairs = []
    for layer, experts in events:
        if layer in pending:
            pairs.append((pending.pop(layer), set(experts)))
        predictor.observe(layer, experts)
        pending[(layer + ahead) % predictor.n_layers] = predictor.predict((layer + ahead) % predictor.n_layers)
    return pairs


def tally(pairs: list[tuple[list[Prediction], set[int]]]) -> tuple[int, int, int]:
    """Return how many experts were predicted, how many of them rightly, and how many were used."""
    predicted = sum(len(predictions) for predictions, _ in pairs)
    right = sum(key[1] in used for predictions, used in pairs for key, _ in predictions)
    return predicted, right, sum(len(used) for _, used in pairs)


@given(routing=routings(max_events=120))
@settings(deadline=None)
def test_only_layers_ahead_and_experts_seen_are_predicted(routing: tuple[int, int, list[Event]]) -> None:
    n_layers, n_experts, events = routing
    predictor = MarkovPredictor(n_layers, n_experts, 1)
    uses: dict[tuple[int, int], int] = {}
    visits = [0] * n_layers
    last = None
    for layer, experts in [*events, *events]:
        for asked in range(-1, n_layers + 1):
            for key, probability in predictor.predict(asked):
                assert key[0] == asked
                assert distance(asked, last, n_layers)
                assert uses.get(key, 0) >= MIN_USES
                assert visits[asked] >= MIN_VISITS
                assert 0 <= probability <= 1
        predictor.observe(layer, experts)
        last = layer
        visits[layer] += 1
        for expert in experts:
            uses[layer, expert] = uses.get((layer, expert), 0) + 1


@pytest.mark.parametrize(("n_experts", "width", "n_passes"), [(8, 1, 600), (8, 2, 600), (32, 4, 1600)])
def test_probabilities_are_those_of_the_chain(n_experts: int, width: int, n_passes: int) -> None:
    """On average by groups of predicted probability, and nearly so one by one.

    Each of `width` contexts adds the uncertainty of its own counts, so that more of them need more passes.
    """
    chain = Chain.draw(3, n_experts, width=width, seed=1)
    predictor = MarkovPredictor(3, n_experts, width)
    found, true, base = [], [], []
    truths = np.full(n_experts, width / n_experts)
    for at, ((layer, experts), truth) in enumerate(chain.events(n_passes, seed=2)):
        if at > 1.5 * n_passes:
            found.append(predictor._probabilities(layer))
            true.append(truth)
            base.append(predictor.averages[layer, -1].copy())
        predictor.observe(layer, experts)
    estimates, truths, rates = (np.concatenate(parts) for parts in (found, true, base))
    assert np.mean((estimates - truths) ** 2) < 0.12 * np.mean((rates - truths) ** 2)
    edges = [0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.01]
    for low, high in pairwise(edges):
        group = (estimates >= low) & (estimates < high)
        if group.sum() >= 200:
            assert truths[group].mean() == pytest.approx(estimates[group].mean(), abs=0.06)


def test_predictions_further_ahead_are_calibrated_too() -> None:
    chain = Chain.draw(4, 8, seed=3, sharpness=3.0)
    pairs = replay(MarkovPredictor(4, 8, 1), [event for event, _ in chain.events(1200, seed=4)], ahead=2)
    pairs = pairs[len(pairs) // 3 :]
    claimed = sum(probability for predictions, _ in pairs for _, probability in predictions)
    predicted, right, used = tally(pairs)
    assert right == pytest.approx(claimed, rel=0.12)
    assert right > 0.4 * used
    assert predicted < 1.5 * used


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (8, 2), (60, 4), (128, 8), (510, 10)])
def test_cyclic_routing_is_predicted_nearly_always(n_experts: int, top_k: int) -> None:
    """The same experts come together each time round, because `top_k` divides their number."""
    n_passes = 3 * n_experts // top_k + 60
    pairs = replay(MarkovPredictor(2, n_experts, top_k), cyclic(2, n_experts, top_k, n_passes))
    predicted, right, used = tally(pairs[len(pairs) // 2 :])
    assert right > 0.97 * used
    assert right > 0.9 * predicted


@pytest.mark.parametrize(("n_experts", "top_k", "n_passes"), [(8, 1, 800), (8, 2, 800), (60, 4, 400), (128, 8, 400)])
def test_uniform_routing_is_hardly_ever_predicted(n_experts: int, top_k: int, n_passes: int) -> None:
    pairs = replay(MarkovPredictor(4, n_experts, top_k), uniform(4, n_experts, top_k, n_passes, seed=6))
    predicted, _, used = tally(pairs)
    assert predicted < 0.01 * used


@pytest.mark.slow
@given(n_experts=st.integers(2, 100_000), data=st.data())
@settings(deadline=None, max_examples=25)
def test_certain_successors_pass_for_any_number_of_experts(n_experts: int, data: st.DataObject) -> None:
    some = st.integers(0, n_experts - 1)
    follows = data.draw(st.dictionaries(some, some, min_size=1, max_size=3))
    predictor = MarkovPredictor(2, n_experts, 1, first_bytes=1 << 20, second_bytes=1 << 10)
    for at in range(60):
        before = list(follows)[at % len(follows)]
        predictor.observe(0, [before])
        if at > 40:
            assert (1, follows[before]) in [key for key, _ in predictor.predict(1)]
        predictor.observe(1, [follows[before]])


@pytest.mark.parametrize("n_experts", [2, 3, 5, 8])
def test_twice_the_uniform_share_passes(n_experts: int) -> None:
    """Every expert is followed by one in particular twice as often as by chance, and by the others alike."""
    rng = np.random.default_rng(7)
    predictor = MarkovPredictor(2, n_experts, 1)
    twice = min(1.0, 2 / n_experts)
    passed = 0
    n_passes = 700 * n_experts
    for at in range(n_passes):
        before = int(rng.integers(n_experts))
        others = [expert for expert in range(n_experts) if expert != before]
        predictor.observe(0, [before])
        if at >= n_passes - 200:
            passed += (1, before) in [key for key, _ in predictor.predict(1)]
        predictor.observe(1, [before if rng.random() < twice else int(rng.choice(others))])
    assert passed >= 195


@pytest.mark.parametrize("n_experts", [2, 7, 128, 512])
def test_twice_the_uniform_share_passes_once_it_is_counted(n_experts: int) -> None:
    """With as many visits as a row holds, for as many experts as models have."""
    predictor = MarkovPredictor(2, n_experts, 1)
    visits = 8000
    counts = np.full(n_experts + 1, round((visits - 2 * visits / n_experts) / max(1, n_experts - 2)), dtype=np.uint16)
    counts[1], counts[-1] = round(2 * visits / n_experts), visits
    predictor.table.fill(np.array([n_experts]), np.minimum(counts, visits)[None])
    predictor.visits = [visits * n_experts] * 2
    predictor.uses = [[visits] * n_experts] * 2
    moments = np.eye(6)
    moments[-1, 3] = moments[3, -1] = 1.0
    predictor.regressions[1].resume([0.0, 0.0, 0.0, 1.0, 0.0], moments, 1e6)
    predictor.observe(0, [0])
    assert [key for key, _ in predictor.predict(1)] == [(1, 1)]


def test_second_order_knows_what_first_order_cannot() -> None:
    """Each expert is the sum of those of the two layers before, which alone say nothing."""
    rng = np.random.default_rng(8)
    events: list[Event] = []
    for _ in range(500):
        a, b = (int(expert) for expert in rng.integers(0, 7, 2))
        events += [(0, (a,)), (1, (b,)), (2, ((a + b) % 7,)), (3, ((a + 2 * b) % 7,))]
    pairs = replay(MarkovPredictor(4, 7, 1), events)[-800:]
    ends = [pair for at, pair in enumerate(pairs) if at % 4 >= 2]  # those of the layers 2 and 3, or of 0 and 1
    begins = [pair for at, pair in enumerate(pairs) if at % 4 < 2]
    known, unknown = sorted((tally(ends), tally(begins)), key=lambda of: -of[1])
    assert known[1] > 0.95 * known[2]
    assert unknown[1] < 0.35 * unknown[2]


def test_a_pass_that_ended_early_connects_with_nothing() -> None:
    predictor = MarkovPredictor(3, 6, 1)
    for _ in range(100):
        predictor.observe(0, [1])
        predictor.observe(1, [2])
        assert predictor.predict(0) == []
        predictor.observe(0, [3])
        predictor.observe(1, [4])
        predictor.observe(2, [5])
    first = predictor.table.look_up(np.arange(18), 18).counts
    assert first[6 + 1, 2] == first[6 + 3, 4] == 100
    assert first[0 + 2].sum() == 0, "from layer 1 back to layer 0"
    assert first[12 + 4, 5] == 100
    assert first[:, -1].sum() == 399, "and from layer 2 to layer 0 in all passes but the last"


def test_large_batches_scale_what_is_expected() -> None:
    """A batch of four tokens uses what any of them does; the counts come from single tokens."""
    rng = np.random.default_rng(9)
    weights = np.arange(16, 0, -1.0)
    weights /= weights.sum()
    predictor = MarkovPredictor(1, 16, 1)
    for _ in range(600):
        predictor.observe(0, [int(rng.choice(16, p=weights))])
    batches: list[Event] = [(0, tuple(sorted(set(rng.choice(16, 4, p=weights).tolist())))) for _ in range(40)]
    pairs = replay(predictor, batches)
    claimed = sum(probability for predictions, _ in pairs for _, probability in predictions)
    right = tally(pairs)[1]
    assert right == pytest.approx(claimed, rel=0.25)
    assert right > 60


@pytest.mark.parametrize(("n_experts", "n_tokens", "n_passes"), [(16, 4, 200), (64, 8, 80)])
def test_what_foretells_a_token_foretells_its_share_of_a_batch(n_experts: int, n_tokens: int, n_passes: int) -> None:
    """Batches of tokens that go their own ways, after what single tokens have taught and before they come back."""
    chain = Chain.draw(3, n_experts, seed=1)
    rng = np.random.default_rng(10)
    predictor = MarkovPredictor(3, n_experts, 1)

    def events(n_tokens: int, n_passes: int) -> list[Event]:
        state = rng.integers(0, n_experts, n_tokens)
        found: list[Event] = []
        for at in range(3 * n_passes):
            state = np.array([rng.choice(n_experts, p=chain.matrices[at % 3, expert]) for expert in state])
            found.append((at % 3, tuple(sorted(set(state.tolist())))))
        return found

    replay(predictor, events(1, 600))
    for batch in (n_tokens, 1):
        pairs = replay(predictor, events(batch, n_passes))
        claimed = sum(probability for predictions, _ in pairs for _, probability in predictions)
        _, right, used = tally(pairs)
        assert 0.7 * right < claimed < 1.2 * right
        assert right > 0.3 * used


def test_without_a_pair_to_follow_there_is_first_order() -> None:
    """Of 36 pairs of a token every second one is followed: those whose numbers have an even sum."""
    chosen, other = [0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]
    predictor = MarkovPredictor(3, 12, 6)
    for _ in range(40):
        for layer, experts in ((0, chosen), (1, other), (2, chosen)):
            predictor.observe(layer, experts)
    predictor.observe(0, chosen)
    assert predictor._know(1).n_missing == 0
    predictor.observe(1, other)
    assert predictor._know(2).n_missing == 1
    assert [key[1] for key, _ in sorted(predictor.predict(2))] == chosen


def test_memory_is_bounded() -> None:
    for n_layers, n_experts, top_k in ((1, 2, 1), (32, 8, 2), (48, 128, 8), (128, 512, 10)):
        predictor = MarkovPredictor(n_layers, n_experts, top_k)
        assert predictor.n_bytes <= (64 << 20) + (16 << 20) + 4 * 4 * n_layers * n_experts
    small = MarkovPredictor(48, 128, 8, first_bytes=1 << 16, second_bytes=1 << 16)
    assert small.n_bytes <= (2 << 16) + 4 * 4 * 48 * 128
    pairs = replay(small, cyclic(48, 128, 8, 20))
    assert tally(pairs)[2] > 0
