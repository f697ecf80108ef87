"""The expert cache and its policy against a model of plain lists."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mer.sched.experts import ExpertCache
from mer.sched.policy import LayerLRU

LAYERS, EXPERTS, SLOTS = 3, 4, 7  # shares 3, 2, 2
SHARES = [3, 2, 2]


class CacheMachine(RuleBasedStateMachine):
    """Drives a cache as the store does, beside lists of (layer, expert, slot) in order of last use."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ExpertCache(LayerLRU(LAYERS, SLOTS))
        self.free = list(range(SLOTS))
        self.resident: list[tuple[int, int, int]] = []  # least recently used first
        self.pins: dict[tuple[int, int], int] = {}
        self.hits = self.misses = self.evictions = 0

    def slot_of(self, layer: int, expert: int) -> int | None:
        return next((slot for la, e, slot in self.resident if (la, e) == (layer, expert)), None)

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.lists(st.integers(0, EXPERTS - 1), unique=True))
    def look_up(self, layer: int, experts: list[int]) -> None:
        hits, misses = self.cache.lookup(layer, experts)
        assert hits == [e for e in experts if self.slot_of(layer, e) is not None]
        assert misses == [e for e in experts if self.slot_of(layer, e) is None]
        for expert in hits:
            entry = next(r for r in self.resident if r[:2] == (layer, expert))
            self.resident.remove(entry)
            self.resident.append(entry)
        self.hits += len(hits)
        self.misses += len(misses)

    @precondition(lambda self: self.free)
    @rule(layer=st.integers(0, LAYERS - 1), expert=st.integers(0, EXPERTS - 1))
    def land(self, layer: int, expert: int) -> None:
        if self.slot_of(layer, expert) is not None:
            with pytest.raises(RuntimeError, match="resident already"):
                self.cache.insert((layer, expert), self.free[0], (1, 2, 3))
            return
        slot = self.free.pop(0)
        self.cache.insert((layer, expert), slot, (slot, slot + 1, slot + 2))
        self.resident.append((layer, expert, slot))

    @precondition(lambda self: self.resident)
    @rule(data=st.data(), more=st.booleans())
    def pin(self, data: st.DataObject, *, more: bool) -> None:
        layer, expert, _ = data.draw(st.sampled_from(self.resident))
        key = (layer, expert)
        if more:
            self.cache[key].pins += 1
            self.pins[key] = self.pins.get(key, 0) + 1
        elif self.pins.get(key):
            self.cache[key].pins -= 1
            self.pins[key] -= 1

    @precondition(lambda self: not self.free)
    @rule(layer=st.integers(0, LAYERS - 1))
    def evict(self, layer: int) -> None:
        got = self.cache.evict_for(layer)
        n = [sum(la == other for la, _, _ in self.resident) for other in range(LAYERS)]
        over = {other: max(0, n[other] - SHARES[other]) for other in range(LAYERS)}
        candidates = [r for r in self.resident if not self.pins.get(r[:2])]
        if not candidates:
            assert got is None
            return
        # the furthest above its share, else the layer itself, else any; and of that layer the least recently used
        best = max((over[la], la == layer) for la, _, _ in candidates)
        allowed = {la for la, _, _ in candidates if (over[la], la == layer) == best}
        oldest = {next(r for r in candidates if r[0] == la) for la in allowed}
        victim = next(r for r in oldest if r[2] == got)
        self.resident.remove(victim)
        self.pins.pop(victim[:2], None)
        self.free.append(victim[2])
        self.evictions += 1

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.resident))
        assert self.cache.drop(entry[:2]) == entry[2]
        self.resident.remove(entry)
        self.pins.pop(entry[:2], None)
        self.free.append(entry[2])

    @invariant()
    def agree(self) -> None:
        s = self.cache.statistics()
        assert (s.hits, s.misses, s.lookups) == (self.hits, self.misses, self.hits + self.misses)
        assert (s.evictions, s.resident, s.policy) == (self.evictions, len(self.resident), "layer-lru")
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                slot = self.slot_of(layer, expert)
                assert ((layer, expert) in self.cache) == (slot is not None)
                if slot is not None:
                    resident = self.cache[layer, expert]
                    assert (resident.slot, resident.addresses) == (slot, (slot, slot + 1, slot + 2))
                    assert resident.pins == self.pins.get((layer, expert), 0)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@given(st.integers(1, 12), st.integers(1, 60))
def test_shares_are_equal_and_use_every_slot(n_layers: int, n_slots: int) -> None:
    (shares,) = LayerLRU(n_layers, n_slots)._shares
    assert len(shares) == n_layers
    assert sum(shares) == n_slots
    assert max(shares) - min(shares) <= 1


def test_a_cycle_through_the_layers_hits_where_one_lru_over_all_of_them_never_would() -> None:
    """Tokens that use the same expert of every layer again and again, in fewer slots than they need."""
    n_layers, n_slots = 8, 12
    cache = ExpertCache(LayerLRU(n_layers, n_slots))
    free = list(range(n_slots))
    for token in range(40):
        for layer in range(n_layers):
            for expert in (0, 1 + token % 2):  # one expert of two is always the same
                _, missing = cache.lookup(layer, [expert])
                if missing:
                    slot = free.pop() if free else cache.evict_for(layer)
                    assert slot is not None
                    cache.insert((layer, expert), slot, (0, 0, 0))
    s = cache.statistics()
    assert s.hits > s.lookups / 5
