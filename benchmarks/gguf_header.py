"""Time to read the header of a model with 150 k tokens and their merges, beside `gguf.GGUFReader`.

Usage: python benchmarks/gguf_header.py [MODEL.gguf]

Without an argument, a file with a vocabulary of Qwen3's size is written to a temporary folder.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from mer.io.gguf import read_gguf
from mer.units import format_bytes

N_TOKENS = 151_936
N_MERGES = 151_387


def write_model(path: Path) -> None:
    """Write a file with N_TOKENS tokens of about 6 bytes, as many types, N_MERGES merges, and 600 tensors."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, 97 + rng.integers(0, 26, n))) for n in rng.poisson(6, N_TOKENS)]
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_token_list([f"{word}\u0120" for word in words])
    writer.add_token_types(np.ones(N_TOKENS, dtype=np.int32).tolist())
    writer.add_token_merges([f"{word[:2]} {word[2:]}" for word in words[:N_MERGES]])
    for i in range(600):
        writer.add_tensor(f"blk.{i}.weight", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def best_s(read: Callable[[Path], object], path: Path, repeats: int) -> float:
    """Return the shortest of `repeats` times in seconds; the file is in the page cache."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        read(path)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print both times and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "vocabulary.gguf")
        if len(sys.argv) == 1:
            write_model(path)
        header_bytes = read_gguf(path).header_bytes
        ours = best_s(read_gguf, path, repeats=5)
        theirs = best_s(gguf.GGUFReader, path, repeats=1)
    print(f"header            {format_bytes(header_bytes)}")
    print(f"mer.io.gguf       {ours:.3f} s")
    print(f"gguf.GGUFReader   {theirs:.3f} s")
    print(f"ratio             {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
