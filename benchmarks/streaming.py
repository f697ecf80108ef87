"""Running a model that does not fit its memory budget against the limits of this machine.

Usage: python benchmarks/streaming.py decode|prefill|concurrent MODEL MEMORY [--rounds N] [--tokens N] [--prefetch MODE]
       [--io-engine ENGINE ...]

Run it in a control group, or under `ulimit -d`, of the same MEMORY to see that the budget holds. Each round opens the
model anew, so that every cache is cold, and measures before and after it what the disk gives to plain direct reads of
the same size and number (the probe), and what memory gives to plain reads.

decode      one greedy generation. The limit is 1 / max(t_disk, t_ram): the bytes of the experts that were missing at
            the probe's rate, and the weight bytes that a token touches at the memory's.
prefill     a prompt of --tokens tokens. The limit is max(bytes of all experts at the probe's rate, the same prompt's
            time with everything in memory, which a second process without the budget measures).
concurrent  8 generations at once against one: the ratio of the tokens/s of all together.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time

import trio

import mer
from mer.bench.cases import spread_tokens
from mer.cli.rates import disk_bytes_per_s, memory_bytes_per_s
from mer.engine import Engine
from mer.stats import Statistics

SEQUENCES = 8
PROMPT_TOKENS = 16


def prompt(engine: Engine, n_tokens: int, seed: int) -> list[int]:
    """Return token ids that are spread over the vocabulary, others for each seed."""
    return spread_tokens(n_tokens, engine.spec.vocab_size, (seed, 0))


class Disk:
    """What plain reads of the model's experts reach."""

    def __init__(self, path: str) -> None:
        self._model = mer.load_model(mer.EngineConfig(path=path))
        experts = self._model.experts.experts
        self.expert_bytes = sum(extents.n_bytes for layer in experts for extents in layer)

    def probe(self) -> float:
        """Return the bytes per second of as many direct reads at once as an engine makes."""
        return disk_bytes_per_s(self._model.gguf, self._model.experts)


async def decode(engine: Engine, arguments: argparse.Namespace, disk: Disk) -> float:
    """Print one round of decoding; return its share of the limit."""
    n_tokens = arguments.tokens
    memory_rate = memory_bytes_per_s(engine.plan.limits.threads)
    before_rate = disk.probe()
    events: list[tuple[float, Statistics, int]] = []
    prompt_ids = prompt(engine, PROMPT_TOKENS, arguments.seed)
    async with engine.stream(prompt_ids, max_tokens=n_tokens, ignore_eos=True) as stream:
        async for event in stream:
            if isinstance(event, mer.TokenEvent) and event.index in (0, n_tokens - 1):
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
                events.append((time.perf_counter(), engine.statistics(), faults))
    disk_rate = (before_rate + disk.probe()) / 2
    (began_s, before, faults_before), (ended_s, after, faults_after) = events
    took_s, n = ended_s - began_s, n_tokens - 1
    misses = after.cache.misses - before.cache.misses
    lookups = after.cache.lookups - before.cache.lookups
    read = after.reader.bytes_read - before.reader.bytes_read
    needed = misses * engine.plan.expert_bytes_per_token / (lookups / n)
    touched = engine.plan.expert_bytes_per_token + engine.plan.dense_bytes_per_token
    limit = n / max(needed / disk_rate, touched * n / memory_rate)
    prefetch = after.prefetch
    print(
        f"{n / took_s:6.2f} tokens/s = {n / took_s / limit:4.0%} of {limit:.2f}; "
        f"read {read / took_s / 1e9:.2f} GB/s = {read / took_s / disk_rate:4.0%} of {disk_rate / 1e9:.2f}; "
        f"{read / n / 1e6:.0f} MB a token, the misses need {needed / n / 1e6:.0f}; "
        f"hits {1 - misses / lookups:.0%}; reading {(after.reader.busy_s - before.reader.busy_s) / took_s:.0%}, "
        f"stalled {(after.stalled_s - before.stalled_s) / took_s:.0%}, "
        f"computing {(after.worker.compute_s - before.worker.compute_s) / took_s:.0%}; "
        f"guesses {prefetch.issued}, right {prefetch.used + prefetch.promoted}; "
        f"{(after.worker.jobs - before.worker.jobs) / n / engine.spec.n_routed:.1f} jobs a layer; "
        f"major faults {(faults_after - faults_before) / n:.1f} a token",
        flush=True,
    )
    return n / took_s / limit


