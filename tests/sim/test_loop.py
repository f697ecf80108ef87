"""The watch over the event loop tells the truth: which step is long, what was called and where."""

from __future__ import annotations

import pytest
import trio

from mer.testing.loop import LoopWatch, watch_loop


class Work:
    """Something that can be watched."""

    def plain(self, value: int) -> int:
        return value + 1

    @classmethod
    def of_class(cls, value: int) -> tuple[type, int]:
        return cls, value

    @staticmethod
    def alone(value: int) -> int:
        return -value


class Child(Work):
    pass


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_each_step_is_timed_and_the_longest_is_told_with_its_task() -> None:
    clock = Clock()

    async def steps(*seconds: float) -> None:
        for s in seconds:
            clock.now_s += s
            await trio.lowlevel.checkpoint()
            clock.now_s += 0.0

    async def slow() -> None:
        await steps(0.002, 0.5)

    async def quick() -> None:
        await steps(*[0.001] * 95)

    with watch_loop(clock=clock) as watch:
        assert watch.percentile_s(99) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(slow)
            nursery.start_soon(quick)
    assert watch.longest.seconds == pytest.approx(0.5)
    assert watch.longest.task.endswith("slow")
    assert watch.percentile_s(100) == watch.longest.seconds
    assert watch.percentile_s(90) == pytest.approx(0.001)
    assert watch.percentile_s(1) == 0
    n_steps = watch.steps
    assert 97 <= n_steps < 110
    await trio.lowlevel.checkpoint()
    assert watch.steps == n_steps, "the watch goes on"


async def test_calls_are_counted_by_thread_and_do_what_they_did() -> None:
    originals = dict(vars(Work))
    with watch_loop((Work, "plain"), (Work, "of_class"), (Work, "alone")) as watch:
        assert Work().plain(1) == 2
        assert Child.of_class(2) == (Child, 2)
        assert Child().alone(3) == -3
        assert await trio.to_thread.run_sync(Child().plain, 4) == 5
        assert await trio.to_thread.run_sync(Work.alone, 5) == -5
    assert watch.on_loop == {"Work.plain": 1, "Work.of_class": 1, "Work.alone": 1}
    assert watch.elsewhere == {"Work.plain": 1, "Work.alone": 1}
    assert dict(vars(Work)) == originals
    Work().plain(1)
    assert watch.on_loop["Work.plain"] == 1


async def test_a_function_that_is_not_there_is_refused_and_nothing_is_changed() -> None:
    originals = dict(vars(Work))
    for owner, name in ((Work, "missing"), (Child, "plain")):
        refused = pytest.raises(AttributeError, match=f"{owner.__name__} has no function '{name}'")
        with refused, watch_loop((Work, "plain"), (owner, name)):
            pass
    assert dict(vars(Work)) == originals


async def test_functions_are_put_back_when_the_block_raises() -> None:
    originals = dict(vars(Work))
    with pytest.raises(ZeroDivisionError), watch_loop((Work, "plain")):
        raise ZeroDivisionError
    assert dict(vars(Work)) == originals


def test_the_watch_can_be_given_to_a_run_from_its_beginning() -> None:
    watch = LoopWatch()
    trio.run(trio.sleep, 0, instruments=[watch])
    assert watch.steps > 0
