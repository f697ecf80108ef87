"""One situation each: stalled readers, hanging disks, failing jobs, full queues and engines that close."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.config import Sampling
from mer.engine import TokenStream
from mer.errors import ComputeError, EngineClosed, GenerationError, MerError, NumericsError, ReadError
from mer.sched.events import Completion, PrefillEvent, TokenEvent
from mer.sched.sampling import Draw, Drawn
from mer.sched.sequence import CHANNEL_EVENTS
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.invariants import check_now, watch
from mer.testing.simdisk import DiskProfile
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel
from mer.text.stop import StopMatcher
from tests._lib.portions import some

BIG = SimModel(n_layers=3, n_experts=8, top_k=2)
SEED_13 = Sampling(seed=13)


def prompts() -> Iterator[tuple[int, ...]]:
    """Yield many different prompts."""
    for number in count():
        yield tuple(2 + number // 14**i % 14 for i in range(3))


def prompt_where(holds: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    return next(prompt for prompt, _ in zip(prompts(), range(2000), strict=False) if holds(prompt))


async def generate(sim: SimEngine, prompt: tuple[int, ...], max_tokens: int = 4) -> Completion:
    """Generate and compare."""
    done = await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    assert done.tokens == sim.expected(prompt, max_tokens)[0]
    return done


async def failure(sim: SimEngine, prompt: tuple[int, ...], into: list[MerError], max_tokens: int = 4) -> None:
    """Generate what must fail."""
    with pytest.raises(MerError) as caught:
        await sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
    into.append(caught.value)


async def read_all(events: TokenStream) -> tuple[int, ...]:
    return tuple([event.token async for event in events if isinstance(event, TokenEvent)])


# --- the same for every number of slots ---


async def test_the_policy_hears_of_layers_that_were_passed(autojump_clock: MockClock) -> None:
    """What it has not heard of is never more than a pass, with everything in memory too."""
    async with open_sim_engine(model=BIG) as sim:
        for _ in range(3):
            await generate(sim, (3, 4, 5), 20)
        assert sim.cache.statistics().lookups > 3 * 20 * BIG.n_layers
        assert len(sim.cache._unsettled) <= BIG.n_layers


async def test_small_experts_take_no_jobs_of_their_own(autojump_clock: MockClock) -> None:
    jobs = []
    for worth_bytes in (0, 1 << 40):
        async with open_sim_engine(model=BIG, n_slots=8, worth_bytes=worth_bytes) as sim:
            await generate(sim, (3, 4, 5), 20)
            jobs.append(sim.worker.statistics().jobs)
    assert jobs[1] <= 20 * (BIG.n_layers + 1) < jobs[0]


@pytest.mark.parametrize("worth_bytes", [0, 30_000, 1 << 40])
@pytest.mark.parametrize("n_slots", some(range(1, 25), every=6))
async def test_any_number_of_slots_gives_the_same(autojump_clock: MockClock, n_slots: int, worth_bytes: int) -> None:
    with trio.fail_after(3600):
        async with open_sim_engine(model=BIG, n_slots=n_slots, worth_bytes=worth_bytes) as sim:
            async with trio.open_nursery() as nursery:
                for prompt in [(5,), (3, 4, 5, 6, 7, 8, 9, 10, 11), (2, 2), (3, 4, 5)]:
                    nursery.start_soon(generate, sim, prompt)
            await sim.check_quiet()
            if n_slots == 24:
                assert sim.fetcher.statistics().started == sim.cache.statistics().resident


async def test_all_misses_of_a_layer_are_in_flight_at_once_and_shared_by_the_batch(autojump_clock: MockClock) -> None:
    async with open_sim_engine(model=BIG, batch_tokens=16) as sim:
        sim.disk.freeze()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(generate, sim, (5, 6, 7, 8))
            await trio.sleep(1)
            _, used = sim.expected((5, 6, 7, 8), 1)
            first = {key for key in used if key[0] == 0}
            assert sim.fetcher.statistics().in_flight == len(first) > 2
            assert len(sim.disk.log) == 3 * len(first)
            sim.disk.thaw()
        await sim.check_quiet()
        assert sim.fetcher.statistics().started == len(sim.expected((5, 6, 7, 8), 4)[1])


async def test_resident_experts_are_computed_while_missing_ones_load(autojump_clock: MockClock) -> None:
    model = SimModel(n_layers=1, n_experts=8, top_k=2)
    async with open_sim_engine(model=model) as sim:
        await generate(sim, (5,), 1)
        runs = sim.worker.statistics().expert_runs
        sim.disk.freeze()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, sim, (5, 6, 7, 8, 9), 1)
            await trio.sleep(1)
            assert sim.fetcher.statistics().in_flight > 0
            assert sim.worker.statistics().expert_runs > runs
            sim.disk.thaw()


# --- slow readers ---


async def test_a_reader_that_does_not_read_pauses_its_own_sequence_alone(autojump_clock: MockClock) -> None:
    async with (
        open_sim_engine(context=256, kv_blocks=200) as sim,
        sim.engine.stream((4, 5), max_tokens=150, ignore_eos=True) as lazy,
    ):
        with trio.fail_after(3600):
            await generate(sim, (6, 7), 200)
            await trio.sleep(1000)
            computed = sim.scheduler.statistics().completion_tokens - 200
            assert computed == CHANNEL_EVENTS - 1  # the first event is a PrefillEvent
            await lazy.receive()
            await trio.sleep(1)
            assert sim.scheduler.statistics().completion_tokens - 200 == computed + 1
            assert await read_all(lazy) == sim.expected((4, 5), 150)[0]
        await sim.check_quiet()


@pytest.mark.slow
@pytest.mark.parametrize("n_prompt", [60, 62, 63, 64, 65, 130])
@pytest.mark.parametrize("max_tokens", [1, 2, 3])
async def test_progress_never_takes_the_place_of_a_token(
    autojump_clock: MockClock, n_prompt: int, max_tokens: int
) -> None:
    prompt = tuple(2 + i % 14 for i in range(n_prompt))
    with trio.fail_after(3600):
        async with (
            open_sim_engine(context=256, batch_tokens=1, max_sequences=1) as sim,
            sim.engine.stream(prompt, max_tokens=max_tokens, ignore_eos=True) as lazy,
        ):
            await trio.sleep(1000)
            assert sim.scheduler.statistics().prompt_tokens == n_prompt
            assert sim.scheduler.statistics().completion_tokens >= 1
            assert await read_all(lazy) == sim.expected(prompt, max_tokens)[0]
            await sim.check_quiet()


async def test_a_failure_reaches_a_reader_after_the_events_it_had_not_read(autojump_clock: MockClock) -> None:
    async with open_sim_engine(failures=frozenset({30})) as sim:
        async with sim.engine.stream((4, 5), max_tokens=40, ignore_eos=True) as events:
            await trio.sleep(100)
            unread = sim.scheduler.statistics().completion_tokens + 1  # and a PrefillEvent
            assert unread > 2
            for _ in range(unread):
                await events.receive()
            with pytest.raises(ComputeError):
                await events.receive()
        await sim.check_quiet()


# --- admission ---


async def test_admission_is_first_come_first_served_and_submit_waits_for_the_queue(autojump_clock: MockClock) -> None:
    async with open_sim_engine(max_sequences=1, max_waiting=2) as sim:
        entered: list[int] = []
        started: list[int] = []
        finish = trio.Event()

        async def caller(number: int) -> None:
            async with sim.engine.stream((3 + number,), max_tokens=3, ignore_eos=True) as events:
                entered.append(number)
                async for event in events:
                    if isinstance(event, PrefillEvent):
                        started.append(number)
                        if number == 0:
                            await finish.wait()

        async with trio.open_nursery() as nursery:
            for number in range(7):
                nursery.start_soon(caller, number)
                await trio.sleep(1)
            # the first has run and is let go, the second too: its tokens fit its channel
            finish.set()
        assert started == list(range(7))
        assert entered == list(range(7))
        await sim.check_quiet()


async def test_submit_waits_while_the_queue_is_full(autojump_clock: MockClock) -> None:
    async with open_sim_engine(max_sequences=1, max_waiting=2, kv_blocks=32, context=200) as sim:
        async with sim.engine.stream((4, 5), max_tokens=100, ignore_eos=True) as first:
            held = sim.worker.frozen = trio.Event()
            await trio.sleep(10)
            entered: list[int] = []
            done: list[int] = []

            async def caller(number: int) -> None:
                async with sim.engine.stream((3 + number,), max_tokens=3, ignore_eos=True) as events:
                    entered.append(number)
                    assert await read_all(events) == sim.expected((3 + number,), 3)[0]
                done.append(number)

            async with trio.open_nursery() as nursery:
                with trio.CancelScope() as scope:
                    for number in range(2):
                        nursery.start_soon(caller, number)
                        await trio.sleep(1)
                    assert entered == [0, 1]
                    async with trio.open_nursery() as impatient:
                        for number in range(2, 5):
                            impatient.start_soon(caller, number)
                            await trio.sleep(1)
                        assert entered == [0, 1]
                        assert sim.scheduler.statistics().waiting == 2
                        scope.cancel()
                nursery.start_soon(caller, 5)
                await trio.sleep(1)
                assert entered == [0, 1]
                sim.worker.frozen = None
                held.set()
                assert await read_all(first) == sim.expected((4, 5), 100)[0]
        assert entered == done == [0, 1, 5]
        await sim.check_quiet()
        assert sim.scheduler.statistics().submitted == 4


async def test_who_needs_many_kv_blocks_is_not_overtaken(autojump_clock: MockClock) -> None:
    async with open_sim_engine(kv_blocks=10, context=40) as sim:
        async with trio.open_nursery() as nursery:
            for number, max_tokens in enumerate([20, 39, 2, 2]):
                nursery.start_soon(generate, sim, (4 + number,), max_tokens)
                await wait_all_tasks_blocked()
        first_of_big = min(i for i, b in enumerate(sim.worker.batches) if 5 in b.tokens.tolist() and 0 in b.positions)
        first_of_small = min(i for i, b in enumerate(sim.worker.batches) if 6 in b.tokens[b.positions == 0].tolist())
        assert first_of_big <= first_of_small
        await sim.check_quiet()


async def test_a_long_prompt_delays_another_stream_by_no_more_than_one_chunk(autojump_clock: MockClock) -> None:
    async with open_sim_engine(batch_tokens=8, context=128, kv_blocks=200) as sim:
        long = tuple(2 + i % 14 for i in range(100))
        async with trio.open_nursery() as nursery, sim.engine.stream((9,), max_tokens=60, ignore_eos=True) as events:
            for _ in range(3):
                await events.receive()
            before = len(sim.worker.batches)
            nursery.start_soon(generate, sim, long, 2)
            assert len(await read_all(events)) == 58
        chunks = [b for b in sim.worker.batches[before:] if len(b.tokens) > 2]
        assert len(chunks) >= 100 // 7
        for batch in chunks:
            assert len(batch.tokens) <= 8
            assert len(batch.tables) == 2, "the decoding sequence was left out of a batch"
        await sim.check_quiet()


# --- cancellation and hanging reads ---


async def test_a_hanging_read_that_nobody_wants_any_more_holds_up_nobody(autojump_clock: MockClock) -> None:
    async with open_sim_engine(model=BIG, n_slots=23) as sim:
        await generate(sim, (5,))
        known = sim.expected((5,), 4)[1]
        other = prompt_where(lambda p: not sim.expected(p, 1)[1] <= known)
        sim.disk.freeze()
        with trio.move_on_after(1):
            await generate(sim, other)
        assert sim.disk.in_flight
        with trio.fail_after(10):
            await generate(sim, (5,))
        assert sim.disk.in_flight
        sim.disk.thaw()
        await sim.check_quiet()


async def test_an_expert_that_lands_for_nobody_is_not_read_again_by_who_wants_it(autojump_clock: MockClock) -> None:
    model = SimModel(n_layers=1, n_experts=8, top_k=2)
    profile = DiskProfile(jitter=0)
    async with open_sim_engine(model=model, n_slots=3, profile=profile) as sim:
        prompt = prompt_where(lambda p: {(0, 0), (0, 1)} <= sim.expected(p, 1)[1])
        sim.disk.freeze()
        sim.store.claims.give_up(sim.store.claims.claim(0, (7, 6, 1))[1])  # to land in this order, all at once
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, sim, prompt, 1)
            await trio.sleep(1)
            sim.disk.thaw()
        await sim.check_quiet()
        assert sim.fetcher.statistics().started == 3 + len(sim.expected(prompt, 1)[1] - {(0, 1), (0, 6), (0, 7)})


async def test_experts_of_a_cancelled_sequence_are_not_read_for_the_rest_of_its_batch(
    autojump_clock: MockClock,
) -> None:
    async with open_sim_engine(model=BIG, batch_tokens=16) as sim:
        sim.disk.freeze()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(generate, sim, (5, 6), 1)
            with trio.move_on_after(1):
                await generate(sim, (9, 10, 11, 12, 13), 1)
            sim.disk.thaw()
        await sim.check_quiet()
        of_first_layer = {key for key in sim.expected((9, 10, 11, 12, 13), 1)[1] if key[0] == 0}
        assert sim.fetcher.statistics().started == len(sim.expected((5, 6), 1)[1] | of_first_layer)


@pytest.mark.parametrize("disk_hangs", [False, True])
async def test_leaving_a_stream_frees_all_it_held_though_nothing_else_happens(
    autojump_clock: MockClock, *, disk_hangs: bool
) -> None:
    async with open_sim_engine(context=200, kv_blocks=50) as sim:
        if disk_hangs:
            sim.disk.freeze()
        async with sim.engine.stream((4, 5), max_tokens=150, ignore_eos=True):
            await trio.sleep(10)
            assert sim.kv.statistics().available == 50 - 152 // 4
        await trio.sleep(10)
        assert sim.kv.statistics().available == 50
        assert sim.scheduler.statistics().cancelled == 1


async def test_kv_blocks_of_a_cancelled_sequence_are_free_only_after_its_job(autojump_clock: MockClock) -> None:
    async with open_sim_engine() as sim:
        held = sim.worker.frozen = trio.Event()
        with trio.move_on_after(1):
            await generate(sim, (5, 6, 7, 8, 9))
        await trio.sleep(1)
        assert sim.kv.statistics().available < sim.kv.n_blocks
        assert sim.scheduler.statistics().running == 1
        sim.worker.frozen = None
        held.set()
        await generate(sim, (5,))
        await sim.check_quiet()
        assert sim.scheduler.statistics().cancelled == 1


def test_cancelling_generate_at_any_step_leaves_nothing_behind() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SimModel(n_layers=1), n_slots=2, max_sequences=2) as sim:
            with trio.fail_after(3600):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(generate, sim, (8, 9), 3)
                    await subject.run(lambda: generate(sim, (5, 6, 7), 3))
                await generate(sim, (7,), 2)
                await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 5


def test_cancelling_a_stream_at_any_step_leaves_nothing_behind() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SimModel(n_layers=1), n_slots=1, batch_tokens=2, max_sequences=1) as sim:

            async def body() -> None:
                async with sim.engine.stream((5, 6, 7), max_tokens=3, ignore_eos=True) as events:
                    assert await read_all(events) == sim.expected((5, 6, 7), 3)[0]

            with trio.fail_after(3600):
                await subject.run(body)
                await generate(sim, (7,), 2)
                await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 5


def test_cancelling_at_any_step_while_the_queue_is_full_leaves_nothing_behind() -> None:
    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(model=SimModel(n_layers=1), max_sequences=1, max_waiting=1) as sim:
            with trio.fail_after(3600):
                async with trio.open_nursery() as nursery:
                    for number in range(3):
                        nursery.start_soon(generate, sim, (4 + number,), 2)
                    await wait_all_tasks_blocked()
                    await subject.run(lambda: generate(sim, (8, 9), 2))
                await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 4


# --- faults ---


async def test_a_failed_read_fails_those_that_needed_it_and_a_later_try_may_succeed(autojump_clock: MockClock) -> None:
    async with open_sim_engine(model=BIG, batch_tokens=16) as sim:
        layer, expert = min(sim.expected((5, 6), 1)[1])
        broken = sim.break_expert(layer, expert)
        other = prompt_where(lambda p: not sim.expected(p, 4)[1] & broken)
        errors: list[MerError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failure, sim, (5, 6), errors)
            nursery.start_soon(failure, sim, (5, 6), errors)
            nursery.start_soon(generate, sim, other)
        assert [type(error) for error in errors] == [ReadError, ReadError]
        assert errors[0] is not errors[1], "each caller raises an error of its own"
        assert str(errors[0]) == str(errors[1])
        assert isinstance(errors[0], ReadError)
        assert errors[0].errno == 5
        sim.disk.heal()
        await generate(sim, (5, 6))
        await sim.check_quiet()


@pytest.mark.parametrize("n_slots", [1, 2, 5, 24])
async def test_a_disk_that_reads_nothing_fails_everybody(autojump_clock: MockClock, n_slots: int) -> None:
    profile = DiskProfile(error_rate=1.0)
    async with open_sim_engine(model=BIG, n_slots=n_slots, profile=profile) as sim:
        errors: list[MerError] = []
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                for number in range(9):
                    nursery.start_soon(failure, sim, (3 + number, 4, 5), errors)
        assert len(errors) == 9
        assert all(isinstance(error, ReadError) for error in errors)
        await sim.check_quiet()


@pytest.mark.parametrize("job", range(12))
async def test_a_failed_job_fails_its_batch_and_spoils_no_expert(autojump_clock: MockClock, job: int) -> None:
    async with open_sim_engine(model=BIG, n_slots=4, failures=frozenset({job})) as sim:
        errors: list[MerError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(failure, sim, (5, 6), errors)
            nursery.start_soon(failure, sim, (7,), errors)
        assert [type(error) for error in errors] == [ComputeError, ComputeError]
        await generate(sim, (5, 6))
        await generate(sim, (7,))
        await sim.check_quiet()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("job", range(8, 48, 6))
async def test_a_failed_job_that_reads_by_itself_spoils_no_expert(
    autojump_clock: MockClock, job: int, seed: int
) -> None:
    async with open_sim_engine(
        model=SimModel(n_layers=4, n_experts=6, seed=seed), n_slots=9, failures=frozenset({job}), job_reads=True
    ) as sim:
        errors: list[MerError] = []
        with watch(lambda: check_now(sim)):
            for prompt in ((5, 6), (7,), (8, 9)):
                try:
                    await sim.engine.generate(prompt, max_tokens=12, ignore_eos=True)
                except MerError as error:
                    errors.append(error)
            await generate(sim, (5, 6))
        assert [type(error) for error in errors] == [ComputeError]
        assert sim.fetcher.statistics().by_jobs > 0
        await sim.check_quiet()


@pytest.mark.parametrize("where", ["nan_hidden", "nan_router", "nan_logits"])
@pytest.mark.parametrize("batch_tokens", [2, 3, 16])
@pytest.mark.parametrize("first", [False, True])
async def test_numbers_that_are_not_finite_fail_their_own_sequence(
    autojump_clock: MockClock, where: str, batch_tokens: int, *, first: bool
) -> None:
    model = SimModel(**{where: frozenset({9})})  # type: ignore[arg-type]
    async with open_sim_engine(model=model, batch_tokens=batch_tokens, max_sequences=max(1, batch_tokens // 2)) as sim:
        errors: list[MerError] = []
        good = prompt_where(lambda p: 9 not in p and 9 not in sim.expected(p, 4)[0])
        prompt = (5, 9) if where == "nan_logits" else (5, 9, 6, 6, 6)
        async with trio.open_nursery() as nursery:
            if first:
                nursery.start_soon(failure, sim, prompt, errors)
                await wait_all_tasks_blocked()
            nursery.start_soon(generate, sim, good)
            if not first:
                await wait_all_tasks_blocked()
                nursery.start_soon(failure, sim, prompt, errors)
        assert [type(error) for error in errors] == [NumericsError]
        await generate(sim, good)
        await sim.check_quiet()


@pytest.mark.parametrize("raised", [IndexError("5 is out of bounds"), MemoryError(), ReadError("a", 0, 1, "gone")])
@pytest.mark.parametrize("when", ["draw", "push", "flush"])
async def test_what_one_sampler_or_text_raises_fails_its_sequence_alone(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, when: str, raised: Exception
) -> None:
    compute, calls = Draw.compute, count()

    def bad_compute(draw: Draw) -> Drawn:
        if draw.sampling.seed == 13 and (when == "draw" and next(calls) == 2):
            raise raised
        return compute(draw)

    def bad_push(matcher: StopMatcher, text: str) -> tuple[str, bool]:
        if "unlucky" in matcher._stops and when == "push" and next(calls) == 2:
            raise raised
        return text, False

    def bad_flush(matcher: StopMatcher) -> str:
        if "unlucky" in matcher._stops and when == "flush":
            raise raised
        return ""

    monkeypatch.setattr(Draw, "compute", bad_compute)
    monkeypatch.setattr(StopMatcher, "push", bad_push)
    monkeypatch.setattr(StopMatcher, "flush", bad_flush)
    caught: list[MerError] = []

    async def unlucky(sim: SimEngine) -> None:
        with pytest.raises(MerError) as error:
            await sim.engine.generate((6, 7), max_tokens=5, ignore_eos=True, sampling=SEED_13, stop=["unlucky"])
        caught.append(error.value)

    with trio.fail_after(3600):
        async with open_sim_engine(model=BIG) as sim:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(generate, sim, (3, 4, 5), 12)
                nursery.start_soon(unlucky, sim)
                nursery.start_soon(generate, sim, (6, 7), 12)
            assert [type(error) for error in caught] == [ReadError if isinstance(raised, MerError) else GenerationError]
            if not isinstance(raised, MerError):
                assert caught[0].__cause__ is raised
                drawn = {"draw": 2, "push": 3, "flush": 5}[when]
                assert f"after {drawn} tokens: {type(raised).__name__}" in str(caught[0])
            assert sim.scheduler.statistics().failed == 1
            await generate(sim, (6, 7))
            await sim.check_quiet()


# --- the end ---


@pytest.mark.parametrize("when_s", [0.0, 1e-4, 1e-3, 0.05])
@pytest.mark.parametrize("frozen", ["disk", "worker", "nothing"])
async def test_closing_fails_everybody_at_once(autojump_clock: MockClock, when_s: float, frozen: str) -> None:
    cost = JobCost(job_s=1e-3)
    async with open_sim_engine(model=BIG, n_slots=3, max_sequences=2, max_waiting=2, cost=cost) as sim:
        if frozen == "disk":
            sim.disk.freeze()
        if frozen == "worker":
            sim.worker.frozen = trio.Event()
        errors: list[MerError] = []
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                for number in range(9):  # two run, one heads the line, two are queued, four wait to be
                    nursery.start_soon(failure, sim, (3 + number, 4, 5), errors, 50)
                await trio.sleep(when_s)
                sim.engine.close()
                sim.engine.close()
                with trio.fail_after(0):
                    await failure(sim, (5,), errors)
        assert [type(error) for error in errors] == [EngineClosed] * 10
        sim.disk.thaw()
        await sim.check_quiet()
