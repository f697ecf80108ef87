"""Invariants of an engine, checked between every two steps of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from mer.io.pool import Priority, SlotState
from mer.testing.simengine import SimEngine


def check_now(sim: SimEngine) -> None:
    """Assert what must hold of an engine at any moment: that nothing is lost, and nothing is held twice."""
    pool, cache = sim.pool.statistics(), sim.cache.statistics()
    fetcher, kv, scheduler = sim.fetcher.statistics(), sim.kv.statistics(), sim.scheduler.statistics()
    states = sim.pool.states
    counted = [pool.free, pool.filling, pool.ready, pool.pinned, pool.quarantined]
    assert counted == [states.count(state) for state in SlotState], "the pool has miscounted its slots"
    holders: dict[int, object] = {}
    for fetch in sim.fetcher.fetches:
        assert fetch.slot not in holders, f"slot {fetch.slot} is leased twice"
        holders[fetch.slot] = fetch
        assert states[fetch.slot] is SlotState.FILLING, "a read fills a slot that is not its own"
        assert fetch.key not in sim.cache, "an expert that is resident is read again"
    for _, resident in sim.cache.items():
        assert resident.slot not in holders, f"slot {resident.slot} holds two experts"
        holders[resident.slot] = resident
        assert states[resident.slot] in (SlotState.READY, SlotState.PINNED), "a resident's slot was given away"
    assert pool.ready + pool.pinned == cache.resident, "a slot has bytes that nobody knows"
    assert pool.filling == fetcher.in_flight, "a slot waits for a read that nobody has started"
    demand = pool.waiting[Priority.DEMAND]
    assert not (demand and pool.free + pool.ready), "somebody waits for a slot that is there"
    assert not (sum(pool.waiting) and pool.free and pool.permits), "speculation waits for a slot that is there"
    assert cache.hits + cache.misses == cache.lookups
    assert fetcher.started == fetcher.landed + fetcher.failed + fetcher.abandoned + fetcher.in_flight
    assert fetcher.reads_started == (
        fetcher.reads_landed + fetcher.reads_failed + fetcher.reads_cancelled + fetcher.reads_in_flight
    )
    for counts in fetcher.by_priority:
        assert counts.started + counts.promoted_in == (
            counts.promoted_out + counts.landed + counts.failed + counts.abandoned + counts.in_flight
        )
    for priority in (Priority.READ_AHEAD, Priority.PREFETCH):
        guesses = sim.store.speculation.statistics(priority)
        fates = (guesses.used, guesses.promoted, guesses.evicted_unused, guesses.cancelled, guesses.failed)
        assert guesses.issued == sum(fates) + guesses.in_flight + guesses.resident_unused, (
            "the fate of a guess is not known"
        )
    assert 0 <= kv.free <= kv.free + kv.cached <= kv.n_blocks
    assert scheduler.submitted == (
        scheduler.finished
        + scheduler.failed
        + scheduler.cancelled
        + scheduler.running
        + scheduler.waiting
        + scheduler.paused
    ), "a sequence is counted twice, or not at all"


class _Watch(trio.abc.Instrument):
    """Calls a check after every step of a task, until it fails for the first time."""

    def __init__(self, check: Callable[[], None], scope: trio.CancelScope) -> None:
        self._check, self._scope = check, scope
        self.error: BaseException | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.error is None:
            try:
                self._check()
            except Exception as error:  # trio would log it and go on
                self.error = error
                self._scope.cancel()


@contextmanager
def watch(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` after every step of every task while the block runs; if it raises, cancel the block and raise that.

    For invariants that must hold whenever a task gives way, such as `check_now` of an engine. What holds only between
    some steps shows as a failure at the very step after which it does not.
    """
    with trio.CancelScope() as scope:
        instrument = _Watch(check, scope)
        trio.lowlevel.add_instrument(instrument)
        try:
            yield
        except Exception as error:
            if instrument.error is None:
                raise
            raise instrument.error from error
        finally:
            trio.lowlevel.remove_instrument(instrument)
    if instrument.error is not None:
        raise instrument.error
