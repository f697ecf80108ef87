"""Hit rates of every cache policy on the synthetic streams, and on recorded traces.

Usage: python benchmarks/cache_policies.py [--bypass] [TRACE ...]

Every figure is one replay, exact and repeatable. Policies start empty; the heat profile of the policy "static" is made
from the stream itself, so that it knows in hindsight what the others have to learn. With --bypass, experts that the
policy would not keep take no slot.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mer.bench.seed_cache import simulate_seed
from mer.bench.streams import article, chains, skewed
from mer.sched.belady import simulate_belady
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy
from mer.sched.simulate import Event, simulate
from mer.sched.trace import TraceReader

ITERATIONS = 10_000
TOKENS = 2_000
NAMES = [name for name in POLICIES if name != "cost"]


def table(title: str, events: list[Event], n_layers: int, n_experts: int, slots: list[int], bypass: bool) -> None:
    """Print one table in Markdown."""
    profile = HeatProfile.count(bytes(32), n_layers, n_experts, events)
    print(f"\n{title}\n\n| slots | {' | '.join(NAMES)} | belady |\n|{' ---: |' * (len(NAMES) + 2)}")
    for n_slots in slots:
        shape = CacheShape(n_layers=n_layers, n_experts=n_experts, n_slots=n_slots, profile=profile)
        results = [
            simulate(events, make_policy(name, shape), n_slots, n_layers=n_layers, bypass=bypass) for name in NAMES
        ]
        results.append(simulate_belady(events, n_slots, n_layers=n_layers))
        print(f"| {n_slots} | " + " | ".join(f"{100 * result.hit_rate:.2f}" for result in results) + " |", flush=True)


def main() -> None:
    """Run the command line."""
    bypass = "--bypass" in sys.argv[1:]
    article_sets = list(article.article_stream(ITERATIONS))
    skewed_sets = list(skewed.skewed_stream(ITERATIONS))
    for name, sets, slots in (
        ("Article stream", article_sets, [4, 8, 16, 32, 64, 128]),
        ("Skewed stream", skewed_sets, [16, 32, 64, 124]),
    ):
        table(f"{name}, an iteration at once", [(0, ids) for ids in sets], 1, 256, slots, bypass)
        table(f"{name}, an id at once", [(0, (expert,)) for ids in sets for expert in ids], 1, 256, slots, bypass)
    for n in (500, ITERATIONS):
        totals = simulate_seed(article_sets[:n], n_experts=article.N_EXPERTS)
        print(f"\nseed, {n} iterations: {totals.hits / totals.lookups:.2%} hits, ", end="")
        print(f"{totals.prefetches} prefetches, {totals.reads} reads")
    events: list[Event] = list(chains.mixtral_chains(TOKENS))
    table("Mixtral-like chains", events, chains.N_LAYERS, chains.N_EXPERTS, [32, 56, 64, 96, 125, 192], bypass)
    for path in sys.argv[1:]:
        if path != "--bypass":
            with TraceReader(path) as reader:
                recorded: list[Event] = [(event.layer, event.experts) for event in reader]
            n_layers, n_experts = reader.header.n_layers, reader.header.n_experts
            total = n_layers * n_experts
            slots = sorted({max(1, total * percent // 100) for percent in (12, 25, 40, 50, 75)})
            table(f"{Path(path).name}, {n_layers} x {n_experts} experts", recorded, n_layers, n_experts, slots, bypass)


if __name__ == "__main__":
    main()
