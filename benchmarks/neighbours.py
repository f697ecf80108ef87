"""Decoding beside busy neighbours: tokens/s with the default number of threads and with fixed ones, in turns.

Usage: python benchmarks/neighbours.py MODEL [--memory SIZE] [--tokens N] [--rounds N] [--loops N ...] [--vs BINARY]

For each number of busy loops (processes that never sleep, of the same niceness) every number of threads generates the
same tokens in turns, whose order rotates. The ratio is that of the default to the best fixed number, by medians; what
others take shows in the rate beside no loop at all. --vs lets llama.cpp's llama-bench generate as many tokens in its
turn, with as many threads as the default.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import trio

import mer
from mer.bench.cases import Case
from mer.bench.llama import command, parse
from mer.config import default_threads


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """Keep so many processes busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


async def rate(engine: mer.Engine, n_tokens: int) -> float:
    """Return the tokens/s of one generation, its prompt not counted."""
    prompt = [7919 * i % engine.spec.vocab_size for i in range(16)]
    done = await engine.generate(prompt, max_tokens=n_tokens, ignore_eos=True)
    return (n_tokens - 1) / done.timings.decode_s


async def main(arguments: argparse.Namespace) -> None:
    """Print a line for each number of busy loops."""
    path = mer.embedded_model_path() if arguments.model == "embedded" else Path(arguments.model)
    fixed = sorted({1, default_threads()})
    async with AsyncExitStack() as stack:
        engines = {}
        for threads in (None, *fixed):
            engines[threads] = await stack.enter_async_context(
                mer.open_engine(path, memory=arguments.memory, threads=threads)
            )
            await rate(engines[threads], arguments.tokens)
        print(f"{engines[None].statistics().settings.kernels}, default {default_threads()} threads")
        for loops in arguments.loops:
            rates: dict[int | None, list[float]] = {threads: [] for threads in engines}
            llama: list[float] = []
            with busy_loops(loops):
                for number in range(arguments.rounds):
                    turns = list(engines)
                    for threads in turns[number % len(turns) :] + turns[: number % len(turns)]:
                        rates[threads].append(await rate(engines[threads], arguments.tokens))
                    if arguments.vs is not None:
                        case = Case(n_gen=arguments.tokens)
                        line = command(arguments.vs, path, case, default_threads(), "f16")
                        done = await trio.run_process(line, capture_stdout=True, capture_stderr=True, check=False)
                        out, err = done.stdout.decode(), done.stderr.decode()
                        llama.append(parse(case, line, done.returncode, out, err).tokens_per_s)
            medians = {threads: statistics.median(values) for threads, values in rates.items()}
            best = max(medians[threads] for threads in fixed)
            shown = ", ".join(f"{threads} threads {medians[threads]:.1f}" for threads in fixed)
            line = f"{loops} busy loops: default {medians[None]:.1f} tokens/s, {shown}: {medians[None] / best:.2f}"
            if llama:
                line += f"; llama-bench {statistics.median(llama):.1f}: {medians[None] / statistics.median(llama):.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help='a GGUF file, or "embedded"')
    parser.add_argument("--memory", default=None)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--vs", type=Path, default=None)
    trio.run(main, parser.parse_args())
