"""The division of experts among places, with places that only note what they are asked to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.compute.division import Division, Shares
from mer.compute.messages import Float32Array, LoadedExpert
from mer.compute.places import Cost, Pairs

LAYER = 3
D = 3
IDS = np.array([[5, 1, 8], [1, 8, 2], [8, 5, 0], [1, 2, 5]], np.int32)
PAIRS = Pairs(IDS)
H = np.arange(len(IDS) * D, dtype=np.float32).reshape(-1, D) + 1


@attrs.define
class SimulatedPlace:
    """A place that gives expert * h, and takes what it is told to."""

    name: str
    log: list[str]
    expert_s: Mapping[int, float] | None = None  # of each expert; None: not measured
    start_s: float = 0.0
    fails_at: str = ""
    shares_memory: bool = False
    asked: list[tuple[list[int], list[int]]] = attrs.field(factory=list)
    given: list[list[int]] = attrs.field(factory=list)
    _rows: Float32Array | None = None

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """See `ExpertPlace`."""
        assert layer == LAYER
        self.asked.append(([it.expert for it in experts], list(rows)))
        if self.expert_s is None:
            return None
        return Cost([self.expert_s[it.expert] for it in experts], self.start_s)

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Float32Array, pairs: Pairs) -> None:
        """See `ExpertPlace`."""
        assert (layer, h is H, pairs is PAIRS) == (LAYER, True, True)
        self._do("start")
        self.given.append([it.expert for it in experts])
        rows = [h[pair // IDS.shape[1]] * it.expert for it in experts for pair in pairs.of([it.expert])]
        self._rows = np.array(rows, np.float32)

    def finish(self, *, timed: bool) -> Float32Array | None:
        """See `ExpertPlace`."""
        rows, self._rows = self._rows, None
        assert rows is not None
        self._do("timed" if timed else "finish")
        return None if self.shares_memory else rows

    def _do(self, what: str) -> None:
        self.log.append(f"{self.name} {what}")
        if self.fails_at == what:
            raise ValueError(f"{self.name} fails")


def loaded(*experts: int) -> tuple[LoadedExpert, ...]:
    return tuple(LoadedExpert(it, (64 * it + 64, 1, 2), (True, False)) for it in experts)


def numbers(shares: Shares) -> list[list[int]]:
    assert shares.layer == LAYER
    return [[it.expert for it in own] for own in shares.experts]


def divided(costs: Sequence[Cost | None], bound: Sequence[Sequence[int]], free: Sequence[int]) -> list[list[int]]:
    """Divide by these costs of the bound and the free experts in each place."""
    places = [
        SimulatedPlace(str(i), [], None if cost is None else dict(zip([*own, *free], cost.expert_s, strict=True)))
        for i, (cost, own) in enumerate(zip(costs, bound, strict=True))
    ]
    for place, cost in zip(places, costs, strict=True):
        place.start_s = 0.0 if cost is None else cost.start_s
    return numbers(Division(places).divide(LAYER, [loaded(*own) for own in bound], loaded(*free), PAIRS))


seconds = st.integers(0, 30).map(float)


@given(st.data(), st.integers(1, 3), st.integers(0, 6))
def test_no_other_runs_end_earlier(data: st.DataObject, n_places: int, n_free: int) -> None:
    """Bound experts and the way to a place count as well, and of equal divisions later places have the fewest."""
    n_bound = [data.draw(st.integers(0, 2)) for _ in range(n_places)]
    firsts = [0, *itertools.accumulate(n_bound)]
    bound = [list(range(100 + a, 100 + b)) for a, b in itertools.pairwise(firsts)]
    costs = [
        Cost(data.draw(st.lists(seconds, min_size=n + n_free, max_size=n + n_free)), data.draw(seconds))
        for n in n_bound
    ]
    got = divided(costs, bound, list(range(n_free)))

    def end_s(sizes: Sequence[int]) -> float:
        ends, first = [], 0
        for cost, n, size in zip(costs, n_bound, sizes, strict=True):
            own = [*cost.expert_s[:n], *cost.expert_s[n + first : n + first + size]]
            ends.append(cost.start_s + sum(own) if own else 0.0)
            first += size
        return max(ends)

    every = [it for it in itertools.product(range(n_free + 1), repeat=n_places) if sum(it) == n_free]
    sizes = tuple(len(own) - n for own, n in zip(got, n_bound, strict=True))
    assert [own[:n] for own, n in zip(got, n_bound, strict=True)] == bound
    assert [it for own, n in zip(got, n_bound, strict=True) for it in own[n:]] == list(range(n_free))
    best = min(map(end_s, every))
    assert end_s(sizes) == best
    if n_places == 2:
        assert sizes[1] == min(it[1] for it in every if end_s(it) == best)


@pytest.mark.parametrize(
    ("costs", "bound", "want"),
    [
        ([Cost([1] * 6), Cost([1] * 6)], [[], []], [[0, 1, 2], [3, 4, 5]]),
        ([Cost([1] * 6), Cost([2] * 6)], [[], []], [[0, 1, 2, 3], [4, 5]]),
        ([Cost([1] * 6), Cost([1, 1, 1, 1, 1, 9])], [[], []], [[0, 1, 2, 3, 4, 5], []]),  # the last is too much there
        ([Cost([3] + [1] * 6), Cost([1] * 6)], [[7], []], [[7, 0, 1], [2, 3, 4, 5]]),  # the first place has begun
        ([Cost([1] * 6), Cost([1] * 6, 4)], [[], []], [[0, 1, 2, 3, 4], [5]]),  # a way of as long as four experts
        ([Cost([1] * 6), Cost([1] * 6, 5)], [[], []], [[0, 1, 2, 3, 4, 5], []]),
        ([Cost([1] * 6), Cost([1] * 7, 5)], [[], [7]], [[0, 1, 2, 3, 4, 5], [7]]),  # its way is gone in any case
        ([Cost([1] * 6), Cost([1] * 6), Cost([1] * 6)], [[], [], []], [[0, 1], [2, 3], [4, 5]]),
        ([Cost([1] * 6), Cost([2] * 6), Cost([2] * 6)], [[], [], []], [[0, 1, 2, 3], [4, 5], []]),
        ([Cost([1] * 6)], [[]], [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_what_goes_where(costs: list[Cost], bound: list[list[int]], want: list[list[int]]) -> None:
    assert divided(costs, bound, range(6)) == want


@pytest.mark.parametrize(
    ("known", "n", "want"),
    [
        ("--", 3, [1, 2]),
        ("--", 1, [0, 1]),
        ("-+", 1, [1, 0]),  # a lone one goes where nothing has been measured
        ("+-", 1, [0, 1]),
        ("-+", 3, [2, 1]),
        ("-+-", 5, [2, 1, 2]),
        ("+--", 7, [2, 2, 3]),
        ("-++", 5, [2, 1, 2]),
        ("-", 4, [4]),
    ],
)
def test_what_is_not_measured_gets_an_equal_share(known: str, n: int, want: list[int]) -> None:
    costs = [Cost([1.0] * n) if it == "+" else None for it in known]
    got = divided(costs, [[]] * len(known), range(n))
    assert list(map(len, got)) == want
    assert list(itertools.chain(*got)) == list(range(n))


def test_places_are_asked_once_each_for_what_they_may_get() -> None:
    places = [SimulatedPlace("a", [], {5: 1, 1: 1, 8: 1, 2: 1}), SimulatedPlace("b", [])]
    it = Division(places)
    it.divide(LAYER, [loaded(5), ()], loaded(1, 8, 2), PAIRS)
    assert places[0].asked == [([5, 1, 8, 2], [3, 3, 3, 2])]
    assert places[1].asked == [([1, 8, 2], [3, 3, 2])]
    assert numbers(it.undivided(LAYER, loaded(5, 1))) == [[5, 1], []]


def taken(y: Float32Array) -> Callable[[Pairs, Sequence[int], Float32Array], None]:
    """Return how to put rows into y [T * K, D]."""

    def take(pairs: Pairs, experts: Sequence[int], rows: Float32Array) -> None:
        y[pairs.of(experts)] = rows

    return take


def test_rows_come_together_un_summed_from_all_places() -> None:
    log: list[str] = []
    a, b, c = (SimulatedPlace(name, log) for name in "abc")
    y = np.zeros((IDS.size, D), np.float32)
    shares = Shares(LAYER, (loaded(8, 1), (), loaded(5, 0, 2)))
    Division([a, b, c]).compute(shares, H, PAIRS, taken(y))
    assert np.array_equal(y, (IDS[:, :, None] * H[:, None]).reshape(-1, D))
    assert (a.given, b.given, c.given) == ([[8, 1]], [], [[5, 0, 2]])
    assert log == ["c start", "a start", "c timed", "a timed"]  # the first may keep this thread: it starts last


def test_a_place_alone_is_not_waited_for_and_one_with_the_rows_at_hand_gives_none() -> None:
    log: list[str] = []
    a, b = SimulatedPlace("a", log, shares_memory=True), SimulatedPlace("b", log)
    y = np.zeros((IDS.size, D), np.float32)
    it = Division([a, b])
    it.compute(Shares(LAYER, (loaded(8), ())), H, PAIRS, taken(y))
    assert not y.any()
    it.compute(Shares(LAYER, ((), loaded(1))), H, PAIRS, taken(y))
    assert np.array_equal(y.any(1), IDS.ravel() == 1)
    assert log == ["a start", "a finish", "b start", "b finish"]


@pytest.mark.parametrize(
    ("fails", "want"),
    [
        ({"c": "start"}, ["c start"]),
        ({"b": "start"}, ["c start", "b start", "c finish"]),
        ({"a": "start"}, ["c start", "b start", "a start", "c finish", "b finish"]),
        ({"c": "timed"}, ["c start", "b start", "a start", "c timed", "b finish", "a finish"]),
        ({"a": "timed"}, ["c start", "b start", "a start", "c timed", "b timed", "a timed"]),
        ({"c": "timed", "b": "finish"}, ["c start", "b start", "a start", "c timed", "b finish", "a finish"]),
    ],
)
def test_when_a_place_fails_the_others_finish_and_no_row_is_taken(fails: dict[str, str], want: list[str]) -> None:
    log: list[str] = []
    places = [SimulatedPlace(name, log, fails_at=fails.get(name, "")) for name in "abc"]
    y = np.zeros((IDS.size, D), np.float32)
    it, shares = Division(places), Shares(LAYER, (loaded(8), loaded(1), loaded(5)))
    with pytest.raises(ValueError, match=f"{next(iter(fails))} fails"):
        it.compute(shares, H, PAIRS, taken(y))
    assert log == want
    assert not y.any()
    for place in places:
        place.fails_at = ""
    it.compute(shares, H, PAIRS, taken(y))
    assert np.array_equal(y.any(1), np.isin(IDS.ravel(), [8, 1, 5]))


@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True), min_size=1, max_size=9))
def test_pairs_are_sorted_by_expert(ids: list[list[int]]) -> None:
    pairs = Pairs(np.array(ids, np.int32))
    flat = [expert for row in ids for expert in row]
    every = list(range(6, -1, -1))
    assert [pairs.count(it) for it in every] == [flat.count(it) for it in every]
    assert pairs.of(every).tolist() == [pair for it in every for pair, expert in enumerate(flat) if expert == it]
    assert pairs.of([]).tolist() == []
    for expert, (first, n) in pairs.spans.items():
        assert [flat[pair] for pair in pairs.order[first : first + n]] == [expert] * n
