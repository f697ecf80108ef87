"""The admission queue: order, places handed over, and what cancelled callers leave behind."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.config import Sampling
from mer.engine import Engine
from mer.errors import EngineClosed, RequestError
from mer.sched.admission import AdmissionQueue, Place
from mer.sched.events import Event
from mer.sched.sampling import Sampler
from mer.sched.sequence import Sequence
from mer.testing.cancel import Subject, cancel_at_every_step
from mer.testing.deterministic import run_seeded
from mer.testing.simengine import open_sim_engine


class NoText:
    """Text of tokens that have none."""

    def push(self, token: int) -> tuple[str, bool]:
        return "", False

    def flush(self) -> str:
        return ""


def make(number: int) -> Sequence:
    """Return a sequence that is known by its prompt."""
    send, _ = trio.open_memory_channel[Event](1)
    return Sequence(
        prompt=(number,),
        max_tokens=1,
        sampler=Sampler(Sampling(), ()),
        output=NoText(),
        end_tokens=frozenset(),
        events=send,
        submitted_s=0.0,
    )


def take(queue: AdmissionQueue) -> int:
    (number,) = queue.take().prompt
    return number


async def test_a_free_place_goes_to_who_waits_and_newcomers_do_not_overtake() -> None:
    queue = AdmissionQueue(2)
    entered: list[int] = []

    async def submitter(number: int) -> None:
        await queue.put(make(number))
        entered.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(submitter, number)
            await wait_all_tasks_blocked()
        assert entered == [0, 1]
        assert take(queue) == 0
        assert len(queue) == 2, "the place was not handed over at once"
        nursery.start_soon(submitter, 5)  # runs no later than who was handed the place
        await wait_all_tasks_blocked()
        assert entered == [0, 1, 2]
        assert [take(queue) for _ in range(5)] == [1, 2, 3, 4, 5]
    assert sorted(entered) == [0, 1, 2, 3, 4, 5]
    assert (queue.first, len(queue), queue.entered) == (None, 0, 6)


async def test_cancelled_sequences_leave_from_anywhere_in_the_queue() -> None:
    queue = AdmissionQueue(4)
    sequences = [make(number) for number in range(4)]
    async with trio.open_nursery() as nursery:
        for sequence in sequences:
            await queue.put(sequence)
        for number in (4, 5):
            nursery.start_soon(queue.put, make(number))
            await wait_all_tasks_blocked()
        assert queue.remove_cancelled() == []
        sequences[1].cancelled = sequences[3].cancelled = True
        assert queue.remove_cancelled() == [sequences[1], sequences[3]]
        assert [take(queue) for _ in range(4)] == [0, 2, 4, 5]


async def test_closing_refuses_who_waits_and_who_comes_later() -> None:
    queue = AdmissionQueue(1)
    queued = make(0)
    await queue.put(queued)
    refused: list[int] = []

    async def submitter(number: int) -> None:
        with pytest.raises(EngineClosed):
            await queue.put(make(number))
        refused.append(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(submitter, 1)
        nursery.start_soon(submitter, 2)
        await wait_all_tasks_blocked()
        assert queue.close() == [queued]
        nursery.start_soon(submitter, 3)
    assert sorted(refused) == [1, 2, 3]
    assert (len(queue), queue.entered) == (0, 1)


async def test_a_place_handed_over_after_the_cancellation_stays_taken() -> None:
    queue = AdmissionQueue(1)
    await queue.put(make(0))
    late = make(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(queue.put, late)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert take(queue) == 0
    assert nursery.cancel_scope.cancelled_caught
    assert queue.first is late


async def test_a_submission_that_gets_its_place_too_late_is_cancelled(autojump_clock: MockClock) -> None:
    async with open_sim_engine(max_sequences=1, max_waiting=1) as sim:
        held = sim.worker.frozen = trio.Event()
        running, queued, late = make(3), make(4), make(5)
        await sim.scheduler.submit(running)
        await trio.sleep(1)
        await sim.scheduler.submit(queued)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sim.scheduler.submit, late)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
            queued.cancelled = True
            sim.scheduler.wake()  # hands its place over
            assert sim.scheduler.statistics().waiting == 1
        assert nursery.cancel_scope.cancelled_caught
        assert sim.scheduler.statistics().waiting == 0
        sim.worker.frozen = None
        running.cancelled = True
        sim.scheduler.wake()
        held.set()
        await sim.check_quiet()
        assert sim.scheduler.statistics().cancelled == 3


def test_cancelling_a_submitter_at_any_step_leaves_the_line_in_order() -> None:
    async def scenario(subject: Subject) -> None:
        queue = AdmissionQueue(1)
        mine = make(1)
        await queue.put(make(0))
        served: list[int] = []

        async def take_all() -> None:
            while queue.first is not None:
                served.append(take(queue))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:

            async def other() -> None:
                await queue.put(make(2))

            async def put_mine() -> None:
                await queue.put(mine)

            async def later() -> None:
                await trio.sleep(1)
                nursery.start_soon(other)
                await trio.sleep(1)
                await take_all()

            nursery.start_soon(later)
            finished = await subject.run(put_mine)
        assert served == ([0, 1, 2] if finished else [0, 2])

    assert cancel_at_every_step(scenario) >= 2


async def test_cancelled_requests_do_not_keep_live_ones_out(autojump_clock: MockClock) -> None:
    async with open_sim_engine(max_sequences=1, max_waiting=4) as sim:
        held = sim.worker.frozen = trio.Event()
        done: list[int] = []

        async def caller(number: int) -> None:
            async with sim.engine.stream((3 + number,), max_tokens=3, ignore_eos=True) as events:
                done.append(number)
                async for _ in events:
                    pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller, 0)
            await trio.sleep(1)
            for _ in range(10):
                with trio.move_on_after(1):
                    await sim.engine.generate((9,), max_tokens=3)
                assert sim.scheduler.statistics().waiting == 0
            assert sim.scheduler.statistics().cancelled == 10
            with trio.CancelScope() as impatient:
                async with trio.open_nursery() as crowd:
                    for _ in range(4):
                        crowd.start_soon(sim.engine.generate, (9,))
                    await trio.sleep(1)
                    nursery.start_soon(caller, 1)
                    await trio.sleep(1)
                    assert sim.scheduler.statistics().waiting == 4
                    assert done == [0]
                    impatient.cancel()
            await trio.sleep(1)
            assert done == [0, 1], "the places of the cancelled were not handed over"
            assert sim.scheduler.statistics().waiting == 1
            sim.worker.frozen = None
            held.set()
        await sim.check_quiet()
        statistics = sim.scheduler.statistics()
        assert (statistics.submitted, statistics.finished, statistics.cancelled) == (16, 2, 14)


@attrs.define
class Line:
    """What a queue must come to, as lists of numbers."""

    n_places: int
    queued: list[int] = attrs.Factory(list)
    kept: list[int] = attrs.Factory(list)
    waiting: list[int] = attrs.Factory(list)

    @property
    def has_room(self) -> bool:
        return len(self.queued) + len(self.kept) < self.n_places

    def serve(self) -> None:
        while self.waiting and self.has_room:
            self.queued.append(self.waiting.pop(0))


STEPS = ("put", "reserve", "enter", "give back", "take", "cancel a waiting one", "cancel a queued one")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 3)), max_size=30))
@example(1, [("reserve", 0), ("put", 0), ("give back", 0), ("reserve", 0)])  # the place goes to who waits
def test_places_that_are_kept_are_neither_lost_nor_let_newcomers_overtake(
    n_places: int, steps: list[tuple[str, int]]
) -> None:
    async def scenario() -> None:
        queue, line = AdmissionQueue(n_places), Line(n_places)
        places: dict[int, Place] = {}
        sequences: dict[int, Sequence] = {}
        scopes: dict[int, trio.CancelScope] = {}

        async def put(number: int) -> None:
            with trio.CancelScope() as scopes[number]:
                await queue.put(sequences[number])

        async with trio.open_nursery() as nursery:
            for number, (step, which) in enumerate(steps):
                sequences[number] = make(number)
                if step == "put":
                    nursery.start_soon(put, number)
                    (line.queued if line.has_room else line.waiting).append(number)
                elif step == "reserve" and line.has_room:
                    assert not line.waiting
                    places[number] = queue.reserve()
                    line.kept.append(number)
                elif step == "reserve":
                    with pytest.raises(trio.WouldBlock):
                        queue.reserve()
                elif step == "enter" and which < len(line.kept):
                    entering = line.kept.pop(which)
                    with places[entering] as place:
                        place.enter(sequences[entering])
                    line.queued.append(entering)
                elif step == "give back" and which < len(line.kept):
                    with pytest.raises(KeyError), places[line.kept.pop(which)]:
                        raise KeyError
                elif step == "take" and line.queued:
                    assert take(queue) == line.queued.pop(0)
                elif step == "cancel a waiting one" and which < len(line.waiting):
                    scopes[line.waiting.pop(which)].cancel()
                elif step == "cancel a queued one" and which < len(line.queued):
                    sequences[line.queued.pop(which)].cancelled = True
                    queue.remove_cancelled()
                line.serve()
                await wait_all_tasks_blocked()
                assert [sequence.prompt[0] for sequence in queue] == line.queued
                assert queue.n_kept == len(line.kept)
            nursery.cancel_scope.cancel()

    run_seeded(scenario)


async def test_a_closed_queue_keeps_no_place_and_lets_none_be_entered() -> None:
    queue = AdmissionQueue(2)
    with queue.reserve() as place:
        assert queue.close() == []
        with pytest.raises(EngineClosed):
            place.enter(make(0))
        with pytest.raises(EngineClosed):
            queue.reserve()
    assert (len(queue), queue.n_kept) == (0, 0)


async def test_a_full_queue_refuses_who_does_not_wait_before_its_prompt_is_looked_at(autojump_clock: MockClock) -> None:
    async with open_sim_engine(max_sequences=1, max_waiting=1) as sim:
        held = sim.worker.frozen = trio.Event()
        served: list[int] = []

        async def ask(number: int) -> None:
            async with sim.engine.stream((number,), max_tokens=1) as events:
                await events.receive()
                served.append(number)

        async def ask_nowait(prompt: Any) -> None:
            async with sim.engine.stream_nowait(prompt, max_tokens=1) as events:
                await events.receive()
                served.append(prompt[0])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_nowait, (3,))
            await trio.sleep(1)
            nursery.start_soon(ask_nowait, (4,))
            await trio.sleep(1)
            nursery.start_soon(ask, 5)  # waits to be queued
            await trio.sleep(1)
            before_s = trio.current_time()
            for prompt in ((6,), "", None):
                with pytest.raises(trio.WouldBlock):
                    await ask_nowait(prompt)
            assert trio.current_time() == before_s
            assert sim.scheduler.statistics().submitted == 2
            sim.worker.frozen = None
            held.set()
        assert served == [3, 4, 5]
        with pytest.raises(RequestError):
            await ask_nowait(None)
        await ask_nowait((7,))
        await sim.check_quiet()
        sim.engine.close()
        with pytest.raises(EngineClosed):
            await ask_nowait((8,))


def test_whoever_does_not_wait_loses_no_place_at_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prompt that takes a while to encode, a place is kept for longer than a step."""
    encode_aside = Engine._encode_aside

    async def slower(self: Engine, prompt: Any) -> Any:
        for _ in range(3):
            await trio.sleep(1)
        return await encode_aside(self, prompt)

    monkeypatch.setattr(Engine, "_encode_aside", slower)

    async def scenario(subject: Subject) -> None:
        async with open_sim_engine(max_sequences=1, max_waiting=1) as sim:
            answers: list[tuple[int, ...]] = []

            async def ask_nowait() -> None:
                async with sim.engine.stream_nowait((5, 6), max_tokens=2, ignore_eos=True) as events:
                    assert sim.scheduler.statistics().reserved == 0
                    async for _ in events:
                        pass

            async def ask() -> None:
                done = await sim.engine.generate((7, 8), max_tokens=2, ignore_eos=True)
                answers.append(done.tokens)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await subject.run(ask_nowait)
            assert answers == [sim.expected((7, 8), 2)[0]]
            with pytest.raises(RequestError):
                async with sim.engine.stream_nowait((5,), max_tokens=0):
                    pass
            await sim.check_quiet()
            await ask_nowait()  # there is a place
            await sim.check_quiet()

    assert cancel_at_every_step(scenario) >= 5
