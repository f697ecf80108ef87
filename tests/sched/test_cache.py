"""What the expert cache does with its policy; tests/sim holds it against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.io.pool import Priority
from mer.sched.cache import ExpertCache, Resident
from mer.sched.policies.layer_lru import LayerLRU


def resident(slot: int, speculation: Priority | None = None) -> Resident:
    return Resident(slot, (0, 1, 2), (True, True), speculation)


def test_an_expert_is_inserted_once() -> None:
    cache = ExpertCache(LayerLRU(1, 4))
    cache.insert((0, 3), resident(2))
    with pytest.raises(RuntimeError, match="resident already"):
        cache.insert((0, 3), resident(1))
    assert cache[0, 3].slot == 2


def test_speculation_that_nobody_has_used_is_counted_by_class() -> None:
    cache = ExpertCache(LayerLRU(1, 4))
    cache.insert((0, 0), resident(0))
    cache.insert((0, 1), resident(1, Priority.PREFETCH))
    cache.insert((0, 2), resident(2, Priority.READ_AHEAD))
    cache.insert((0, 3), resident(3, Priority.PREFETCH))
    assert (cache.unused(Priority.PREFETCH), cache.unused(Priority.READ_AHEAD)) == (2, 1)


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
                if missing and free:
                    cache.insert((layer, expert), resident(free.pop()))
                elif missing:
                    gone = cache.evict_for(layer, lambda _: True)
                    assert gone is not None
                    cache.insert((layer, expert), resident(gone.slot))
    s = cache.statistics()
    assert s.hits > s.lookups / 5
    assert s.hits + s.misses == s.lookups


def test_what_a_job_has_begun_to_read_is_looked_up_once() -> None:
    """As a miss, whether it has landed before the layer is looked up or not."""
    cache = ExpertCache(LayerLRU(1, 4))
    for landed in (False, True):
        before = cache.statistics()
        cache.insert((0, int(landed)), resident(int(landed)))
        cache.missed([(0, 2)])
        if landed:
            cache.insert((0, 2), resident(2))
        cache.lookup(0, [int(landed), 2])
        after = cache.statistics()
        assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
        assert after.lookups - before.lookups == 2
    cache.missed([(0, 3)])
    cache.insert((0, 3), resident(3))
    assert cache.lookup_all(0, [0, 3]) is not None
    s = cache.statistics()
    assert (s.lookups, s.hits, s.misses) == (6, 3, 3)
