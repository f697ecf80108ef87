"""Hypothesis strategies for routing events, and a plain model of a cache that drives and checks a policy."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from hypothesis import strategies as st

from mer.io.extents import ExpertKey
from mer.sched.policy import Policy
from mer.sched.simulate import Event


@st.composite
def routings(
    draw: st.DrawFn, max_layers: int = 3, max_experts: int = 6, max_events: int = 60
) -> tuple[int, int, list[Event]]:
    """Draw (layers, experts, events in any order of layers)."""
    n_layers, n_experts = draw(st.integers(1, max_layers)), draw(st.integers(1, max_experts))
    experts = st.lists(st.integers(0, n_experts - 1), min_size=1, max_size=n_experts, unique=True).map(tuple)
    events = draw(st.lists(st.tuples(st.integers(0, n_layers - 1), experts), max_size=max_events))
    return n_layers, n_experts, [(layer, used) for layer, used in events]


@attrs.define
class CheckedCache:
    """A cache of plain sets: every answer of its policy must be one that the protocol allows."""

    policy: Policy
    n_slots: int  # of each class
    bypass: bool
    kinds: Sequence[Sequence[int]] | None = None  # [L][E], class of slots
    kept: set[ExpertKey] = attrs.Factory(set)
    hits: int = 0
    lookups: int = 0
    evicted: list[ExpertKey] = attrs.Factory(list)
    refused: list[ExpertKey] = attrs.Factory(list)

    def event(self, layer: int, experts: tuple[int, ...]) -> None:
        """Run one event, with what it uses pinned."""
        self.policy.use(layer, experts)
        keys = [(layer, expert) for expert in experts]
        self.lookups += len(keys)
        missing = [key for key in keys if key not in self.kept]
        self.hits += len(keys) - len(missing)
        for key in missing:
            if len(self.rivals(key)) < self.n_slots or self._make_room(key, set(keys)):
                self.kept.add(key)
                self.policy.insert(key)
            assert len(self.rivals(key)) <= self.n_slots
        assert all(0 <= self.policy.likelihood(key) <= 1 for key in [*self.kept, *keys])

    def kind(self, key: ExpertKey) -> int:
        """Return the class of slots that an expert fits."""
        return 0 if self.kinds is None else self.kinds[key[0]][key[1]]

    def rivals(self, key: ExpertKey) -> set[ExpertKey]:
        """Return what is kept in slots of the class that an expert fits."""
        return {other for other in self.kept if self.kind(other) == self.kind(key)}

    def _make_room(self, key: ExpertKey, pinned: set[ExpertKey]) -> bool:
        rivals = self.rivals(key)
        for evictable in (rivals - pinned, rivals):
            asked: list[ExpertKey] = []

            def may_leave(other: ExpertKey, evictable: set[ExpertKey] = evictable, asked: list = asked) -> bool:
                asked.append(other)
                return other in evictable

            victim = self.policy.victim(key[0], may_leave, key[1] if self.bypass else None, kind=self.kind(key))
            assert set(asked) <= rivals, "asked for an expert that is not kept, or not in such a slot"
            assert (victim is None) == (not evictable), "None is for when nothing can leave"
            if victim is None:
                continue
            if victim == key:
                assert self.bypass, "refused a newcomer without being asked to"
                self.refused.append(key)
                return False
            assert victim in evictable, "gave up an expert that must stay"
            self.kept.remove(victim)
            self.policy.remove(victim)
            self.evicted.append(victim)
            return True
        raise AssertionError("no victim although everything may leave")
