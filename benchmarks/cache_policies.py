"""Hit rates of every cache policy on the synthetic streams, and on recorded traces; docs/cache-policies.md shows them.

Usage: python benchmarks/cache_policies.py [--bypass] [TRACE ...]

Every figure is one replay, exact and repeatable. Policies start empty; the heat profile of the policy "static" is made
from the stream itself, so that it knows in hindsight what the others have to learn. With --bypass, experts that the
policy would not keep take no slot. The last column is by how many points the default is above or below the best of the
other policies.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mer.bench.seed_cache import simulate_seed
from mer.bench.streams import article, chains, skewed
from mer.sched.belady import simulate_belady
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import DEFAULT_POLICY, POLICIES, CacheShape, make_policy
from mer.sched.simulate import Event, simulate
from mer.sched.trace import TraceReader

ITERATIONS = 10_000
TOKENS = 2_000
NAMES = [name for name in POLICIES if name != "cost"]
SHARES = (12, 25, 40, 50, 75)  # of all experts, in %
SIZES = ((100, 115), (100, 350))  # of even and of odd layers: Q4_K beside Q4_K with a Q6_K down matrix; Q4_K beside F16


def table(title: str, events: list[Event], n_layers: int, n_experts: int, slots: list[int], bypass: bool) -> None:
    """Print one table in Markdown."""
    profile = HeatProfile.count(bytes(32), n_layers, n_experts, events)
    print(f"\n{title}\n\n| slots | {' | '.join(NAMES)} | belady | |\n|{' ---: |' * (len(NAMES) + 3)}")
    for n_slots in slots:
        shape = CacheShape(n_layers=n_layers, n_experts=n_experts, n_slots=n_slots, profile=profile)
        rates = {
            name: 100 * simulate(events, make_policy(name, shape), n_slots, n_layers=n_layers, bypass=bypass).hit_rate
            for name in NAMES
        }
        lead = rates[DEFAULT_POLICY] - max(rate for name, rate in rates.items() if name != DEFAULT_POLICY)
        bound = 100 * simulate_belady(events, n_slots, n_layers=n_layers).hit_rate
        cells = [f"{rate:.2f}" for rate in (*rates.values(), bound)]
        print(f"| {n_slots} | {' | '.join(cells)} | {lead:+.2f} |", flush=True)


def bytes_table(title: str, events: list[Event], n_layers: int, n_experts: int, slots: list[int], bypass: bool) -> None:
    """Print how many bytes the policy that weighs costs reads, in % of what LFRU reads."""
    print(f"\n{title}: bytes read with `cost`, in % of those with `lfru`\n\n| slots |", end="")
    print("".join(f" 1 : {odd / even:.2f} |" for even, odd in SIZES) + f"\n|{' ---: |' * (1 + len(SIZES))}")
    for n_slots in slots:
        cells = []
        for pair in SIZES:
            sizes = tuple(pair[layer % 2] for layer in range(n_layers))
            shape = CacheShape(n_layers=n_layers, n_experts=n_experts, n_slots=n_slots, expert_bytes=sizes)
            missed = [
                simulate(events, make_policy(name, shape), n_slots, n_layers=n_layers, bypass=bypass)
                for name in ("cost", "lfru")
            ]
            cells.append(f"{100 * missed[0].missed_bytes(sizes) / missed[1].missed_bytes(sizes):.1f}")
        print(f"| {n_slots} | {' | '.join(cells)} |", flush=True)


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
    table("Mixtral-like chains", events, chains.N_LAYERS, chains.N_EXPERTS, [8, 32, 56, 64, 96, 125, 192], bypass)
    bytes_table("Mixtral-like chains", events, chains.N_LAYERS, chains.N_EXPERTS, [32, 64, 128, 192], bypass)
    for path in sys.argv[1:]:
        if path != "--bypass":
            with TraceReader(path) as reader:
                recorded: list[Event] = [(event.layer, event.experts) for event in reader]
            n_layers, n_experts = reader.header.n_layers, reader.header.n_experts
            total = n_layers * n_experts
            slots = sorted({n_experts, *(max(1, total * share // 100) for share in SHARES)})
            title = f"{Path(path).name}, {n_layers} x {n_experts} experts"
            table(title, recorded, n_layers, n_experts, slots, bypass)
            bytes_table(title, recorded, n_layers, n_experts, slots[1::2], bypass)


if __name__ == "__main__":
    main()
