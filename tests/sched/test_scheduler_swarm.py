"""Whole engines of simulated parts in drawn situations: all get what they would get alone, nothing is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest.mock import patch

import attrs
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.errors import ComputeError, EngineClosed, MerError, ReadError
from mer.sched.events import PrefillEvent, TokenEvent
from mer.testing.simdisk import DiskProfile
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel

FOREVER_S = 3600.0  # on the simulated clock; nothing here takes a second of it


@attrs.frozen(kw_only=True)
class Request:
    """One caller."""

    arrives_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool
    reads_every_s: float  # how long it takes over each event
    cancelled_after_s: float | None


@attrs.frozen(kw_only=True)
class World:
    """An engine, its faults, and who comes."""

    model: SimModel
    n_slots: int
    batch_tokens: int
    max_sequences: int
    max_waiting: int
    kv_blocks: int
    channel_events: int
    profile: DiskProfile
    cost: JobCost
    broken: tuple[tuple[int, int, int, int | None], ...]  # layer, expert, part, times
    failing_jobs: frozenset[int]
    requests: tuple[Request, ...]
    closed_after_s: float | None
    seed: int


@st.composite
def models(draw: st.DrawFn) -> SimModel:
    n_experts = draw(st.integers(2, 6))
    return SimModel(
        n_layers=draw(st.integers(1, 3)),
        n_experts=n_experts,
        top_k=draw(st.integers(1, min(3, n_experts))),
        seed=draw(st.integers(0, 3)),
    )


delays = st.sampled_from([0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1])

requests = st.builds(
    Request,
    arrives_s=delays,
    prompt=st.lists(st.integers(0, 15), min_size=1, max_size=20).map(tuple),
    max_tokens=st.integers(1, 12),
    ignore_eos=st.booleans(),
    reads_every_s=st.just(0.0) | delays | st.sampled_from([0.01, 0.1]),
    cancelled_after_s=st.none() | delays,
)


@st.composite
def worlds(draw: st.DrawFn, *, faults: bool) -> World:
    model = draw(models())
    batch_tokens = draw(st.integers(1, 12))
    expert = st.tuples(
        st.integers(0, model.n_layers - 1),
        st.integers(0, model.n_experts - 1),
        st.integers(0, 2),
        st.none() | st.integers(1, 3),
    )
    return World(
        model=model,
        n_slots=draw(st.integers(1, model.n_layers * model.n_experts) | st.integers(1, 3)),
        batch_tokens=batch_tokens,
        max_sequences=draw(st.integers(1, max(1, batch_tokens // 2))),
        max_waiting=draw(st.integers(1, 4)),
        kv_blocks=draw(st.integers(8, 20)),  # the longest request takes 8
        channel_events=draw(st.sampled_from([1, 2, 4, 64])),
        profile=DiskProfile(
            jitter=draw(st.sampled_from([0.0, 1.0, 30.0])),
            bytes_per_s=draw(st.sampled_from([1e6, 2e9])),
            stall_rate=draw(st.sampled_from([0.0, 0.0, 0.1])),
        ),
        cost=draw(st.sampled_from([JobCost(), JobCost(job_s=0, row_s=0, expert_s=0), JobCost(job_s=1e-3)])),
        broken=tuple(draw(st.lists(expert, max_size=2))) if faults else (),
        failing_jobs=frozenset(draw(st.sets(st.integers(0, 40), max_size=2))) if faults else frozenset(),
        requests=tuple(draw(st.lists(requests, min_size=1, max_size=7))),
        closed_after_s=draw(st.none() | delays) if faults else None,
        seed=draw(st.integers(0, 3)),
    )


@attrs.define
class Outcome:
    """What became of a request."""

    tokens: tuple[int, ...] | None = None
    cancelled: bool = False


async def ask(sim: SimEngine, request: Request, outcome: Outcome) -> None:
    """Be one caller, and check all that can be checked of what it gets."""
    await trio.sleep(request.arrives_s)
    patience_s = float("inf") if request.cancelled_after_s is None else request.cancelled_after_s
    with trio.move_on_after(patience_s) as scope:
        async with sim.engine.stream(
            request.prompt, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos
        ) as events:
            done, tokens, texts, last = 0, list[int](), "", None
            async for event in events:
                await trio.sleep(request.reads_every_s)
                assert last is None, "an event after the last one"
                if isinstance(event, PrefillEvent):
                    assert not tokens
                    assert done < event.done <= event.total == len(request.prompt)
                    done = event.done
                else:
                    assert isinstance(event, TokenEvent)
                    assert event.index == len(tokens)
                    tokens.append(event.token)
                    texts += event.text
                    last = event.completion
            assert last is not None
            assert last.tokens == tuple(tokens)
            assert last.text == texts
            assert last.usage.prompt_tokens == len(request.prompt)
            assert last.usage.completion_tokens == len(tokens)
            assert 0 <= last.timings.queue_s <= last.timings.prefill_s
            assert last.timings.decode_s >= 0
            assert (last.finish_reason == "stop") == (tokens[-1] == 1)
            outcome.tokens = last.tokens
    outcome.cancelled = scope.cancelled_caught


@asynccontextmanager
async def open_world(world: World) -> AsyncIterator[SimEngine]:
    with patch("mer.engine.CHANNEL_EVENTS", world.channel_events):
        async with open_sim_engine(
            model=world.model,
            n_slots=world.n_slots,
            batch_tokens=world.batch_tokens,
            max_sequences=world.max_sequences,
            max_waiting=world.max_waiting,
            kv_blocks=world.kv_blocks,
            context=32,
            profile=world.profile,
            cost=world.cost,
            failures=world.failing_jobs,
            seed=world.seed,
        ) as sim:
            yield sim


async def run_world(world: World) -> None:
    with trio.fail_after(FOREVER_S):
        async with open_world(world) as sim:
            outcomes = [Outcome() for _ in world.requests]
            async with trio.open_nursery() as nursery:
                for request, outcome in zip(world.requests, outcomes, strict=True):
                    nursery.start_soon(ask, sim, request, outcome)
            for request, outcome in zip(world.requests, outcomes, strict=True):
                if outcome.tokens is None:
                    assert outcome.cancelled
                    assert request.cancelled_after_s is not None
                else:
                    expected, _ = sim.expected(request.prompt, request.max_tokens, ignore_eos=request.ignore_eos)
                    assert outcome.tokens == expected
            await sim.check_quiet()
            assert sim.scheduler.statistics().failed == 0


@settings(max_examples=150, deadline=None)
@given(worlds(faults=False))
def test_every_sequence_gets_what_it_would_get_alone(world: World) -> None:
    trio.run(run_world, world, clock=MockClock(autojump_threshold=0))


async def run_faulty_world(world: World) -> None:
    with trio.fail_after(FOREVER_S):
        async with open_world(world) as sim:
            unreadable: set[tuple[int, int]] = set()  # for ever
            doubtful: set[tuple[int, int]] = set()  # some times
            for layer, expert, part, times in world.broken:
                (unreadable if times is None else doubtful).update(
                    sim.break_expert(layer, expert, part=part, times=times)
                )
            outcomes = [Outcome() for _ in world.requests]
            errors: list[MerError | None] = [None for _ in world.requests]

            async def ask_and_fail(number: int) -> None:
                try:
                    await ask(sim, world.requests[number], outcomes[number])
                except MerError as error:
                    errors[number] = error

            async def close() -> None:
                if world.closed_after_s is not None:
                    await trio.sleep(world.closed_after_s)
                    sim.engine.close()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(close)
                for number in range(len(world.requests)):
                    nursery.start_soon(ask_and_fail, number)
            for request, outcome, error in zip(world.requests, outcomes, errors, strict=True):
                expected, used = sim.expected(request.prompt, request.max_tokens, ignore_eos=request.ignore_eos)
                if outcome.tokens is not None:
                    assert error is None
                    assert outcome.tokens == expected
                    assert not used & unreadable
                elif error is None:
                    assert outcome.cancelled
                elif isinstance(error, ReadError):
                    assert used & (unreadable | doubtful)
                elif isinstance(error, EngineClosed):
                    assert world.closed_after_s is not None
                else:
                    assert isinstance(error, ComputeError)
                    assert world.failing_jobs
            await sim.check_quiet()


@settings(max_examples=150, deadline=None)
@given(worlds(faults=True))
def test_faults_end_the_sequences_they_concern_and_no_other(world: World) -> None:
    trio.run(run_faulty_world, world, clock=MockClock(autojump_threshold=0))
