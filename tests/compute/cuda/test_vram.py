"""The bookkeeping of the device's slots against a plain model of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.compute.cuda.sizes import STAGING_SLOTS, VRAMClasses
from mer.compute.cuda.vram import VRAMTier
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy

N_LAYERS, N_EXPERTS = 3, 6
KINDS = tuple(tuple((layer + expert) % 2 for expert in range(N_EXPERTS)) for layer in range(N_LAYERS))
CLASSES = VRAMClasses(slot_bytes=(512, 256), n_experts=(9, 9), kinds=KINDS)


def tier(policy: str, counts: tuple[int, int]) -> VRAMTier:
    shape = CacheShape(
        n_layers=N_LAYERS,
        n_experts=N_EXPERTS,
        n_slots=sum(counts),
        kinds=KINDS,
        slot_counts=counts,
        expert_bytes=(400,) * N_LAYERS,
    )
    return VRAMTier(make_policy(policy, shape), CLASSES, counts)


jobs = st.lists(
    st.tuples(
        st.integers(0, N_LAYERS - 1),
        st.sets(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=5),
        st.booleans(),  # whether what is there is held until the next job
        st.integers(0, 9).map(lambda n: n == 0),  # whether the job fails
    ),
    max_size=30,
)


@given(st.sampled_from([name for name in POLICIES if name != "static"]), st.integers(1, 9), st.integers(1, 9), jobs)
def test_every_job_finds_its_experts_where_they_are(policy: str, a: int, b: int, steps: list) -> None:
    it = tier(policy, (a, b))
    content: dict[tuple[int, int], tuple[int, int]] = {}  # (kind, slot): the expert whose bytes are there
    held: list[tuple[int, int]] = []
    for layer, experts, hold, fails in steps:
        it.routed(layer, sorted(experts))
        expected = {key for key in content.values() if it.resident(*key)}
        places = it.place(layer, sorted(experts))
        assert [place.expert for place in places] == sorted(experts)
        used = [(place.kind, place.slot) for place in places if place.kept]
        assert len(set(used)) == len(used)
        for place in places:
            key = layer, place.expert
            assert place.kind == KINDS[layer][place.expert]
            assert place.kept == (place.slot < it.counts[place.kind])
            assert place.slot < it.counts[place.kind] + STAGING_SLOTS
            assert place.arrives == (key not in expected)
            if not place.arrives:
                assert content[place.kind, place.slot] == key
            if place.kept:
                content[place.kind, place.slot] = key
        assert all(it.resident(*key) for key in held)
        if fails:
            it.forget(layer, places)
            for place in places:
                if place.arrives:
                    assert not it.resident(layer, place.expert)
                    content.pop((place.kind, place.slot), None)
        for key in held:
            it.release(*key)
        held = [(layer, e) for e in sorted(experts) if hold and it.hold(layer, e)]
        n_there = sum(it.resident(x, e) for x in range(N_LAYERS) for e in range(N_EXPERTS))
        assert it.n_resident == n_there <= a + b


def test_all_that_fit_stay() -> None:
    it = tier("lfru", (9, 9))
    assert it.complete
    for _ in range(2):
        for layer in range(N_LAYERS):
            it.routed(layer, range(N_EXPERTS))
            places = it.place(layer, range(N_EXPERTS))
            assert all(place.kept for place in places)
    assert (it.n_resident, it.evictions) == (18, 0)
    assert not any(place.arrives for place in places)


def test_what_is_not_held_cannot_be_released() -> None:
    it = tier("lfru", (1, 1))
    assert not it.hold(0, 0)
    with pytest.raises(RuntimeError, match="expert 0 of layer 0 is not held"):
        it.release(0, 0)
    with pytest.raises(KeyError):
        it.there(0, 0)
