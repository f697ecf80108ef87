"""The division of a layer's experts among places that compute them, so that the last place ends early."""

from __future__ import annotations

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Generic

import attrs

from mer.compute.messages import LoadedExpert
from mer.compute.places import Cost, ExpertPlace, Pairs, Rows


@attrs.frozen
class Shares:
    """What each place computes of a layer's experts."""

    layer: int
    experts: tuple[tuple[LoadedExpert, ...], ...]  # [place]


class Division(Generic[Rows]):
    """Divides experts among places, and lets these compute at the same time.

    Args:
        places: at least one; the first may compute in the thread that calls `compute`.
    """

    def __init__(self, places: Sequence[ExpertPlace[Rows]]) -> None:
        self._places = tuple(places)
        self.n_places = len(places)

    def undivided(self, layer: int, experts: Sequence[LoadedExpert]) -> Shares:
        """Return shares that leave all experts to the first place."""
        return Shares(layer, (tuple(experts), *((),) * (len(self._places) - 1)))

    def divide(
        self, layer: int, bound: Sequence[Sequence[LoadedExpert]], free: Sequence[LoadedExpert], pairs: Pairs
    ) -> Shares:
        """Return which place computes which experts.

        Each place gets a run of the free ones, in the order of the places; of equal divisions, the one that gives later
        places less. Runs instead of any subsets, as there are too many of these to look at all. While a place has not
        been measured, runs are equal, and the odd ones go to those that have not been measured.

        Args:
            layer: routed layer.
            bound: [place] experts that are computed there in any case.
            free: experts that any place can compute.
            pairs: what was routed to each.
        """
        costs = []
        for place, own in zip(self._places, bound, strict=True):  # all are asked: they count how often
            experts = (*own, *free)
            costs.append(place.cost(layer, experts, [pairs.count(it.expert) for it in experts]))
        known = [cost for cost in costs if cost is not None]
        if len(known) == len(costs):
            cuts = _cuts([_time_of(cost, len(own)) for cost, own in zip(known, bound, strict=True)], len(free))
        else:
            cuts = _equal_cuts([cost is not None for cost in costs], len(free))
        runs = itertools.pairwise((0, *cuts, len(free)))
        return Shares(layer, tuple((*own, *free[a:b]) for own, (a, b) in zip(bound, runs, strict=True)))

    def compute(
        self, shares: Shares, h: Rows, pairs: Pairs, take: Callable[[Pairs, Sequence[int], Rows], None]
    ) -> None:
        """Let all places compute their shares; if one fails, the others finish before the error goes on.

        Args:
            shares: what `divide` gave.
            h: [T, D], what goes into the experts.
            pairs: what was routed to each.
            take: given the pairs, experts of one place, and their rows y [n, D], for each place that hands rows out.

        Raises:
            Exception: whatever a place raised first.
        """
        at_work = [(place, own) for place, own in zip(self._places, shares.experts, strict=True) if own]
        started: list[tuple[ExpertPlace[Rows], tuple[LoadedExpert, ...]]] = []
        rows: list[tuple[Sequence[int], Rows]] = []
        try:
            for place, experts in reversed(at_work):  # the first, which may take this thread's time, comes last
                place.start(shares.layer, experts, h, pairs)
                started.append((place, experts))
            while started:
                place, experts = started.pop(0)
                y = place.finish(timed=len(at_work) > 1)
                if y is not None:
                    rows.append(([it.expert for it in experts], y))
        except BaseException:
            for place, _ in started:  # they read experts, whose memory is others' next
                with contextlib.suppress(Exception):  # the first error is the one that counts
                    place.finish(timed=False)
            raise
        for numbers, y in rows:
            take(pairs, numbers, y)


_Time = Callable[[int, int], float]


def _time_of(cost: Cost, n_bound: int) -> _Time:
    """Return how long a place takes for what is bound to it and the free experts from one number up to another."""
    ends_s = list(itertools.accumulate(cost.expert_s, initial=cost.start_s))

    def seconds(first: int, end: int) -> float:
        if not n_bound and first == end:
            return 0.0
        return ends_s[n_bound] + ends_s[n_bound + end] - ends_s[n_bound + first]

    return seconds


def _cuts(times: Sequence[_Time], n: int) -> tuple[int, ...]:
    """Return where to cut n experts so that the last place ends as early as it can.

    Place by place, from the best division of the first i experts among the places before, for every i.
    """
    ends_s = [times[0](0, end) for end in range(n + 1)]  # of the last of the places so far; it grows with i
    chosen: list[dict[int, int]] = []  # of each place but the first: where its run begins if it ends at i
    for number, seconds in enumerate(times[1:], 2):
        ends = range(n + 1) if number < len(times) else (n,)  # the last place takes all that is left
        chosen.append({end: _cut(ends_s, seconds, end) for end in ends})
        ends_s = [max(ends_s[cut], seconds(cut, end)) for end, cut in chosen[-1].items()]
    cuts = [n]
    for begins in reversed(chosen):
        cuts.append(begins[cuts[-1]])
    return tuple(reversed(cuts[1:]))


def _cut(before_s: Sequence[float], seconds: _Time, end: int) -> int:
    """Return where a place's run up to `end` begins best, as late as possible.

    The later it begins, the later the places before end, and the earlier this one does: it is where these times cross.
    """
    crossed = bisect_left(range(end + 1), True, key=lambda cut: before_s[cut] >= seconds(cut, end))
    if crossed > end or (crossed and seconds(crossed - 1, end) < before_s[crossed]):
        return crossed - 1
    return bisect_right(before_s, before_s[crossed], hi=end + 1) - 1


def _equal_cuts(measured: Sequence[bool], n: int) -> tuple[int, ...]:
    """Return where to cut n experts into equal runs, the later places and first of all those not measured favoured."""
    n_places = len(measured)
    sizes = [n // n_places] * n_places
    for place in sorted(range(n_places), key=lambda it: (measured[it], -it))[: n % n_places]:
        sizes[place] += 1
    return tuple(itertools.accumulate(sizes[:-1]))
