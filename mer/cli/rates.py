"""Quick measurements of this machine, so that a plan can say what will bind: the disk or the memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mer.bench import probe
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS
from mer.io.extents import ExpertMap
from mer.io.gguf import GGUFFile

MEMORY_BYTES = 128 << 20  # far more than the processor caches
_PASSES = 3


def disk_bytes_per_s(gguf: GGUFFile, experts: ExpertMap) -> float:
    """Return how fast experts are read, spread over the model as routing spreads them, or a dense model's weights."""
    every = [(part.file, part.offset, part.n_bytes) for layer in experts.experts for it in layer for part in it.parts]
    every = every or [(tensor.file, tensor.offset, tensor.n_bytes) for tensor in gguf.tensors.values()]
    extents = [(offset, n_bytes) for file, offset, n_bytes in every if file == every[0][0]]
    path = Path(gguf.paths[every[0][0]])
    return probe.disk_bytes_per_s(path, extents, chunk_bytes=DEFAULT_CHUNK_BYTES, depth=DEFAULT_THREADS)


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
