"""Sequences whose readers are behind give their places and KV blocks up to others, and go on as if nothing had been."""

from __future__ import annotations

from contextlib import AsyncExitStack
from unittest.mock import patch

import pytest
import trio
from trio.testing import MockClock

from mer.config import Sampling
from mer.engine import TokenStream
from mer.errors import EngineClosed, ReadError
from mer.sched.events import Completion, Event, PrefillEvent, TokenEvent
from mer.sched.sequence import CHANNEL_EVENTS
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel

N_BLOCKS = 40  # of 4 positions
LONG = 150  # tokens that take nearly all of them
SLOW = JobCost(job_s=1)  # so that batches are begun and ended while others do things


async def read(events: TokenStream, n: int | None = None) -> list[Event]:
    """Receive the next `n` events, or all."""
    if n is None:
        return [event async for event in events]
    return [await events.receive() for _ in range(n)]


async def generate(sim: SimEngine, prompt: tuple[int, ...], max_tokens: int = 4) -> Completion:
    """Generate and compare, and take no longer than a while."""
    with trio.fail_after(10_000):
        done = await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, max_tokens)[0]
    return done


def check(events: list[Event], prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    """Assert that these are all the events of a generation, each of them once."""
    progress = [event.done for event in events if isinstance(event, PrefillEvent)]
    drawn = [event for event in events if isinstance(event, TokenEvent)]
    assert events[: len(progress)] == [PrefillEvent(done=done, total=len(prompt)) for done in progress]
    assert progress == sorted(set(progress))
    assert progress[-1] == len(prompt)
    assert [event.index for event in drawn] == list(range(len(tokens)))
    assert tuple(event.token for event in drawn) == tokens
    assert [event for event in drawn if event.completion is not None] == drawn[-1:]
    done = drawn[-1].completion
    assert done is not None
    assert done.tokens == tokens
    assert done.text == "".join(event.text for event in drawn)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), len(tokens))
    assert 0 <= done.timings.queue_s <= done.timings.prefill_s


# --- nobody waits for ever ---


@pytest.mark.parametrize("places", [1, 4])
async def test_one_unread_stream_does_not_hold_up_another_request(autojump_clock: MockClock, places: int) -> None:
    async with open_sim_engine(
        context=160, kv_blocks=N_BLOCKS, max_sequences=places, prefix_reuse=False
    ) as sim:  # so that all is computed again
        async with sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as events:
            first = await read(events, 2)
            await generate(sim, (6, 7), 50)
            statistics = sim.scheduler.statistics()
            assert (statistics.running, statistics.paused, statistics.preemptions) == (0, 1, 1)
            assert sim.kv.statistics().available == N_BLOCKS
            check(first + await read(events), (4, 5), sim.expected((4, 5), LONG)[0])
        await sim.check_quiet()
        statistics = sim.scheduler.statistics()
        assert (statistics.preemptions, statistics.finished) == (1, 2)
        assert (statistics.prompt_tokens, statistics.completion_tokens) == (4, LONG + 50)
        computed_again = 2 + CHANNEL_EVENTS + 1  # the prompt and the tokens that were sent, read or not
        rows_for_tokens = (LONG - 1 - 1) + (50 - 1)  # those that no row of a prompt gives
        assert sim.worker.statistics().tokens == 4 + rows_for_tokens + computed_again


async def test_any_number_of_unread_streams_lets_others_through(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=2) as sim:
        prompts = [(3 + number,) for number in range(6)]
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(sim.engine.stream(prompt, max_tokens=70, ignore_eos=True))
                for prompt in prompts
            ]
            await generate(sim, (2, 2), 100)
            assert sim.scheduler.statistics().paused == 6
            for prompt, events in zip(reversed(prompts), reversed(streams), strict=True):
                with trio.fail_after(100):
                    check(await read(events), prompt, sim.expected(prompt, 70)[0])
        await sim.check_quiet()
        assert sim.scheduler.statistics().preemptions == 6


async def test_who_is_behind_keeps_all_it_has_while_nobody_needs_it(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS) as sim:
        async with sim.engine.stream((4, 5), max_tokens=100, ignore_eos=True):
            await trio.sleep(10)
            await generate(sim, (6, 7), 20)  # fits beside it
            assert (sim.scheduler.statistics().running, sim.scheduler.statistics().preemptions) == (1, 0)
        await sim.check_quiet()


async def test_none_is_preempted_in_vain(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, cost=SLOW) as sim:
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            lazy = await enter(sim.engine.stream((4,), max_tokens=66, ignore_eos=True))  # 17 blocks
            await trio.sleep(1000)
            busy = await enter(sim.engine.stream((5,), max_tokens=80, ignore_eos=True))  # 21 blocks
            await read(busy, 30)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate, sim, (6, 7), LONG)  # 38 blocks: those of both
                await trio.sleep(50)
                statistics = sim.scheduler.statistics()
                assert (statistics.running, statistics.waiting, statistics.preemptions) == (2, 1, 0)
                await read(busy)  # now those of `lazy` are enough
            assert sim.scheduler.statistics().preemptions == 1
            check(await read(lazy), (4,), sim.expected((4,), 66)[0])
        await sim.check_quiet()


