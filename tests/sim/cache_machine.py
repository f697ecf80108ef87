"""The expert cache against a dictionary, under every policy."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mer.io.extents import ExpertKey
from mer.io.pool import Priority
from mer.sched.cache import ExpertCache, Resident
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy

N_LAYERS, N_EXPERTS = 3, 5
SLOT_COUNTS = {False: (6,), True: (4, 2)}  # of each class; with two classes, the experts of layer 1 have the second
KINDS = tuple((int(layer == 1),) * N_EXPERTS for layer in range(N_LAYERS))
PROFILE = HeatProfile(
    bytes(32), np.arange(N_LAYERS * N_EXPERTS).reshape(N_LAYERS, N_EXPERTS) * 7 % 5, np.full(N_LAYERS, 5)
)

keys = st.tuples(st.integers(0, N_LAYERS - 1), st.integers(0, N_EXPERTS - 1))
unions = st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=N_EXPERTS, unique=True)


class CacheMachine(RuleBasedStateMachine):
    """As its owner uses it: slots are taken while there are some, then from a victim; pinned experts stay."""

    def __init__(self) -> None:
        super().__init__()
        self.resident: dict[ExpertKey, Resident] = {}
        self.pinned: set[ExpertKey] = set()
        self.hits = self.lookups = self.evictions = 0

    @initialize(policy=st.sampled_from(sorted(POLICIES)), mixed=st.booleans())
    def open(self, policy: str, mixed: bool) -> None:
        self.counts = SLOT_COUNTS[mixed]
        shape = CacheShape(
            n_layers=N_LAYERS,
            n_experts=N_EXPERTS,
            n_slots=sum(self.counts),
            kinds=KINDS if mixed else None,
            slot_counts=self.counts if mixed else None,
            expert_bytes=(100, 300, 200),
            profile=PROFILE,
        )
        self.cache = ExpertCache(make_policy(policy, shape))

    def kind(self, layer: int) -> int:
        return KINDS[layer][0] if len(self.counts) > 1 else 0

    def of_kind(self, kind: int) -> dict[ExpertKey, Resident]:
        return {key: resident for key, resident in self.resident.items() if self.kind(key[0]) == kind}

    @rule(layer=st.integers(0, N_LAYERS - 1), union=unions)
    def lookup(self, layer: int, union: list[int]) -> None:
        hits, misses = self.cache.lookup(layer, union)
        assert hits == [expert for expert in union if (layer, expert) in self.resident]
        assert misses == [expert for expert in union if (layer, expert) not in self.resident]
        self.hits += len(hits)
        self.lookups += len(union)

    @rule(key=keys, speculation=st.sampled_from([None, *list(Priority)[1:]]))
    def bring(self, key: ExpertKey, speculation: Priority | None) -> None:
        """Let an expert land, in a free slot or in that of a victim."""
        if key in self.resident:
            return
        kind = self.kind(key[0])
        if len(self.of_kind(kind)) == self.counts[kind] and self.give_up(key[0]) is None:
            return
        used = {resident.slot for resident in self.resident.values()}
        first = sum(self.counts[:kind])
        slot = next(slot for slot in range(first, first + self.counts[kind]) if slot not in used)
        self.resident[key] = Resident(slot, (slot, slot + 1, slot + 2), (True, True), speculation)
        self.cache.insert(key, self.resident[key])

    @rule(layer=st.integers(0, N_LAYERS - 1))
    def evict(self, layer: int) -> None:
        self.give_up(layer)

    def give_up(self, layer: int) -> ExpertKey | None:
        """Let the policy choose a victim among those that are not pinned."""
        kind = self.kind(layer)

        def evictable(key: ExpertKey) -> bool:
            assert key in self.of_kind(kind), (
                "the policy asks about an expert of another class, or one that is not there"
            )
            return key not in self.pinned

        victim = self.cache.evict_for(layer, evictable, kind=kind)
        candidates = {key: resident for key, resident in self.of_kind(kind).items() if key not in self.pinned}
        if victim is None:
            assert not candidates, "nobody was given up, though somebody could have been"
            return None
        left = [key for key, resident in candidates.items() if resident is victim]
        assert len(left) == 1, "an expert was given up that was pinned, or not there"
        del self.resident[left[0]]
        self.evictions += 1
        return left[0]

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.resident)))
        assert self.cache.drop(key) is self.resident.pop(key)
        self.pinned.discard(key)

    @precondition(lambda self: self.resident)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        self.pinned.add(data.draw(st.sampled_from(sorted(self.resident))))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.pinned.discard(data.draw(st.sampled_from(sorted(self.pinned))))

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "cache"):
            return
        for layer in range(N_LAYERS):
            for expert in range(N_EXPERTS):
                key = layer, expert
                assert (key in self.cache) == (key in self.resident)
                assert key not in self.resident or self.cache[key] is self.resident[key]
        statistics = self.cache.statistics()
        assert (statistics.hits, statistics.lookups) == (self.hits, self.lookups)
        assert statistics.misses == self.lookups - self.hits
        assert (statistics.evictions, statistics.resident) == (self.evictions, len(self.resident))
        for priority in Priority:
            unused = sum(resident.speculation is priority for resident in self.resident.values())
            assert self.cache.unused(priority) == unused
