"""What prefetching must do in a whole engine: guess where there is something to guess, and else not."""

from __future__ import annotations

import trio

from mer.config import PrefetchMode
from mer.io.pool import Priority
from mer.testing.deterministic import run_seeded
from mer.testing.simengine import open_sim_engine
from mer.testing.simworker import JobCost, SimModel


def guesses(mode: PrefetchMode, *, habit: int) -> tuple[int, int]:
    """Return how many experts were read on a guess, and how many were looked up.

    Args:
        mode: of the prefetcher.
        habit: of the model: 0 routes uniformly at random, 12 prefers some experts three times out of four.
    """

    async def generate() -> tuple[int, int]:
        with trio.fail_after(1e5):
            async with open_sim_engine(
                model=SimModel(n_layers=3, n_experts=6, top_k=2, habit=habit),
                n_slots=6,
                prefetch=mode,
                cost=JobCost(job_s=1e-3),
                context=128,
            ) as sim:
                for token in (4, 5, 6):
                    await sim.engine.generate((2, 3, token), max_tokens=60, ignore_eos=True)
                await sim.check_quiet()
                return sim.store.speculation.statistics(Priority.PREFETCH).issued, sim.cache.statistics().lookups

    return run_seeded(generate)


def check_guesses(mode: PrefetchMode) -> None:
    """Assert that guesses are read where routing is regular, and about none where it is not."""
    issued, lookups = guesses(mode, habit=12)
    assert issued > 0.02 * lookups, "nothing is guessed of a model that always does the same"
    issued, lookups = guesses(mode, habit=0)
    assert issued < 0.02 * lookups, "a model that does anything is guessed at"
