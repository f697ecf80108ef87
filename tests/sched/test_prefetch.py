"""Prefetching in whole engines of simulated parts: it changes no token, loses no slot, and costs no time."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import pytest
import trio
from trio.testing import MockClock

from mer.config import PrefetchMode
from mer.io.pool import Priority
from mer.sched.governor import Guess
from mer.sched.prefetch import DiskFacts, Prefetcher
from mer.sched.speculation import SpeculationStatistics
from mer.testing.simdisk import DiskProfile
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import JobCost, SimModel

PROMPT = (5, 9, 3)
N_TOKENS = 60
FAST, SLOW = DiskProfile(jitter=0.1, bytes_per_s=4e9), DiskProfile(jitter=0.1, bytes_per_s=1e7)
LAGGARD = DiskProfile(jitter=0.1, latency_s=600e-6)
COST = JobCost(job_s=300e-6)


@attrs.frozen(kw_only=True)
class RotatingModel(SimModel):
    """Every position takes other experts, each as often as any other, but a layer's foretell the next one's."""

    def attend(self, layer: int, entries: Sequence[int], x: int) -> int:
        return super().attend(layer, entries, x) // self.n_experts * self.n_experts + len(entries) % self.n_experts

    def route(self, layer: int, x: int) -> list[int]:
        return [(x + layer + 3 * i) % self.n_experts for i in range(self.top_k)]


ROTATING = RotatingModel(n_layers=4, n_experts=8, top_k=2)
RANDOM = SimModel(n_layers=4, n_experts=8, top_k=2)


async def generate(sim: SimEngine) -> float:
    """Return how long it took on the simulated clock."""
    began_s = trio.current_time()
    done = await sim.engine.generate(PROMPT, max_tokens=N_TOKENS, ignore_eos=True)
    took_s = trio.current_time() - began_s
    assert done.tokens == sim.expected(PROMPT, N_TOKENS)[0]
    await sim.check_quiet()
    return took_s


def run(
    mode: PrefetchMode, model: SimModel, profile: DiskProfile = FAST, n_slots: int = 6
) -> tuple[float, SpeculationStatistics, int]:
    """Return the time of a generation, what became of the guesses, and the misses."""

    async def main() -> tuple[float, SpeculationStatistics, int]:
        async with open_sim_engine(
            model=model, n_slots=n_slots, context=128, profile=profile, cost=COST, prefetch=mode
        ) as sim:
            took_s = await generate(sim)
            return took_s, sim.store.speculation.statistics(Priority.PREFETCH), sim.cache.statistics().misses

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.slow
@pytest.mark.parametrize("n_slots", [1, 10])
@pytest.mark.parametrize("mode", ["markov", "gate", "auto"])
@pytest.mark.parametrize("model", [ROTATING, RANDOM], ids=["rotating", "random"])
def test_guesses_change_no_token(mode: PrefetchMode, model: SimModel, n_slots: int) -> None:
    run(mode, model, n_slots=n_slots)


@pytest.mark.slow
def test_what_can_be_foretold_is_there_when_it_is_needed() -> None:
    off_s, nothing, _ = run("off", ROTATING, LAGGARD, n_slots=10)
    assert nothing.issued == 0
    markov_s, guesses, misses = run("markov", ROTATING, LAGGARD, n_slots=10)
    assert guesses.used + guesses.promoted > 0.9 * guesses.issued > 0
    assert guesses.used + guesses.promoted > misses / 3
    assert markov_s < 0.98 * off_s


def test_what_cannot_be_foretold_is_not_guessed() -> None:
    _, guesses, misses = run("markov", RANDOM)
    assert guesses.issued < 0.05 * misses


@pytest.mark.slow
@pytest.mark.parametrize("profile", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("model", [ROTATING, RANDOM], ids=["rotating", "random"])
def test_auto_is_never_slower_than_off(model: SimModel, profile: DiskProfile) -> None:
    off_s, _, _ = run("off", model, profile)
    auto_s, _, _ = run("auto", model, profile)
    assert auto_s <= 1.02 * off_s


async def test_nothing_is_guessed_where_every_expert_has_a_slot(autojump_clock: MockClock) -> None:
    async with open_sim_engine(model=ROTATING, cost=COST, context=128, prefetch="markov") as sim:
        await generate(sim)
        assert sim.store.speculation.statistics(Priority.PREFETCH).issued == 0


class _Store:
    """Reads guesses, with room for one or not."""

    def __init__(self) -> None:
        self.guessing = 0

    def price(self, key: tuple[int, int]) -> float:
        return 0.5

    def prefetch(self, key: tuple[int, int], probability: float) -> bool:
        raise AssertionError("a guess is read that was not approved")


async def test_time_that_is_gone_leaves_less_for_a_guess(autojump_clock: MockClock) -> None:
    """What the disk is idle for a layer counts from the moment when it became so, not from each look."""
    store = _Store()
    facts = DiskFacts(expert_bytes=lambda key: 1000, bytes_per_s=lambda: 1e6, chunk_bytes=1000)
    prefetcher = Prefetcher("markov", facts, n_layers=2, n_experts=4, top_k=1)
    told: list[float] = []

    def approves(guess: Guess) -> bool:
        told.append(guess.needed_in_s)
        store.guessing = 100  # no room for a second one
        return False

    prefetcher.governor.approves = approves  # type: ignore[method-assign]
    for _ in range(200):  # the layers follow each other after a second, always with the same experts
        for layer in (0, 1):
            store.guessing = 0
            prefetcher.routed(layer, [layer, 2, 3], None, guess=True)
            prefetcher.idle(store)
            await trio.sleep(1.0)
    store.guessing = 0
    prefetcher.routed(0, [0, 2, 3], None, guess=True)
    prefetcher.idle(store)
    at_once = told[-1]
    assert at_once == pytest.approx(1.0, rel=0.05)
    await trio.sleep(0.75)
    store.guessing = 0
    prefetcher.idle(store)
    assert told[-1] == pytest.approx(at_once - 0.75)
