"""Quick measurements of this machine, so that a plan can say what will bind: the disk or the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from mer.io.arena import map_anonymous
from mer.io.extents import ExpertMap, aligned_hull
from mer.io.files import ModelFile
from mer.io.gguf import GGUFFile

READ_THREADS = 4  # as many reads at once as an engine has by default
MAX_READ_BYTES = 256 << 20
MEMORY_BYTES = 128 << 20  # far more than the processor caches
_PASSES = 3


def disk_bytes_per_s(gguf: GGUFFile, experts: ExpertMap) -> float:
    """Return how fast experts are read, spread over the model as routing would spread them; at most 256 MiB."""
    every = [part for layer in experts.experts for extents in layer for part in extents.parts]
    longest = max(part.n_bytes for part in every)
    n_reads = max(1, min(len(every), MAX_READ_BYTES // longest))
    chosen = list(islice(every, 0, None, max(1, len(every) // n_reads)))[:n_reads]
    files = [ModelFile(path) for path in gguf.paths]
    buffers = [memoryview(map_anonymous(longest + 3 * 4096)) for _ in range(READ_THREADS)]

    def read(thread: int) -> int:
        done = 0
        for part in chosen[thread::READ_THREADS]:
            file = files[part.file]
            start, length, lead = aligned_hull(part.offset, part.n_bytes, file.mode.alignment)
            file.read_into(buffers[thread][:length], start, lead + part.n_bytes)
            done += length
        return done

    try:
        return _rate(read, READ_THREADS)
    finally:
        for file in files:
            file.close()


def memory_bytes_per_s(threads: int) -> float:
    """Return how fast so many threads read memory together; the best of three passes."""
    parts = [np.ones(MEMORY_BYTES // 8 // threads, np.uint64) for _ in range(threads)]

    def add(thread: int) -> int:
        parts[thread].sum()
        return parts[thread].nbytes

    return max(_rate(add, threads) for _ in range(_PASSES))


def _rate(work: Callable[[int], int], threads: int) -> float:
    """Return the bytes per second that `threads` calls of `work`, each given its number, get through together."""
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(lambda _: None, range(threads)))  # threads are started outside the measured time
        started_s = time.perf_counter()
        n_bytes = sum(executor.map(work, range(threads)))
        return n_bytes / max(time.perf_counter() - started_s, 1e-9)
