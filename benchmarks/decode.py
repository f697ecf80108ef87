"""Decoding against the limits of this machine: tokens/s, GB/s of weights, and the shares of memory and disk rate.

Usage: python benchmarks/decode.py MODEL [MEMORY] [TOKENS] [ROUNDS]

Rounds alternate a plain memory read (all threads summing an array of 1 GiB) with a greedy generation of TOKENS tokens.
A token touches a known number of weight bytes; what misses the slots is read from the disk. Three figures follow:

- weights GB/s: bytes touched per token times tokens/s, and its share of the memory rate measured just before;
- read GB/s: bytes of experts read while decoding, by time;
- the ratio to 1 / (bytes touched / memory rate), the limit when everything is resident.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time

import numba
import numpy as np
import trio

import mer


@numba.njit(nogil=True, cache=True)
def _sum(values: np.ndarray) -> int:
    total = np.int64(0)
    for value in values:
        total += value
    return total


def memory_rate(values: np.ndarray, n_threads: int) -> float:
    """Return the bytes per second at which all threads together read an array."""
    threads = [threading.Thread(target=_sum, args=(part,)) for part in np.array_split(values, n_threads)]
    begun_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return values.nbytes / (time.perf_counter() - begun_s)


async def main() -> None:
    """Print one line per round and the medians."""
    path = sys.argv[1]
    memory = sys.argv[2] if len(sys.argv) > 2 else None
    n_tokens, rounds = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((3, 48), (4, 5)))
    values = np.ones(1 << 27, np.int64)
    _sum(values[:16])
    async with mer.open_engine(path, memory=memory) as engine:
        plan = engine.plan
        settings = engine.statistics().settings
        print(f"{settings.kernels}, {settings.activations}, {settings.threads} threads, {plan.slots} slots")
        touched = plan.expert_bytes_per_token + plan.dense_bytes_per_token
        prompt = [7919 * i % engine.spec.vocab_size for i in range(16)]
        await engine.generate(prompt, max_tokens=n_tokens, ignore_eos=True)
        shares, rates = [], []
        for _ in range(rounds):
            memory_bytes_per_s = memory_rate(values, settings.threads)
            timings = (await engine.generate(prompt, max_tokens=n_tokens, ignore_eos=True)).timings
            tokens_per_s = (n_tokens - 1) / timings.decode_s
            shares.append(tokens_per_s * touched / memory_bytes_per_s)
            rates.append(tokens_per_s)
            print(
                f"{tokens_per_s:6.2f} tokens/s, weights {tokens_per_s * touched / 1e9:5.1f} GB/s "
                f"= {shares[-1]:4.0%} of {memory_bytes_per_s / 1e9:.1f}; "
                f"read {timings.decode_bytes_read / timings.decode_s / 1e9:.2f} GB/s"
            )
        print(f"median {statistics.median(rates):.2f} tokens/s, {statistics.median(shares):.0%} of the memory rate")


if __name__ == "__main__":
    trio.run(main)
