"""The admission queue: order, places handed over, and what cancelled callers leave behind."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from mer.config import Sampling
from mer.errors import EngineClosed
from mer.sched.admission import AdmissionQueue
from mer.sched.events import Event
from mer.sched.sampling import Sampler
from mer.sched.sequence import Sequence
from mer.testing.cancel import Subject, cancel_at_every_step
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
