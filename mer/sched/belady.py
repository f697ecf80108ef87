"""The offline bound: the most hits that any policy can have."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Final

from mer.sched.keys import ExpertKey
from mer.sched.simulate import Event, Simulation

NAME: Final = "belady"


def simulate_belady(events: Sequence[Event], n_slots: int, *, n_layers: int) -> Simulation:
    """Replay events with the future known: after each, those experts stay whose next use comes first.

    Experts that are used and dropped take no slot, so that no policy can have more hits, be it one that drops
    newcomers or one that keeps them all. Source: L. A. Belady, "A study of replacement algorithms for a
    virtual-storage computer", IBM Systems Journal 5 (1966), with bypass.
    """
    never = len(events)
    next_uses: list[list[int]] = [[] for _ in events]
    last: dict[ExpertKey, int] = {}
    for at in range(len(events) - 1, -1, -1):
        layer, experts = events[at]
        next_uses[at] = [last.get((layer, expert), never) for expert in experts]
        last.update(((layer, expert), at) for expert in experts)

    result = Simulation(NAME, n_slots, n_layers)
    kept: dict[ExpertKey, int] = {}  # {expert: its next use}
    furthest: list[tuple[int, ExpertKey]] = []  # heap of (-next use, expert); entries whose next use is past are stale
    for (layer, experts), uses in zip(events, next_uses, strict=True):
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