async def test_the_last_admitted_is_preempted_first(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=2) as sim:
        async with AsyncExitStack() as stack:
            for number in range(2):
                await stack.enter_async_context(
                    sim.engine.stream((4 + number,), max_tokens=66 + 4 * number, ignore_eos=True)
                )
                await trio.sleep(10)
            assert sim.kv.statistics().available == N_BLOCKS - 17 - 18
            await generate(sim, (9,), 3)
            assert sim.kv.statistics().available == N_BLOCKS - 17
        await sim.check_quiet()


# --- the order of those that come back ---


async def test_those_that_come_back_go_before_newcomers_in_order(autojump_clock: MockClock) -> None:
    async with open_sim_engine(
        context=160, kv_blocks=N_BLOCKS, max_sequences=1, cost=SLOW, prefix_reuse=False
    ) as sim:  # so that each begins at position 0
        async with AsyncExitStack() as stack:
            streams = []
            for number in range(3):
                stream = sim.engine.stream((4 + number,), max_tokens=78, ignore_eos=True)
                streams.append(await stack.enter_async_context(stream))
            await generate(sim, (7, 7))
            assert sim.scheduler.statistics().paused == 3
            heads: dict[int, list[Event]] = {}
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate, sim, (8, 8), 60)  # has the place while the others come
                await trio.sleep(20)
                nursery.start_soon(generate, sim, (9,), 2)
                for number in (2, 0, 1):
                    heads[number] = await read(streams[number], CHANNEL_EVENTS // 2)
                    await trio.sleep(20)
                statistics = sim.scheduler.statistics()
                assert (statistics.running, statistics.waiting, statistics.paused) == (1, 4, 0)
                before = len(sim.worker.batches)
            begun = [int(b.tokens[0]) for b in sim.worker.batches[before:] if b.positions[0] == 0]
            assert begun == [6, 4, 5, 9]
            assert sim.scheduler.statistics().preemptions == 3
            for number, events in enumerate(streams):
                check(heads[number] + await read(events), (4 + number,), sim.expected((4 + number,), 78)[0])
        await sim.check_quiet()


async def test_a_preempted_sequence_comes_back_when_half_its_events_are_read(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=1) as sim:
        async with sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as events:
            await trio.sleep(10)
            await generate(sim, (6, 7))
            await read(events, CHANNEL_EVENTS // 2 - 1)
            await trio.sleep(10)
            assert (sim.scheduler.statistics().running, sim.scheduler.statistics().paused) == (0, 1)
            before = sim.scheduler.statistics().completion_tokens
            await read(events, 1)
            await trio.sleep(10)
            statistics = sim.scheduler.statistics()
            assert (statistics.running, statistics.paused) == (1, 0)
            assert statistics.completion_tokens - before == CHANNEL_EVENTS // 2
        await sim.check_quiet()


async def test_two_that_preempt_each_other_both_get_on(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=1) as sim:
        async with (
            sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as one,
            sim.engine.stream((6,), max_tokens=LONG, ignore_eos=True) as other,
        ):
            received: tuple[list[Event], list[Event]] = ([], [])
            with trio.fail_after(10_000):
                await trio.sleep(10)
                for _ in range(LONG + 1):
                    received[0].append(await one.receive())
                    received[1].append(await other.receive())
                    await trio.sleep(1)
            check(received[0], (4, 5), sim.expected((4, 5), LONG)[0])
            check(received[1], (6,), sim.expected((6,), LONG)[0])
        await sim.check_quiet()
        half = CHANNEL_EVENTS // 2  # the least that a turn gives, but for the last
        assert 3 <= sim.scheduler.statistics().preemptions <= 2 * (1 + (LONG - CHANNEL_EVENTS) // half)


# --- the tokens ---


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=4.0, seed=7), Sampling(temperature=9.0, top_p=0.9)])
@pytest.mark.parametrize("channel", [1, 5])
@pytest.mark.parametrize("batch_tokens", [1, 3, 64])
async def test_preemption_at_every_token_changes_none(
    autojump_clock: MockClock, sampling: Sampling | None, channel: int, batch_tokens: int
) -> None:
    prompt, n = (5, 6, 7, 8, 9), 25
    with patch("mer.engine.CHANNEL_EVENTS", channel):
        async with open_sim_engine(kv_blocks=16, max_sequences=1, batch_tokens=batch_tokens) as sim:
            async with sim.engine.stream(prompt, max_tokens=n, ignore_eos=True, sampling=sampling) as events:
                received: list[Event] = []
                while not received or not isinstance(received[-1], TokenEvent) or received[-1].completion is None:
                    with trio.fail_after(100):
                        received.append(await events.receive())
                        await generate(sim, (3, 3), 2)
            preemptions = sim.scheduler.statistics().preemptions
            assert preemptions >= n // channel - 2
            done = received[-1].completion
            assert done is not None
            drawn = [event for event in received if isinstance(event, TokenEvent)]
            assert tuple(event.token for event in drawn) == done.tokens
            assert len(done.tokens) == n
            # the same seed alone, undisturbed
            seeded = (
                None
                if sampling is None
                else Sampling(temperature=sampling.temperature, top_p=sampling.top_p, seed=done.seed)
            )
            alone = await sim.engine.generate(prompt, max_tokens=n, ignore_eos=True, sampling=seeded)
            assert sim.scheduler.statistics().preemptions == preemptions
            assert done.tokens == alone.tokens
            assert done.text == alone.text
            if sampling is None:
                assert done.tokens == sim.expected(prompt, n)[0]
            await sim.check_quiet()


