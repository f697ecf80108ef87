"""The expert store beside a worker that has experts in memory of its own."""

from __future__ import annotations

from collections import Counter

import trio
from trio.testing import MockClock

from mer.compute.messages import AWAY
from mer.sched.cache import ExpertCache
from tests.sched.test_store import EXPERTS, LAYERS, Rig, open_rig


class FakeTier:
    """Experts that are where the test says."""

    def __init__(self, *keys: tuple[int, int]) -> None:
        self.there = set(keys)
        self.holds: Counter[tuple[int, int]] = Counter()

    @property
    def full(self) -> bool:
        return len(self.there) == LAYERS * EXPERTS

    def resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self.there

    def hold(self, layer: int, expert: int) -> bool:
        if (layer, expert) in self.there:
            self.holds[layer, expert] += 1
        return (layer, expert) in self.there

    def release(self, layer: int, expert: int) -> None:
        assert self.holds[layer, expert] > 0
        self.holds[layer, expert] -= 1

    @property
    def held(self) -> set[tuple[int, int]]:
        return {key for key, n in self.holds.items() if n}


def give(rig: Rig, *keys: tuple[int, int]) -> FakeTier:
    """Let the rig's store ask a tier."""
    tier = FakeTier(*keys)
    rig.store.residents.tier = tier
    return tier


async def test_what_is_held_needs_no_slot_and_is_a_hit(autojump_clock: MockClock) -> None:
    async with open_rig(2) as rig:
        tier = give(rig, (0, 1), (0, 4))
        loaded, claims = rig.store.claims.claim(0, (1, 2, 4))
        assert [(one.expert, one.addresses) for one in loaded] == [(1, AWAY), (4, AWAY)]
        assert [claim.key for claim in claims] == [(0, 2)]
        assert tier.held == {(0, 1), (0, 4)}
        await rig.settle()
        loaded.append(rig.store.claims.take(claims[0]))
        rig.store.residents.unpin(0, loaded, used=True)
        assert tier.held == set()
        s = rig.cache.statistics()
        assert (s.lookups, s.hits, s.misses) == (3, 2, 1)
        assert rig.resident() == {(0, 2)}
        rig.check_conservation()


async def test_a_layer_whose_experts_are_in_either_place(autojump_clock: MockClock) -> None:
    async with open_rig(3) as rig:
        await rig.use(0, 0, 2)
        tier = give(rig, (0, 1))
        assert rig.store.residents.pin_all(0, (0, 1, 3)) is None
        assert tier.held == set(), "a layer that is not whole holds nothing"
        pinned = rig.store.residents.pin_all(0, (0, 1, 2))
        assert pinned is not None
        assert [one.expert for one in pinned] == [1, 0, 2]
        assert pinned[0].addresses == AWAY
        rig.check_bytes(0, list(pinned[1:]))
        assert tier.held == {(0, 1)}
        rig.store.residents.discard(0, pinned)  # a job failed on them
        assert tier.held == set()
        assert rig.resident() == set()
        rig.check_conservation()


async def test_only_what_was_rearranged_is_not_fresh_any_more(autojump_clock: MockClock) -> None:
    async with open_rig(3) as rig:
        _, claims = rig.store.claims.claim(0, (0, 1))
        await rig.settle()
        rig.store.residents.unpin(
            0, [rig.store.claims.take(claim) for claim in claims], used=True, arranged=frozenset({1})
        )
        loaded, _ = rig.store.claims.claim(0, (0, 1))
        assert [(one.expert, one.raw) for one in loaded] == [(0, (True, True)), (1, (False, False))]
        rig.store.residents.unpin(0, loaded, used=False)


async def test_what_the_tier_has_too_leaves_first(autojump_clock: MockClock) -> None:
    """The policy alone would give up the expert that was used least recently, which is the first one."""
    async with open_rig(3) as rig:
        await rig.use(0, 0)
        await rig.use(0, 1)
        await rig.use(0, 2)
        give(rig, (0, 2))
        await rig.use(0, 3)
        assert rig.resident() == {(0, 0), (0, 1), (0, 3)}


async def test_nothing_is_guessed_or_read_ahead_that_the_tier_has(autojump_clock: MockClock) -> None:
    async with open_rig(8) as rig:
        give(rig, (1, 0), (1, 3))
        rig.store.speculation.read_ahead(1, range(EXPERTS))
        await rig.settle()
        assert rig.resident() == {(1, 1), (1, 2), (1, 4)}
        assert rig.store.speculation.price((1, 0)) is None
        assert not rig.store.speculation.prefetch((1, 3), 1.0)
        assert rig.store.speculation.prefetch((2, 3), 1.0)
        await trio.sleep(100)
        assert not rig.store.residents.all_held
        give(rig, *((layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)))
        assert rig.store.residents.all_held


def test_a_policy_hears_of_a_layer_once() -> None:
    """Also of what is held, so that visits are counted once."""
    heard: list[tuple[int, list[int]]] = []

    class Listener:
        name = "listener"

        def use(self, layer: int, experts: list[int]) -> None:
            heard.append((layer, list(experts)))

    cache = ExpertCache(Listener())  # type: ignore[arg-type]
    assert cache.lookup(1, (0, 2, 4), [2]) == ([], [0, 4])
    assert cache.lookup_all(1, (2,), [2]) == []
    assert cache.lookup_all(1, (2, 3), [2]) is None
    cache.settle()
    assert heard == [(1, [0, 2, 4]), (1, [2])]
