"""What is needed before what is guessed: order, promotion, and how long demand waits for a disk full of speculation."""

from __future__ import annotations

from collections import Counter

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.io.pool import Priority
from mer.testing.simdisk import DiskProfile
from tests._lib.landing import landed
from tests.io.rig import DEMAND, EXPERTS, PREFETCH, READ_AHEAD, big_experts, open_rig

CHUNK = 8192
SMOOTH = DiskProfile(jitter=0, latency_s=1e-4, bytes_per_s=1e8)


async def test_demand_overtakes_what_waits_and_a_promoted_fetch_is_read_once(autojump_clock: MockClock) -> None:
    async with open_rig(experts=big_experts(4 * CHUNK), profile=SMOOTH, n_threads=1, chunk_bytes=CHUNK) as (rig, disk):
        guesses = [rig.start(0, expert, PREFETCH) for expert in range(3)]
        ahead = rig.start(0, 3, READ_AHEAD)
        demand = rig.start(0, 4)
        rig.fetcher.promote(guesses[2], DEMAND)
        rig.fetcher.promote(guesses[1], READ_AHEAD)
        rig.fetcher.promote(guesses[1], READ_AHEAD)
        assert [fetch.priority for fetch in guesses] == [PREFETCH, READ_AHEAD, DEMAND]
        with pytest.raises(ValueError, match="READ_AHEAD cannot be lowered to PREFETCH"):
            rig.fetcher.promote(guesses[1], PREFETCH)
        for fetch in (*guesses, ahead, demand):
            await landed(fetch)
            rig.check_bytes(fetch)
        assert rig.done == [guesses[2], demand, guesses[1], ahead, guesses[0]]
        assert set(Counter(disk.chunk_log).values()) == {1}
        with pytest.raises(RuntimeError, match="not in flight"):
            rig.fetcher.promote(guesses[0], DEMAND)
        rig.check_conservation()
        s = rig.fetcher.statistics()
        assert [each.started for each in s.by_priority] == [1, 1, 3]
        assert [each.landed for each in s.by_priority] == [2, 2, 1]
        assert [(each.promoted_in, each.promoted_out) for each in s.by_priority] == [(1, 0), (1, 0), (0, 2)]
        assert s.promoted == 2


async def demand_latency_s(
    speculation: Priority | None,
    profile: DiskProfile,
    n_threads: int,
    chunks: int,
    delay_s: float,
) -> float:
    """Return how long a demand fetch takes while every other expert is on its way as speculation, or none is."""
    async with open_rig(
        experts=big_experts(chunks * CHUNK),
        profile=profile,
        n_threads=n_threads,
        chunk_bytes=CHUNK,
    ) as (rig, disk):
        guesses = [rig.start(0, e, speculation) for e in range(1, EXPERTS)] if speculation is not None else []
        await trio.sleep(delay_s)
        began_s = trio.current_time()
        fetch = rig.start(0, 0)
        await landed(fetch)
        took_s = trio.current_time() - began_s
        rig.check_bytes(fetch)
        for guess in guesses:
            await landed(guess)
        assert (disk.statistics().by_priority[0].latency_p99_s or 0) >= took_s * 0.999
        return took_s


@settings(deadline=None)
@given(
    n_threads=st.integers(1, 6),
    chunks=st.integers(1, 7),
    phase=st.floats(0, 1),
    latency_s=st.sampled_from([1e-6, 1e-4, 1e-2]),
    bytes_per_s=st.sampled_from([1e7, 1e9]),
)
@example(n_threads=4, chunks=5, phase=0.5, latency_s=1e-4, bytes_per_s=1e8)
def test_saturating_speculation_delays_demand_by_one_read_at_most(
    n_threads: int, chunks: int, phase: float, latency_s: float, bytes_per_s: float
) -> None:
    profile = DiskProfile(jitter=0, latency_s=latency_s, bytes_per_s=bytes_per_s)
    alone_s = CHUNK / bytes_per_s + latency_s  # one read of the idle drive
    full_s = n_threads * CHUNK / bytes_per_s + latency_s  # one read of a drive that all threads use
    delay_s = phase * (EXPERTS - 1) * 3 * chunks * CHUNK / bytes_per_s / 2

    def latency_s_with(speculation: Priority | None) -> float:
        return trio.run(
            demand_latency_s, speculation, profile, n_threads, chunks, delay_s, clock=MockClock(autojump_threshold=0)
        )

    undisturbed_s = latency_s_with(None)
    assert latency_s_with(PREFETCH) - undisturbed_s <= alone_s + 1e-7
    assert latency_s_with(READ_AHEAD) - undisturbed_s <= full_s + 1e-7
