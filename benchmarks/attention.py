"""Attention over the KV cache: GB/s of keys and values when decoding, beside a plain memory read; GFLOPS of a prefill.

Usage: python benchmarks/attention.py [TYPE ...] [--heads H,G,C] [--threads N] [--depths D,...] [--rounds N] [--chunk T]

Decoding is one token of one sequence. So many copies of a layer's KV are attended to in turn, in blocks of a random
order, that they are 512 MiB together and no cache helps. Rounds alternate: a plain read of the same memory (all
threads summing it), then each type at each depth; the figures are medians of the rounds. A prefill is a chunk of T
tokens at the depth; one operation is a multiply or an add, 4 C for each pair of a query head and a position it sees.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time

import numba
import numpy as np

from mer.compute.cpu.blocks.attention import KV_KINDS
from mer.compute.cpu.matrix import float_stride
from mer.compute.cpu.program import Memory, Program
from mer.compute.cpu.worker import Team
from mer.compute.kernels.attention import ATTENTION, split_bytes, split_tokens, thread_bytes
from mer.compute.kernels.kv_layout import KV_TILE, tile_bytes
from mer.compute.kernels.target import FORM
from mer.compute.kernels.words import COUNTER

KV_BYTES = 512 << 20


@numba.njit(nogil=True, cache=True)
def _sum(values: np.ndarray) -> int:
    total = np.int64(0)
    for value in values:
        total += value
    return total


def read_rate(memory: Memory, n_threads: int) -> float:
    """Return the bytes per second at which all threads together read the memory."""
    parts = np.array_split(memory.bytes.view(np.int64), n_threads)
    threads = [threading.Thread(target=_sum, args=(part,)) for part in parts]
    begun_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(memory.bytes) / (time.perf_counter() - begun_s)


class Case:
    """Programs that attend with `n` tokens behind `depth` others, over copies of a layer's KV."""

    def __init__(self, kv: Memory, kind: int, heads: tuple[int, int, int], depth: int, n: int, n_threads: int) -> None:
        h, g, c = heads
        self.n_threads, self.n = n_threads, n
        self.pairs = h * sum(depth + 1 + t for t in range(n))
        blocks = -(-(depth + n) // KV_TILE)
        block_bytes = 2 * g * tile_bytes(kind, c)
        copies = max(1, KV_BYTES // (blocks * block_bytes)) if n == 1 else 1
        self.copy_bytes = (depth + n) * block_bytes // KV_TILE
        self.copies = copies
        rng = np.random.default_rng(0)
        tables = rng.permutation(KV_BYTES // block_bytes)[: copies * blocks].astype(np.int32).reshape(copies, blocks)
        split = split_tokens(n_threads, g, n)
        sizes = {
            "q": n * h * float_stride(c),
            "out": n * float_stride(h * c),
            "scratch": n_threads * thread_bytes(*heads),
            "parts": split_bytes(split, *heads, blocks),
            "positions": 4 * n,
            "sequences": 4 * n,
            "table": tables.nbytes,
            "scale": 4,
        }
        self.room = Memory(sum(size + 64 for size in sizes.values()))
        a = {name: self.room.cut(size) for name, size in sizes.items()}
        self.room.floats(a["q"], n * h * float_stride(c) // 4)[:] = rng.normal(size=n * h * float_stride(c) // 4)
        self.room.floats(a["scale"], 1)[:] = c**-0.5
        self.room.ints(a["positions"], n)[:] = depth + np.arange(n)
        self.room.ints(a["table"], tables.size)[:] = tables.ravel()
        self.program = Program()
        for copy in range(copies):
            self.program.add(
                ATTENTION[kind].row(
                    q=a["q"],
                    n=n,
                    heads=h << 32 | g,
                    c=c,
                    scale=a["scale"],
                    kv=kv.address,
                    block_bytes=block_bytes,
                    positions=a["positions"],
                    sequences=a["sequences"],
                    table=a["table"] + 4 * copy * blocks,
                    max_blocks=blocks,
                    out=a["out"],
                    out_stride=float_stride(h * c),
                    scratch=a["scratch"],
                    scratch_stride=thread_bytes(*heads),
                    window=0,
                    split=split,
                    counters=a["parts"],
                    sinks=0,
                )
            )
            self.program.barrier()

    def run_s(self, team: Team) -> float:
        """Return the seconds of one pass over all copies."""
        self.program.rows[:, COUNTER] = 0
        begun_s = time.perf_counter()
        team.start(self.program)
        team.block()
        return time.perf_counter() - begun_s


def fill(kv: Memory, kind: int, heads: tuple[int, int, int]) -> None:
    """Make every byte of the memory part of finite numbers."""
    words = kv.bytes.view(np.uint32)
    noise = np.random.default_rng(1).integers(0, 1 << 32, 1 << 20, np.uint32)
    keep, put = {0: (0x807FFFFF, 0x3F000000), 1: (0x83FF83FF, 0x38003800), 8: (0x0FFF0FFF, 0)}[kind]
    words[:] = np.resize(noise & np.uint32(keep) | np.uint32(put), len(words))


def main() -> None:
    """Print a line for each type and depth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=[*KV_KINDS], help="f32, f16, q8_0; all by default")
    parser.add_argument("--heads", default="32,8,128", help="query heads, KV heads, head dimension")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depths", default="512,2048,8192")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a prefill; 0 leaves it out")
    options = parser.parse_args()
    h, g, c = (int(number) for number in options.heads.split(","))
    depths = [int(depth) for depth in options.depths.split(",")]
    kv = Memory(KV_BYTES)
    team = Team(options.threads)
    team.open()
    _sum(kv.bytes.view(np.int64)[:8])
    print(f"kernels {FORM.value}, {options.threads} threads, {h} heads, {g} KV heads of {c}")
    try:
        for name in options.types:
            kind = KV_KINDS[name]
            fill(kv, kind, (h, g, c))
            for n in [1, options.chunk] if options.chunk else [1]:
                cases = {depth: Case(kv, kind, (h, g, c), depth, n, options.threads) for depth in depths}
                rates: list[float] = []
                times: dict[int, list[float]] = {depth: [] for depth in depths}
                for at in range(options.rounds + 1):
                    rate = read_rate(kv, options.threads)
                    for depth, case in cases.items():
                        took_s = case.run_s(team)
                        if at:  # the first round warms up
                            times[depth].append(took_s)
                    if at:
                        rates.append(rate)
                memory_rate = statistics.median(rates)
                for depth, case in cases.items():
                    took_s = statistics.median(times[depth])
                    if n == 1:
                        got = case.copies * case.copy_bytes / took_s
                        print(
                            f"{name:5} depth {depth:6}  {got / 1e9:5.1f} GB/s of KV, {got / memory_rate:4.0%} of "
                            f"{memory_rate / 1e9:.1f}; {took_s / case.copies * 1e6:8.1f} us a layer",
                            flush=True,
                        )
                    else:
                        print(
                            f"{name:5} depth {depth:6}  {4 * c * case.pairs / took_s / 1e9:5.0f} GFLOPS, "
                            f"{n} tokens in {took_s * 1e3:.1f} ms a layer",
                            flush=True,
                        )
    finally:
        team.close()


if __name__ == "__main__":
    sys.exit(main())
