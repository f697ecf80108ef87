"""A generation that is cancelled at any of its steps leaves nothing behind and disturbs nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from mer.io.pool import Priority
from mer.sched.events import TokenEvent
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.invariants import check_now, watch
from mer.testing.simdisk import DiskProfile
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel
from tests._lib.landing import gate_up_landed, landed

MODEL = SimModel(n_layers=2, n_experts=5, top_k=2)
OTHER = (9, 3, 4)
LONG = tuple(2 + i % 14 for i in range(40))


@asynccontextmanager
async def busy_engine(
    *, max_waiting: int = 8, max_sequences: int = 2, cost: JobCost | None = None
) -> AsyncIterator[SimEngine]:
    """Run an engine with few slots on an uneven disk, all invariants watched; afterwards it must still be sound."""
    with trio.fail_after(1e5):
        async with open_sim_engine(
            model=MODEL,
            n_slots=4,
            batch_tokens=4,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            profile=DiskProfile(jitter=5.0),
            cost=cost,
        ) as sim:
            with watch(lambda: check_now(sim)):
                yield sim
                await sim.check_quiet()
                await ask(sim, OTHER, 2)  # as good as new
                await sim.check_quiet()


async def ask(sim: SimEngine, prompt: tuple[int, ...], max_tokens: int) -> None:
    done = await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, max_tokens)[0]


Body = Callable[[SimEngine], Awaitable[None]]


async def generate(sim: SimEngine) -> None:
    await ask(sim, (5, 6, 7), 3)


async def prefill(sim: SimEngine) -> None:
    await ask(sim, LONG, 1)


async def stream(sim: SimEngine) -> None:
    async with sim.engine.stream((7, 8), max_tokens=3, ignore_eos=True) as events:
        async for event in events:
            await trio.sleep(1e-3)
            if isinstance(event, TokenEvent) and event.index == 1:
                return  # leaves early of its own accord


async def beside_another(subject: Subject, body: Body) -> None:
    async with busy_engine() as sim, trio.open_nursery() as nursery:
        nursery.start_soon(ask, sim, OTHER, 4)
        finished = await subject.run(lambda: body(sim))
        assert finished or subject.fired


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("body", "least"), [(generate, 4), (prefill, 10), (stream, 5)])
def test_beside_another(body: Body, least: int, seed: int) -> None:
    assert cancel_at_every_step(lambda subject: beside_another(subject, body), seed=seed) >= least


async def alone(subject: Subject) -> None:
    """Generate so that experts land while others are computed."""
    async with busy_engine(cost=JobCost(job_s=2e-4)) as sim:
        await subject.run(lambda: ask(sim, (5, 6, 7, 8, 9), 1))


@pytest.mark.slow
def test_alone_after_every_step_of_any_task() -> None:
    assert cancel_at_every_step(alone, any_task=True, seed=1) >= 50  # test_testers.py has seed 0


def test_while_tokens_are_drawn_after_every_step_of_any_task() -> None:
    async def scenario(subject: Subject) -> None:
        with trio.fail_after(1e5):
            model = SimModel(n_layers=1, n_experts=2, top_k=1)
            async with open_sim_engine(model=model, draws_in_thread=True) as sim:
                with watch(lambda: check_now(sim)):
                    await subject.run(lambda: ask(sim, (5, 6), 2))
                    await sim.check_quiet()

    assert cancel_at_every_step(scenario, any_task=True, seed=1) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_in_front_of_a_full_queue(seed: int) -> None:
    async def scenario(subject: Subject) -> None:
        async with busy_engine(max_waiting=1, max_sequences=1) as sim, trio.open_nursery() as nursery:
            for _ in range(3):  # one runs, one is queued, one waits to be queued
                nursery.start_soon(ask, sim, OTHER, 2)
            await trio.sleep(1e-5)
            nursery.start_soon(ask, sim, (8, 8), 2)
            await subject.run(lambda: generate(sim))

    assert cancel_at_every_step(scenario, seed=seed) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_while_an_expert_is_fetched(seed: int) -> None:
    async def scenario(subject: Subject) -> None:
        with trio.fail_after(1e5):
            async with open_sim_engine(model=MODEL, profile=DiskProfile(jitter=5.0)) as sim:
                ticket = sim.store.residents.ticket((1, 2), Priority.DEMAND, lambda _: None)
                sim.pool.request(ticket)
                slot = ticket.slot
                assert slot is not None
                fetches = []

                async def body() -> None:
                    fetch = sim.fetcher.start(1, 2, slot, listener=sim.store.claims)
                    fetches.append(fetch)
                    await gate_up_landed(fetch)
                    await landed(fetch)

                await subject.run(body)
                await sim.settle()
                pool = sim.pool.statistics()
                if fetches:  # it goes on
                    assert fetches[0].done
                    assert (1, 2) in sim.cache
                    assert (pool.ready, pool.filling, pool.quarantined) == (1, 0, 0)
                else:
                    assert (pool.ready, pool.filling, pool.quarantined) == (0, 1, 0)

    assert cancel_at_every_step(scenario, seed=seed) >= 3