# --- cancellation, failures and the end ---


@pytest.mark.parametrize("where", ["paused", "in line", "computing again"])
async def test_leaving_a_preempted_stream_leaves_nothing(autojump_clock: MockClock, where: str) -> None:
    async with open_sim_engine(
        context=160, kv_blocks=N_BLOCKS, max_sequences=1, cost=SLOW, prefix_reuse=False
    ) as sim:  # so that all is computed again
        async with trio.open_nursery() as nursery:
            async with sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as events:
                await generate(sim, (6, 7))
                if where == "in line":
                    nursery.start_soon(generate, sim, (6, 7), 60)
                    await trio.sleep(20)
                if where != "paused":
                    await read(events, CHANNEL_EVENTS)
                    await trio.sleep(20)
                statistics = sim.scheduler.statistics()
                states = {"paused": (0, 0, 1), "in line": (1, 1, 0), "computing again": (1, 0, 0)}
                assert (statistics.running, statistics.waiting, statistics.paused) == states[where]
                assert len(sim.worker.batches[-1].tokens) == (8 if where == "computing again" else 1)
            statistics = sim.scheduler.statistics()
            assert statistics.paused == statistics.waiting == 0
            assert statistics.cancelled == (where != "computing again")  # there, when its job has ended
            await generate(sim, (7,), LONG)
        await sim.check_quiet()
        statistics = sim.scheduler.statistics()
        assert (statistics.cancelled, statistics.preemptions) == (1, 1)


def test_cancelling_at_any_step_while_others_come_and_go_leaves_nothing_behind() -> None:
    async def scenario(subject: Subject) -> None:
        with patch("mer.engine.CHANNEL_EVENTS", 2):
            async with open_sim_engine(model=SimModel(n_layers=1), max_sequences=1) as sim:

                async def body() -> None:
                    async with sim.engine.stream((5, 6), max_tokens=5, ignore_eos=True) as events:
                        for _ in range(3):
                            await events.receive()
                            await generate(sim, (7,), 1)

                with trio.fail_after(3600):
                    await subject.run(body)
                    await generate(sim, (7,), 2)
                    await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 10


async def test_a_read_that_fails_while_computing_again_fails_the_stream_alone(autojump_clock: MockClock) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=1, n_slots=2) as sim:
        async with sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as events:
            await generate(sim, (6, 7))
            for layer in range(sim.model.n_layers):
                for expert in range(sim.model.n_experts):
                    sim.break_expert(layer, expert)
            assert len(await read(events, CHANNEL_EVENTS)) == CHANNEL_EVENTS
            with pytest.raises(ReadError):
                await events.receive()
        await sim.check_quiet()
        statistics = sim.scheduler.statistics()
        assert (statistics.failed, statistics.finished, statistics.preemptions) == (1, 1, 1)


@pytest.mark.parametrize("in_line", [False, True])
async def test_closing_fails_those_that_are_preempted(autojump_clock: MockClock, *, in_line: bool) -> None:
    async with open_sim_engine(context=160, kv_blocks=N_BLOCKS, max_sequences=1, cost=SLOW) as sim:
        async with (
            sim.engine.stream((4, 5), max_tokens=LONG, ignore_eos=True) as events,
            sim.engine.stream((6, 7), max_tokens=60, ignore_eos=True) as busy,
        ):
            await read(busy, 5)
            if in_line:
                await read(events, CHANNEL_EVENTS // 2)
                await trio.sleep(20)
            statistics = sim.scheduler.statistics()
            assert (statistics.running, statistics.waiting, statistics.paused) == (1, in_line, not in_line)
            sim.engine.close()
            for stream in (events, busy):
                with trio.fail_after(1), pytest.raises(EngineClosed):
                    await read(stream)
        await sim.check_quiet()
        assert sim.scheduler.statistics().failed == 2
