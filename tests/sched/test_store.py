"""Claims, read-ahead and prefetches of the expert store, on a simulated disk, without a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.compute.messages import LoadedExpert, Stage
from mer.errors import ReadError
from mer.io.arena import Arena
from mer.io.extents import ExpertMap
from mer.io.fetcher import Fetcher
from mer.io.pool import BufferPool, Priority, SlotState
from mer.sched.batch import share_rows
from mer.sched.cache import ExpertCache
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.store import ExpertStore
from mer.sched.traffic import Claim
from mer.testing.simdisk import DiskProfile, SimDisk, open_sim_disk
from mer.testing.simengine import make_experts
from mer.testing.simworker import SimModel

LAYERS, EXPERTS = 3, 5
AHEAD, PREFETCH = Priority.READ_AHEAD, Priority.PREFETCH


@attrs.define(eq=False)
class Rig:
    """A store and all below it."""

    store: ExpertStore
    pool: BufferPool
    cache: ExpertCache
    fetcher: Fetcher
    disk: SimDisk
    experts: ExpertMap
    arena: Arena

    async def settle(self) -> None:
        """Wait longer than any read takes, its retries included."""
        await trio.sleep(100)

    def resident(self) -> set[tuple[int, int]]:
        return {(layer, e) for layer in range(LAYERS) for e in range(EXPERTS) if (layer, e) in self.cache}

    def slot_states(self) -> dict[tuple[int, int], SlotState]:
        return {key: self.pool.state(self.cache[key].slot) for key in self.resident()}

    async def use(self, layer: int, *experts: int) -> list[Claim]:
        """Claim, wait, and let go, as a layer does."""
        loaded, claims = self.store.claims.claim(layer, experts)
        await self.settle()
        loaded += [self.store.claims.take(claim) for claim in claims if claim.landed]
        self.store.claims.give_up(claims)
        self.check_bytes(layer, loaded)
        self.store.residents.unpin(layer, loaded, used=False)
        return claims

    def check_bytes(self, layer: int, loaded: list[LoadedExpert]) -> None:
        for one in loaded:
            for part, address in zip(self.experts.experts[layer][one.expert].parts, one.addresses, strict=True):
                want = self.disk.content(part.file, part.offset, part.n_bytes)
                slot = max(s for s in range(self.pool.n_slots) if self.arena.address(s) <= address)
                begin = address - self.arena.address(slot)
                assert (self.arena.view(slot)[begin : begin + part.n_bytes] == want).all()

    def check_conservation(self) -> None:
        """I5 and I22."""
        s = self.pool.statistics()
        assert s.free + s.filling + s.ready + s.pinned + s.quarantined == s.n_slots
        assert s.ready + s.pinned == self.cache.statistics().resident
        assert len({self.cache[key].slot for key in self.resident()}) == len(self.resident())
        for priority in (AHEAD, PREFETCH):
            guesses = self.store.speculation.statistics(priority)
            assert guesses.issued == sum(attrs.astuple(guesses)) - guesses.issued


@asynccontextmanager
async def open_rig(n_slots: int, *, reserve: int = 1, profile: DiskProfile | None = None) -> AsyncIterator[Rig]:
    experts, sizes = make_experts(SimModel(n_layers=LAYERS, n_experts=EXPERTS), 1)
    classes = experts.slot_classes(4096)
    async with open_sim_disk(sizes, seed=1, profile=profile) as disk:
        arena = Arena((n_slots,), classes.slot_bytes)
        pool = BufferPool((n_slots,), reserve=reserve)
        cache = ExpertCache(LayerLRU(LAYERS, n_slots))
        fetcher = Fetcher(pool, arena, classes, experts, disk)
        store = ExpertStore(cache, pool, fetcher, classes.kind_of)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetcher.run)
            yield Rig(store, pool, cache, fetcher, disk, experts, arena)
            nursery.cancel_scope.cancel()
        arena.close()


def counts(rig: Rig, priority: Priority) -> dict[str, int]:
    """What is not zero."""
    return {name: n for name, n in attrs.asdict(rig.store.speculation.statistics(priority)).items() if n}


async def test_all_misses_start_at_once_and_land_pinned(autojump_clock: MockClock) -> None:
    async with open_rig(4) as rig:
        loaded, claims = rig.store.claims.claim(0, (3, 1, 4))
        assert loaded == []
        assert [claim.key for claim in claims] == [(0, 3), (0, 1), (0, 4)]
        assert rig.fetcher.statistics().in_flight == 3
        await rig.settle()
        assert all(claim.landed for claim in claims)
        assert set(rig.slot_states().values()) == {SlotState.PINNED}
        rig.store.claims.give_up(claims)
        assert set(rig.slot_states().values()) == {SlotState.READY}
        loaded, claims = rig.store.claims.claim(0, (1, 3))
        assert [one.expert for one in loaded] == [1, 3]
        assert claims == []
        rig.check_bytes(0, loaded)


async def test_a_claim_that_waits_gets_the_slot_that_is_let_go(autojump_clock: MockClock) -> None:
    async with open_rig(2) as rig:
        _, claims = rig.store.claims.claim(0, (0, 1, 2))
        await rig.settle()
        assert [claim.landed for claim in claims] == [True, True, False]
        rig.store.residents.unpin(0, [rig.store.claims.take(claims[0])], used=True)
        assert claims[2].fetch is not None
        await rig.settle()
        assert claims[2].landed
        assert (0, 0) not in rig.cache
        rig.store.claims.give_up(claims)
        rig.check_conservation()


async def test_what_was_given_up_lands_all_the_same(autojump_clock: MockClock) -> None:
    async with open_rig(2) as rig:
        _, claims = rig.store.claims.claim(1, (0, 1, 2, 3))
        rig.store.claims.give_up(claims)
        assert rig.pool.statistics().waiting == (0, 0, 0)
        await rig.settle()
        assert rig.resident() == {(1, 0), (1, 1)}
        assert set(rig.slot_states().values()) == {SlotState.READY}
        rig.check_conservation()


async def test_read_ahead_becomes_demand_when_the_layer_comes(autojump_clock: MockClock) -> None:
    async with open_rig(8, reserve=2) as rig:
        rig.store.speculation.read_ahead(1, range(EXPERTS))
        await rig.settle()
        assert counts(rig, AHEAD) == {"issued": 5, "resident_unused": 5}
        rig.store.claims.claim(1, (0, 1))
        assert counts(rig, AHEAD) == {"issued": 5, "used": 2, "resident_unused": 3}
        rig.disk.freeze()
        rig.store.speculation.read_ahead(2, range(EXPERTS))  # three free slots and three READY ones, less the reserve
        assert counts(rig, AHEAD) == {"issued": 9, "used": 2, "evicted_unused": 1, "in_flight": 4, "resident_unused": 2}
        assert rig.pool.statistics().waiting == (0, 1, 0)
        started = rig.fetcher.statistics().started
        _, claims = rig.store.claims.claim(2, (0, 3))
        assert counts(rig, AHEAD)["promoted"] == 2
        assert rig.pool.statistics().waiting == (0, 0, 0), "what the layer does not need is still in line"
        assert all(claim.fetch is not None and claim.fetch.priority is Priority.DEMAND for claim in claims)
        rig.disk.thaw()
        await rig.settle()
        assert all(claim.landed for claim in claims)
        assert rig.fetcher.statistics().started == started, "an expert was read twice"
        rig.check_conservation()


async def test_speculation_takes_nothing_that_is_read_ahead_but_demand_does_if_it_must(
    autojump_clock: MockClock,
) -> None:
    async with open_rig(3) as rig:
        rig.store.speculation.read_ahead(1, (0, 1))
        await rig.settle()
        await rig.use(0, 0)
        rig.store.speculation.read_ahead(1, (0, 1))
        assert rig.store.speculation.prefetch((2, 0), 1.0)  # takes the slot of (0, 0)
        await rig.settle()
        rig.store.speculation.read_ahead(1, (0, 1))
        assert rig.resident() == {(1, 0), (1, 1), (2, 0)}
        assert rig.store.speculation.prefetch((2, 1), 1.0)
        await rig.settle()
        assert rig.resident() == {(1, 0), (1, 1), (2, 1)}
        _, claims = rig.store.claims.claim(0, (2, 3, 4))
        assert all(claim.fetch is not None for claim in claims), "demand waits for what was read ahead"
        rig.check_conservation()


async def test_prefetches_are_used_promoted_or_cancelled(autojump_clock: MockClock) -> None:
    async with open_rig(6) as rig:
        assert rig.store.speculation.prefetch((1, 0), 1.0)
        assert not rig.store.speculation.prefetch((1, 0), 1.0), "it is on its way"
        await rig.settle()
        assert not rig.store.speculation.prefetch((1, 0), 1.0), "it is there"
        rig.disk.freeze()
        assert rig.store.speculation.prefetch((1, 1), 1.0)
        assert rig.store.speculation.prefetch((1, 2), 1.0)
        loaded, claims = rig.store.claims.claim(1, (0, 1))
        assert [one.expert for one in loaded] == [0]
        rig.disk.thaw()
        await rig.settle()
        assert claims[0].landed
        assert counts(rig, PREFETCH) == {"issued": 3, "used": 1, "promoted": 1, "cancelled": 1}
        assert rig.resident() == {(1, 0), (1, 1)}
        rig.check_conservation()


async def test_a_failed_read_fails_its_claim_and_counts_as_a_failed_guess_otherwise(autojump_clock: MockClock) -> None:
    async with open_rig(6) as rig:
        rig.disk.fail(0, 0, 1 << 40)
        rig.disk.fail(1, 0, 1 << 40)
        assert rig.store.speculation.prefetch((0, 0), 1.0)
        await rig.settle()
        assert counts(rig, PREFETCH) == {"issued": 1, "failed": 1}
        claims = await rig.use(0, 0, 1)
        assert all(isinstance(claim.error, ReadError) for claim in claims)
        assert rig.store.claims.loading == 0
        assert rig.pool.statistics().free == 6


async def test_gate_and_up_are_arranged_once_whoever_asked_for_them(autojump_clock: MockClock) -> None:
    async with open_rig(6, profile=DiskProfile(bytes_per_s=1e5)) as rig:  # so slow that the down matrix comes later
        _, (claim,) = rig.store.claims.claim(0, (2,))
        claim.staged = True
        while not rig.store.claims.inner_ready(claim):
            await rig.store.waiting.wait_for_change()
        assert not claim.landed
        inner = rig.store.claims.begin_inner(claim)
        assert (inner.stage, inner.raw) == (Stage.INNER, (True, True))
        rig.store.claims.end_inner(claim, done=True)
        rig.store.claims.give_up([claim])
        _, (again,) = rig.store.claims.claim(0, (2,))
        assert rig.store.claims.begin_inner(again).raw == (False, True)
        await rig.settle()  # it lands during the job
        rig.store.claims.end_inner(again, done=True)
        assert rig.store.claims.take(again) == LoadedExpert(2, rig.cache[0, 2].addresses, (False, True), Stage.OUTER)


@pytest.mark.parametrize("lands_first", [False, True])
async def test_bytes_that_a_failed_job_may_have_half_arranged_are_read_again(
    autojump_clock: MockClock, *, lands_first: bool
) -> None:
    async with open_rig(6, profile=DiskProfile(bytes_per_s=1e5)) as rig:
        _, (claim,) = rig.store.claims.claim(0, (2,))
        claim.staged = True
        while not rig.store.claims.inner_ready(claim):
            await rig.store.waiting.wait_for_change()
        rig.store.claims.begin_inner(claim)
        if lands_first:
            await rig.settle()
        rig.store.claims.end_inner(claim, done=False)
        rig.store.claims.give_up([claim])
        _, (again,) = rig.store.claims.claim(0, (2,))
        assert not rig.store.claims.inner_ready(again)
        await rig.settle()
        assert again.landed
        assert rig.cache[0, 2].raw == (True, True)
        assert rig.fetcher.statistics().started == 2
        rig.check_bytes(0, [rig.store.claims.take(again)])


@pytest.mark.parametrize(("n_slots", "landed"), [(6, 3), (2, 2)])
async def test_whoever_waits_for_much_is_woken_when_nothing_more_can_land(
    autojump_clock: MockClock, n_slots: int, landed: int
) -> None:
    """With slots for all of them, and with one that waits for a slot that the layer itself holds."""
    async with open_rig(n_slots) as rig:
        _, claims = rig.store.claims.claim(0, (0, 1, 2))
        await rig.store.waiting.wait_for_change(1 << 40)
        assert sum(claim.landed for claim in claims) == landed
        rig.store.claims.give_up(claims)


async def test_whoever_waits_for_little_is_woken_by_the_first(autojump_clock: MockClock) -> None:
    async with open_rig(6, profile=DiskProfile(bytes_per_s=1e5)) as rig:
        _, claims = rig.store.claims.claim(0, (0, 1, 2))
        await rig.store.waiting.wait_for_change(1)
        assert sum(claim.landed for claim in claims) == 1
        rig.store.claims.give_up(claims)


# --- anything at all ---

keys = st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))
unions = st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True)
ops = st.one_of(
    st.tuples(st.just("layer"), st.integers(0, LAYERS - 1), unions, st.booleans()),
    st.tuples(st.just("ahead"), st.integers(0, LAYERS - 1), unions, st.none()),
    st.tuples(st.just("prefetch"), keys, st.none(), st.none()),
    st.tuples(st.just("wait"), st.floats(0, 0.01), st.none(), st.none()),
)


@settings(deadline=None)
@given(
    n_slots=st.integers(1, 9),
    reserve=st.integers(1, 3),
    error_rate=st.sampled_from([0.0, 0.0, 0.2]),
    program=st.lists(ops, max_size=15),
)
def test_every_layer_gets_its_experts_and_nothing_is_lost(
    n_slots: int, reserve: int, error_rate: float, program: list[tuple]
) -> None:
    async def run_layer(rig: Rig, layer: int, union: list[int], gives_up: bool) -> None:
        """Do as LayerRun does: take what has landed, let it go, and wait for the rest."""
        loaded, claims = rig.store.claims.claim(layer, union)
        seen = {one.expert for one in loaded}
        while claims and not gives_up:
            for claim in [c for c in claims if c.landed]:
                loaded.append(rig.store.claims.take(claim))
                seen.add(claim.key[1])
            rig.store.claims.give_up([c for c in claims if c.error is not None])
            seen |= {c.key[1] for c in claims if c.error is not None}
            claims = [c for c in claims if not c.landed and c.error is None]
            rig.check_bytes(layer, loaded)
            rig.store.residents.unpin(layer, loaded, used=False)
            loaded = []
            if claims:
                with trio.fail_after(1000):
                    await rig.store.waiting.wait_for_change()
            rig.check_conservation()
        rig.store.claims.give_up(claims)
        rig.store.residents.unpin(layer, loaded, used=False)
        assert gives_up or seen == set(union)

    async def main() -> None:
        profile = DiskProfile(bytes_per_s=1e6, error_rate=error_rate)
        async with open_rig(n_slots, reserve=reserve, profile=profile) as rig:
            for name, a, b, c in program:
                if name == "layer":
                    await run_layer(rig, a, b, c)
                elif name == "ahead":
                    rig.store.speculation.read_ahead(a, b)
                elif name == "prefetch":
                    rig.store.speculation.prefetch(a, 1.0)
                else:
                    await trio.sleep(a)
                rig.check_conservation()
            rig.store.speculation.drop_ahead()
            await rig.settle()
            s = rig.pool.statistics()
            assert (s.filling, s.pinned, s.quarantined, sum(s.waiting)) == (0, 0, 0, 0)
            assert rig.store.claims.loading == 0
            rig.check_conservation()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@given(budget=st.integers(1, 50), needs=st.lists(st.integers(1, 60), max_size=12))
def test_rows_are_shared_fairly(budget: int, needs: list[int]) -> None:
    shares = share_rows(budget, needs)
    assert sum(shares) == min(budget, sum(needs)), "rows are left over, or handed out twice"
    assert all(0 <= share <= need for share, need in zip(shares, needs, strict=True))
    for share, need in zip(shares, needs, strict=True):
        if share < need:  # nobody that is cut short gets less than another, but for a row that does not divide
            assert all(other <= share + 1 for other in shares)


async def test_nothing_leaves_for_a_guess_while_the_worker_may_use_any_expert(autojump_clock: MockClock) -> None:
    async with open_rig(3) as rig:
        await rig.use(0, 0, 1)
        rig.store.residents.keeps_all = True
        assert rig.store.speculation.price((1, 4)) == 0.0  # there is a free slot
        await rig.use(0, 2)
        assert rig.store.speculation.price((1, 4)) is None
        assert not rig.store.speculation.prefetch((1, 4), 0.99)
        assert counts(rig, PREFETCH) == {}
        rig.store.residents.keeps_all = False
        assert rig.store.speculation.price((1, 4)) is not None
        rig.check_conservation()


async def test_a_guess_that_is_forgotten_before_its_use_was_in_vain(autojump_clock: MockClock) -> None:
    async with open_rig(4) as rig:
        await rig.use(0, 0)
        assert rig.store.speculation.prefetch((0, 1), 0.99)
        await rig.settle()
        loaded, _ = rig.store.claims.claim(1, (0,))
        await rig.settle()
        assert rig.store.residents.forget(0, (0, 1, 2)) == 2
        assert rig.store.residents.forget(1, (0,)) == 0, "it is pinned"
        assert rig.resident() == {(1, 0)}
        assert counts(rig, PREFETCH) == {"issued": 1, "evicted_unused": 1}
        rig.check_conservation()
        assert loaded == []
