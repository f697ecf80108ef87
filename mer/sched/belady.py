"""The offline bound: the most hits that any policy can have."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final

from mer.io.extents import ExpertKey
from mer.sched.simulate import Event, Simulation

NAME: Final = "belady"


def simulate_belady(events: Sequence[Event], n_slots: int, *, n_layers: int) -> Simulation:
    """Replay events with the future known: after each, those experts stay whose next use comes first.

    Experts that are used and dropped take no slot, so that no policy can have more hits, be it one that drops
    newcomers or one that keeps them all. Source: L. A. Belady, "A study of replacement algorithms for a
    virtual-storage computer", IBM Systems Journal 5 (1966), with bypass.
    """
    # An expert's old entry could leave the heap when a new one enters; but finding it takes a pass over the heap for
    # each use. So stale entries stay until they come up, or until there are more of them than others.
    never = len(events)
    next_uses = array("q", bytes(8 * sum(len(experts) for _, experts in events)))  # of each event's experts in order
    last: dict[ExpertKey, int] = {}
    begin = len(next_uses)
    for at in range(len(events) - 1, -1, -1):
        layer, experts = events[at]
        begin -= len(experts)
        for number, expert in enumerate(experts, begin):
            next_uses[number] = last.get((layer, expert), never)
        last.update(((layer, expert), at) for expert in experts)

    result = Simulation(NAME, n_slots, n_layers)
    kept: dict[ExpertKey, int] = {}  # {expert: its next use}
    furthest: list[tuple[int, ExpertKey]] = []  # heap of (-next use, expert); entries whose next use is past are stale
    begin = 0
    for layer, experts in events:
        uses = next_uses[begin : begin + len(experts)]
        begin += len(experts)
        result.count(layer, sum((layer, expert) in kept for expert in experts), len(experts))
        for expert, use in zip(experts, uses, strict=True):
            if use == never:
                kept.pop((layer, expert), None)
            else:
                kept[layer, expert] = use
                heappush(furthest, (-use, (layer, expert)))
        while len(kept) > n_slots:
            use, key = heappop(furthest)
            if kept.get(key) == -use:
                del kept[key]
        if len(furthest) > 2 * len(kept) + 1024:
            furthest = [(-use, key) for key, use in kept.items()]
            heapify(furthest)
    return result
