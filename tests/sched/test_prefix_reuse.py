"""Shared prompt prefixes are computed once, by whoever comes first, and nobody can tell from the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import attrs
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.errors import ComputeError, MerError, NumericsError
from mer.sched.events import Completion, PrefillEvent, TokenEvent
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel

BLOCK = 4  # SimWorker.block_tokens
SLOW = JobCost(job_s=1)  # so that others come while a batch runs
LONG = tuple(2 + i * i % 14 for i in range(22))


def known(sim: SimEngine, tokens: Sequence[int]) -> int:
    """Return for how many leading tokens the engine has shareable blocks."""
    return BLOCK * len(sim.kv.find(lambda first, last: tokens[first:last], len(tokens)))


async def generate(sim: SimEngine, prompt: tuple[int, ...], max_tokens: int = 4) -> Completion:
    """Generate and compare."""
    done = await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, max_tokens)[0]
    assert done.usage.prompt_tokens == len(prompt)
    return done


async def fail(sim: SimEngine, prompt: tuple[int, ...], kind: type[MerError]) -> None:
    with pytest.raises(kind):
        await sim.engine.generate(prompt, max_tokens=4, ignore_eos=True)


# --- what is reused ---


@pytest.mark.parametrize(("n_prompt", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (22, 20)])
async def test_a_prompt_that_comes_again_is_computed_from_its_last_whole_block(
    autojump_clock: MockClock, n_prompt: int, cached: int
) -> None:
    async with open_sim_engine() as sim:
        prompt = LONG[:n_prompt]
        assert (await generate(sim, prompt, 1)).usage.cached_tokens == 0
        before = sim.worker.statistics().tokens
        assert (await generate(sim, prompt, 1)).usage.cached_tokens == cached
        assert sim.worker.statistics().tokens - before == n_prompt - cached
        statistics = sim.scheduler.statistics()
        assert (statistics.prompt_tokens, statistics.reused_tokens) == (2 * n_prompt - cached, cached)
        await sim.check_quiet()


async def test_progress_begins_behind_what_is_reused(autojump_clock: MockClock) -> None:
    async with open_sim_engine(batch_tokens=3) as sim:
        await generate(sim, LONG[:12])
        async with sim.engine.stream(LONG, max_tokens=1) as events:
            progress = [event async for event in events if isinstance(event, PrefillEvent)]
        assert progress == [PrefillEvent(done=done, total=22, cached=12) for done in (15, 18, 21, 22)]


async def test_a_prompt_that_differs_is_computed_from_the_block_where_it_does(autojump_clock: MockClock) -> None:
    async with open_sim_engine() as sim:
        await generate(sim, LONG)
        for differs, cached in ((0, 0), (3, 0), (4, 4), (11, 8), (21, 20)):
            prompt = (*LONG[:differs], 2 + LONG[differs] % 13, *LONG[differs + 1 :])
            assert (await generate(sim, prompt)).usage.cached_tokens == cached
        await sim.check_quiet()


async def test_a_following_turn_reuses_the_answer_too(autojump_clock: MockClock) -> None:
    async with open_sim_engine() as sim:
        first = await generate(sim, LONG[:6], 9)
        turn = (*LONG[:6], *first.tokens, 7, 7, 7)
        # the keys and values of the last token drawn were never computed
        assert (await generate(sim, turn)).usage.cached_tokens == (6 + 9 - 1) // BLOCK * BLOCK == 12
        await sim.check_quiet()


async def test_without_reuse_everything_is_computed(autojump_clock: MockClock) -> None:
    async with open_sim_engine(prefix_reuse=False) as sim:
        for _ in range(2):
            assert (await generate(sim, LONG)).usage.cached_tokens == 0
        assert sim.kv.statistics().cached == sim.scheduler.statistics().reused_tokens == 0
        assert sim.scheduler.statistics().prompt_tokens == 2 * len(LONG)
        await sim.check_quiet()


# --- callers at the same time ---


async def test_what_a_running_sequence_has_computed_is_shared_before_it_ends(autojump_clock: MockClock) -> None:
    async with open_sim_engine(cost=SLOW, batch_tokens=8, context=200, kv_blocks=60) as sim:
        async with sim.engine.stream(LONG, max_tokens=40, ignore_eos=True) as events:
            while not isinstance(await events.receive(), TokenEvent):
                pass
            assert (await generate(sim, LONG)).usage.cached_tokens == 20
            assert sim.scheduler.statistics().running == 1
            assert sim.kv.statistics().available == 60 - -(-(len(LONG) + 40) // BLOCK)
        await sim.check_quiet()


@pytest.mark.parametrize("callers", [2, 4])
async def test_callers_that_come_at_once_compute_their_common_prefix_once(
    autojump_clock: MockClock, callers: int
) -> None:
    chunk = 4
    prompts = [(*LONG[:20], 2 + number, 3) for number in range(callers)]
    async with open_sim_engine(batch_tokens=chunk, max_sequences=callers, max_waiting=callers) as sim:
        cached: list[int] = []

        async def call(prompt: tuple[int, ...]) -> None:
            cached.append((await generate(sim, prompt, 1)).usage.cached_tokens)

        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(call, prompt)
        statistics = sim.scheduler.statistics()
        assert statistics.prompt_tokens + sum(cached) == sum(map(len, prompts))
        assert statistics.reused_tokens == sum(cached)
        # each may compute the rest of a batch's room before the first has it ready, and its own tail
        assert statistics.prompt_tokens <= 20 + callers * (chunk + 2)
        await sim.check_quiet()


@pytest.mark.parametrize(("batch_tokens", "rows"), [(66, [66]), (65, [22, 2 * 2])])
async def test_nobody_waits_for_a_prefix_when_one_batch_has_room_for_all(
    autojump_clock: MockClock, batch_tokens: int, rows: list[int]
) -> None:
    async with open_sim_engine(batch_tokens=batch_tokens) as sim, trio.open_nursery() as nursery:
        sim.worker.frozen = frozen = trio.Event()
        nursery.start_soon(generate, sim, (9,), 1)  # so that the others are there when the next batch is made
        await trio.sleep(1)
        for number in range(3):
            nursery.start_soon(generate, sim, (*LONG[:20], 2 + number, 3), 1)
        await trio.sleep(1)
        frozen.set()
        await trio.sleep(1)
        assert [len(batch.tokens) for batch in sim.worker.batches[1:]] == rows


async def test_who_waits_for_a_prefix_computes_it_if_the_first_one_leaves(autojump_clock: MockClock) -> None:
    async with open_sim_engine(batch_tokens=4, cost=SLOW) as sim, trio.open_nursery() as nursery:
        async with sim.engine.stream(LONG, max_tokens=1) as events:
            nursery.start_soon(generate, sim, LONG, 1)
            await events.receive()
            await trio.sleep(1)
        await trio.sleep(100)
        await sim.check_quiet()
        assert sim.scheduler.statistics().finished == 1


async def test_prompts_that_have_nothing_in_common_share_a_batch(autojump_clock: MockClock) -> None:
    async with open_sim_engine(batch_tokens=8) as sim, trio.open_nursery() as nursery:
        sim.worker.frozen = frozen = trio.Event()
        nursery.start_soon(generate, sim, (9,), 1)
        await trio.sleep(1)
        for number in range(3):
            nursery.start_soon(generate, sim, (2 + number, *LONG), 1)
        await trio.sleep(1)
        frozen.set()
        await trio.sleep(1)
        assert len(sim.worker.batches[1].tables) == 3


async def test_sharing_lets_in_who_would_not_fit_alone(autojump_clock: MockClock) -> None:
    async with open_sim_engine(kv_blocks=8, cost=SLOW, context=32) as sim:
        async with sim.engine.stream(LONG, max_tokens=2, ignore_eos=True) as events:  # 6 blocks
            await events.receive()  # 8 tokens of 22
            await events.receive()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate, sim, (*LONG[:16], 9), 6)  # 6 blocks, 4 of them shared
                await trio.sleep(4)
                assert sim.scheduler.statistics().running == 2
        await sim.check_quiet()


async def test_cached_prefixes_give_way_to_who_needs_their_blocks(autojump_clock: MockClock) -> None:
    async with open_sim_engine(kv_blocks=8, context=32) as sim:
        await generate(sim, LONG[:9], 3)  # leaves 2 blocks
        await generate(sim, LONG[3:15], 3)  # leaves 3
        await generate(sim, (9,) * 18, 3)  # takes 6: the free 3, the last of the first prefix, then its first
        assert sim.kv.statistics().evictions == 3
        assert known(sim, LONG[:8]) == 0
        assert known(sim, LONG[3:15]) == 8
        await sim.check_quiet()


async def test_a_preempted_sequence_gets_back_what_is_still_cached(autojump_clock: MockClock) -> None:
    prompt = (5, 6, 7, 8, 9)
    with patch("mer.engine.CHANNEL_EVENTS", 2):
        async with open_sim_engine(kv_blocks=16, max_sequences=1) as sim:
            async with sim.engine.stream(prompt, max_tokens=12, ignore_eos=True) as events:
                drawn: list[int] = []
                async for event in events:
                    if isinstance(event, TokenEvent):
                        drawn.append(event.token)
                        if event.completion is not None:
                            assert event.completion.usage.cached_tokens == 0  # its prompt was computed, the first time
                    with trio.fail_after(1000):
                        await sim.engine.generate((3,), max_tokens=1, ignore_eos=True)
            assert tuple(drawn) == sim.expected(prompt, 12)[0]
            statistics = sim.scheduler.statistics()
            assert statistics.preemptions >= 4
            assert statistics.reused_tokens > 4 * BLOCK
            others = statistics.finished - 1
            again = sim.worker.statistics().tokens - others - (len(prompt) + 12 - 1)
            assert again <= statistics.preemptions * BLOCK, "a whole block was computed again"
            await sim.check_quiet()


# --- what must not be reused ---


@pytest.mark.parametrize("where", ["nan_hidden", "nan_router", "nan_logits"])
@pytest.mark.parametrize("batch_tokens", [2, 4, 6, 16])
async def test_a_damaged_row_leaves_no_block_for_others(
    autojump_clock: MockClock, where: str, batch_tokens: int
) -> None:
    model = SimModel(**{where: frozenset({15})})  # type: ignore[arg-type]
    async with open_sim_engine(model=model, batch_tokens=batch_tokens, max_sequences=max(1, batch_tokens // 2)) as sim:
        prompts = ((5, 6, 7, 8, n, 9) for n in range(2, 14))
        good = next(prompt for prompt in prompts if 15 not in sim.expected(prompt, 4)[0])
        bad = (*good[:4], 9, 15) if where == "nan_logits" else (*good[:4], 9, 15, 6, 6, 6, 6)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail, sim, bad, NumericsError)
            nursery.start_soon(generate, sim, good)
        assert known(sim, bad) <= BLOCK
        await fail(sim, bad, NumericsError)
        assert (await generate(sim, good)).usage.cached_tokens == BLOCK
        await sim.check_quiet()


@pytest.mark.parametrize("job", range(16))
async def test_a_batch_that_fails_leaves_no_block_for_others(autojump_clock: MockClock, job: int) -> None:
    async with open_sim_engine(failures=frozenset({job}), batch_tokens=8) as sim:
        seen = [0]  # positions computed

        async def read() -> None:
            async with sim.engine.stream(LONG, max_tokens=4, ignore_eos=True) as events:
                async for event in events:
                    seen.append(event.done if isinstance(event, PrefillEvent) else len(LONG) + event.index)

        with pytest.raises(ComputeError):
            await read()
        computed = seen[-1]
        assert known(sim, LONG) == min(20, computed // BLOCK * BLOCK)
        assert (await generate(sim, LONG)).usage.cached_tokens == min(20, computed // BLOCK * BLOCK)
        await sim.check_quiet()


async def test_a_batch_that_nobody_wants_any_more_leaves_no_block_for_others(autojump_clock: MockClock) -> None:
    async with open_sim_engine(cost=SLOW, batch_tokens=8, model=SimModel(n_layers=3)) as sim:
        async with sim.engine.stream(LONG, max_tokens=4) as events:
            first = await events.receive()
            assert isinstance(first, PrefillEvent)
            await trio.sleep(1)  # in the next batch
        await trio.sleep(100)
        assert first.done == 8
        assert known(sim, LONG) == 8
        await sim.check_quiet()


async def test_blocks_of_a_batch_under_way_are_not_shared(autojump_clock: MockClock) -> None:
    async with open_sim_engine(cost=SLOW, batch_tokens=16) as sim, trio.open_nursery() as nursery:
        nursery.start_soon(generate, sim, LONG, 1)
        await trio.sleep(1.5)
        assert len(sim.worker.batches) == 1
        assert known(sim, LONG) == 0


# --- cancellation ---


@pytest.mark.parametrize("others", [0, 1])
def test_cancelling_at_any_step_leaves_every_block_to_be_had(others: int) -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SimModel(n_layers=1), kv_blocks=12, batch_tokens=6, max_sequences=2) as sim:
            with trio.fail_after(3600):
                async with trio.open_nursery() as nursery:
                    for _ in range(others):
                        nursery.start_soon(generate, sim, (*LONG[:10], 3))
                    await subject.run(partial(generate, sim, LONG[:14], 3))
                await sim.check_quiet()
                await generate(sim, LONG[:14], 34)  # every block
                await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 3


# --- anything goes ---


@attrs.frozen(kw_only=True)
class Caller:
    """Asks for the first tokens of a stem and some more."""

    arrives_s: float
    stem: int
    n_stem: int
    tail: tuple[int, ...]
    max_tokens: int
    reads_every_s: float
    cancelled_after_s: float | None


delays = st.sampled_from([0.0, 1e-4, 1e-3, 3e-3, 0.02])
callers = st.builds(
    Caller,
    arrives_s=delays,
    stem=st.integers(0, 1),
    n_stem=st.integers(0, 16),
    tail=st.lists(st.integers(2, 5), min_size=1, max_size=4).map(tuple),
    max_tokens=st.integers(1, 10),
    reads_every_s=st.sampled_from([0.0, 0.0, 1e-3, 0.01]),
    cancelled_after_s=st.none() | delays,
)


async def serve(sim: SimEngine, caller: Caller, prompt: tuple[int, ...]) -> None:
    await trio.sleep(caller.arrives_s)
    timeout_s = float("inf") if caller.cancelled_after_s is None else caller.cancelled_after_s
    with trio.move_on_after(timeout_s) as scope:
        tokens: list[int] = []
        done = 0
        async with sim.engine.stream(prompt, max_tokens=caller.max_tokens, ignore_eos=True) as events:
            async for event in events:
                if isinstance(event, TokenEvent):
                    tokens.append(event.token)
                else:
                    assert done < event.done <= len(prompt)
                    done = event.done
                await trio.sleep(caller.reads_every_s)
        assert tuple(tokens) == sim.expected(prompt, caller.max_tokens)[0]
    assert not scope.cancelled_caught or caller.cancelled_after_s is not None


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    st.lists(callers, min_size=2, max_size=9),
    st.integers(1, 12),
    st.integers(8, 24),
    st.sampled_from([1, 2, 64]),
    st.sampled_from([JobCost(), JobCost(job_s=1e-3)]),
)
def test_whoever_shares_a_prefix_gets_what_it_would_get_alone(
    crowd: list[Caller], batch_tokens: int, kv_blocks: int, channel_events: int, cost: JobCost
) -> None:
    stems = (LONG, LONG[:7] + LONG[::-1])

    async def main() -> None:
        with trio.fail_after(3600), patch("mer.engine.CHANNEL_EVENTS", channel_events):
            async with open_sim_engine(
                model=SimModel(n_layers=2, n_experts=3),
                batch_tokens=batch_tokens,
                max_sequences=max(1, batch_tokens // 2),
                kv_blocks=kv_blocks,
                cost=cost,
            ) as sim:
                async with trio.open_nursery() as nursery:
                    for caller in crowd:
                        prompt = (*stems[caller.stem][: caller.n_stem], *caller.tail)
                        nursery.start_soon(serve, sim, caller, prompt)
                await sim.check_quiet()
                assert sim.kv.statistics().n_blocks == kv_blocks

    trio.run(main, clock=MockClock(autojump_threshold=0))
