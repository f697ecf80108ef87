"""Decisions that cost only time, where they are used: small worlds with the exact reads and jobs that they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from mer.compute.messages import RunExperts
from mer.io.priority import Priority
from mer.sched.prefetch import DiskFacts, Prefetcher
from mer.sched.store import ExpertStore
from mer.testing import DiskProfile, SimEngine, SimModel, open_sim_engine

LARGE = SimModel(n_layers=3, n_experts=4, top_k=3)  # eight rows need every expert


async def ask(sim: SimEngine, n_tokens: int) -> None:
    prompt = tuple(2 + i * i % 14 for i in range(n_tokens))
    done = await sim.engine.generate(prompt, max_tokens=1, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, 1)[0]
    await sim.check_quiet()


@pytest.mark.parametrize(("n_batches", "n_ahead"), [(1, 2), (2, 3 + 2), (3, 3 + 3 + 2)])
async def test_layers_are_read_ahead_as_far_as_prompts_are_left(
    autojump_clock: MockClock, n_batches: int, n_ahead: int
) -> None:
    """Of the last batch the last layer is the end: the first layer's experts are not read for nothing."""
    async with open_sim_engine(model=LARGE, n_slots=8, batch_tokens=12, policy="layer-lru") as sim:
        await ask(sim, 12 * n_batches)
        ahead = sim.store.speculation(Priority.READ_AHEAD)
        assert ahead.issued == ahead.used + ahead.promoted  # nothing was read for nothing
        layers = 3 * n_batches
        assert sim.cache.statistics().lookups == 4 * layers
        assert ahead.issued <= 4 * n_ahead
        assert ahead.issued >= 4 * 2  # in the first batch every expert is read ahead but those of the first layer


async def test_experts_that_have_landed_wait_for_those_that_are_being_read(autojump_clock: MockClock) -> None:
    """Computed alone each would cost a job; whoever wakes the layer, they go first only if all the rest wants slots."""
    model = SimModel(n_layers=1, n_experts=4, top_k=3)
    profile = DiskProfile(latency_s=1e-3, jitter=5.0)
    async with (
        open_sim_engine(model=model, n_slots=2, batch_tokens=12, profile=profile, worth_bytes=1 << 30) as sim,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_keep_awake, sim)
        prompt = tuple(range(2, 14))
        done = await sim.engine.generate(prompt, max_tokens=1, ignore_eos=True)
        assert done.tokens == sim.expected(prompt, 1)[0]
        nursery.cancel_scope.cancel()
        runs = [
            len(operation.experts)
            for _, job in sim.worker.log
            for operation in job.operations
            if isinstance(operation, RunExperts)
        ]
        assert runs == [2, 2]


async def _keep_awake(sim: SimEngine) -> None:
    while True:
        await trio.sleep(1e-5)
        sim.scheduler.wake()


class _Store:
    """What a prefetcher needs of a store that has one candidate, and room for it or not."""

    def __init__(self) -> None:
        self.loading, self.guessing = False, 0
        self.on_idle: object = None

    def price(self, key: tuple[int, int]) -> float:
        return 0.5


async def test_time_that_is_gone_leaves_less_for_a_guess(autojump_clock: MockClock) -> None:
    """What the disk is idle for a layer counts from the moment when it became so, not from each look."""
    store = _Store()
    facts = DiskFacts(expert_bytes=lambda key: 1000, bytes_per_s=lambda: 1e6, chunk_bytes=1000)
    prefetcher = Prefetcher("markov", cast(ExpertStore, store), facts, n_layers=2, n_experts=4, top_k=1)
    told: list[float] = []

    def select(candidates: list[Any], conditions: Any) -> list[Any]:
        told.append(candidates[0].needed_in_s)
        store.guessing = 100  # no room for a second one
        return []

    prefetcher.governor.select = select  # type: ignore[method-assign, assignment]
    for _ in range(200):  # the layers follow each other after a second, always with the same experts
        for layer in (0, 1):
            store.guessing = 0
            prefetcher.routed(layer, [layer, 2, 3], None, guess=True)
            await trio.sleep(1.0)
    store.guessing = 0
    prefetcher.routed(0, [0, 2, 3], None, guess=True)
    at_once = told[-1]
    assert at_once == pytest.approx(1.0, rel=0.05)
    await trio.sleep(0.75)
    store.guessing = 0
    prefetcher.idle()
    assert told[-1] == pytest.approx(at_once - 0.75)


def _matrices(sim: SimEngine) -> Iterator[bool]:
    for operation in sim.disk.in_flight:
        yield operation.untouched


async def test_only_the_first_read_into_a_slot_meets_memory_without_pages(autojump_clock: MockClock) -> None:
    seen: list[bool] = []
    async with open_sim_engine(model=SimModel(n_layers=1, n_experts=3, top_k=1), n_slots=1, policy="lfu") as sim:
        for token in range(2, 12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ask_one, sim, token)
                for _ in range(20):
                    await trio.sleep(2e-5)
                    seen += _matrices(sim)
        assert sim.cache.statistics().evictions > 0
    n_first = seen.index(False)
    assert n_first > 0
    assert not any(seen[n_first:])


async def _ask_one(sim: SimEngine, token: int) -> None:
    await sim.engine.generate((token,), max_tokens=1, ignore_eos=True)
