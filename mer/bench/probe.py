"""What the disk gives to the plainest reads, as the limit that a run is compared with."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

from mer.io.arena import map_anonymous
from mer.io.extents import aligned_hull
from mer.io.files import ModelFile

MAX_BYTES: Final = 256 << 20  # read by one probe


def disk_bytes_per_s(path: Path, extents: Sequence[tuple[int, int]], *, chunk_bytes: int, depth: int) -> float:
    """Return the rate at which whole extents are read, in a random order that is always the same.

    Blocks until about `MAX_BYTES` are read, directly where the filesystem allows it.

    Args:
        path: the file.
        extents: (offset, length) of what may be read; at least one.
        chunk_bytes: the longest read; extents are cut into pieces of it.
        depth: reads under way at once.

    Raises:
        ReadError: the file cannot be read.
    """
    with closing(ModelFile(path)) as file:
        chunks = list(_chunks(extents, chunk_bytes, file.mode.alignment))
        buffers = [memoryview(map_anonymous(max(length for _, length, _ in chunks))) for _ in range(depth)]
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))  # no page faults while the clock runs
        left = iter(chunks)  # `next` of it is atomic

        def read(number: int) -> int:
            done = 0
            for start, length, needed in left:
                file.read_into(buffers[number][:length], start, needed)
                done += length
            return done

        with ThreadPoolExecutor(depth) as executor:
            list(executor.map(lambda _: None, range(depth)))  # threads are started outside the measured time
            begun_s = time.perf_counter()
            n_bytes = sum(executor.map(read, range(depth)))
            return n_bytes / max(time.perf_counter() - begun_s, 1e-9)


def _chunks(extents: Sequence[tuple[int, int]], chunk_bytes: int, alignment: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, length and needed bytes of aligned reads that cover extents, up to `MAX_BYTES` in all."""
    left = MAX_BYTES
    for offset, n_bytes in random.Random(0).sample(extents, len(extents)):
        start, length, lead = aligned_hull(offset, n_bytes, alignment)
        for begin in range(0, length, chunk_bytes):
            size = min(chunk_bytes, length - begin)
            yield start + begin, size, min(size, lead + n_bytes - begin)
            left -= size
            if left <= 0:
                return