async def prefill(engine: Engine, arguments: argparse.Namespace, disk: Disk) -> float:
    """Print one round of computing a prompt; return its share of the limit."""
    before_rate, before = disk.probe(), engine.statistics()
    timings = (await engine.generate(prompt(engine, arguments.tokens, 0), max_tokens=1)).timings
    after, disk_rate = engine.statistics(), (before_rate + disk.probe()) / 2
    read = after.reader.bytes_read - before.reader.bytes_read
    every = disk.expert_bytes
    resident_s = arguments.tokens / arguments.resident
    limit_s = max(every / disk_rate, resident_s)
    print(
        f"{arguments.tokens / timings.prefill_s:6.1f} tokens/s = {limit_s / timings.prefill_s:4.0%} of the limit "
        f"({every / disk_rate:.2f} s to read, {resident_s:.2f} s to compute, took {timings.prefill_s:.2f}); "
        f"read {read / every:.2f} times the experts at {read / timings.prefill_s / 1e9:.2f} GB/s "
        f"(probe {disk_rate / 1e9:.2f}); batches of {engine.plan.limits.batch_tokens}, {engine.plan.slots} slots",
        flush=True,
    )
    return limit_s / timings.prefill_s


async def aggregate(engine: Engine, n_sequences: int, n_tokens: int) -> float:
    """Return the tokens/s of so many generations together."""
    first_s, last_s = [], []

    async def one(seed: int) -> None:
        async with engine.stream(prompt(engine, PROMPT_TOKENS, seed), max_tokens=n_tokens, ignore_eos=True) as stream:
            async for event in stream:
                if isinstance(event, mer.TokenEvent) and event.index == 0:
                    first_s.append(time.perf_counter())
        last_s.append(time.perf_counter())

    async with trio.open_nursery() as nursery:
        for seed in range(n_sequences):
            nursery.start_soon(one, seed)
    return n_sequences * (n_tokens - 1) / (max(last_s) - max(first_s))


async def concurrent(engine: Engine, arguments: argparse.Namespace, disk: Disk) -> float:
    """Print one round of many generations at once; return their rate by that of one."""
    one = await aggregate(engine, 1, arguments.tokens)
    many = await aggregate(engine, SEQUENCES, arguments.tokens)
    print(f"one {one:.2f} tokens/s, {SEQUENCES} at once {many:.2f} together: {many / one:.2f} times", flush=True)
    return many / one


def resident_tokens_per_s(arguments: argparse.Namespace) -> float:
    """Return the prompt tokens per second without a budget, the best of three."""

    async def main() -> float:
        async with mer.open_engine(arguments.model, prefix_reuse=False, batch_tokens=arguments.tokens) as engine:
            if engine.plan.slots < engine.plan.total_experts:
                raise SystemExit("there is not enough memory to measure the prompt with all experts in memory")
            times = []
            for _ in range(4):  # the first one reads
                done = await engine.generate(prompt(engine, arguments.tokens, 0), max_tokens=1)
                times.append(done.timings.prefill_s)
            return arguments.tokens / min(times)

    return trio.run(main)


def main() -> None:
    """Print a line for each round, and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "prefill", "concurrent", "resident"])
    parser.add_argument("model")
    parser.add_argument("memory", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--prefetch", default="auto")
    parser.add_argument("--io-engine", default=[], nargs="+", help="alternate between these; default: auto")
    parser.add_argument("--resident", type=float, help="prompt tokens/s with all experts in memory, if known")
    arguments = parser.parse_args()
    if arguments.tokens is None:
        arguments.tokens = {"prefill": 512, "resident": 512, "concurrent": 16}.get(arguments.what, 48)
    if arguments.what == "resident":
        print(resident_tokens_per_s(arguments))
        return
    if arguments.what == "prefill" and arguments.resident is None:
        command = [sys.executable, __file__, "resident", arguments.model, "--tokens", str(arguments.tokens)]
        arguments.resident = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    disk = Disk(arguments.model)
    measure = {"decode": decode, "prefill": prefill, "concurrent": concurrent}[arguments.what]

    async def one_round(io_engine: str) -> float:
        async with mer.open_engine(
            arguments.model,
            memory=arguments.memory,
            prefetch=arguments.prefetch,
            io_engine=io_engine,
            prefix_reuse=False,
        ) as engine:
            print(f"{engine.statistics().settings.io_engine:8}", end=" ")
            return await measure(engine, arguments, disk)

    ratios: dict[str, list[float]] = {io_engine: [] for io_engine in arguments.io_engine or ["auto"]}
    for number in range(arguments.rounds):
        arguments.seed = random.randrange(1 << 16)  # no round knows what another has learnt
        for io_engine in list(ratios)[:: -1 if number % 2 else 1]:
            ratios[io_engine].append(trio.run(one_round, io_engine))
    for io_engine, found in ratios.items():
        print(f"{io_engine}: median {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
