"""Rate of the disk with the plainest reads: the limit that a run is compared with."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

from mer.io.arena import ask_for_huge_pages, map_anonymous
from mer.io.extents import aligned_hull, round_up
from mer.io.files import ModelFile

MAX_BYTES: Final = 512 << 20  # read by one probe
_HUGE_PAGE_BYTES: Final = 2 << 20


def disk_bytes_per_s(path: Path, extents: Sequence[tuple[int, int]], *, chunk_bytes: int, depth: int) -> float:
    """Return the rate at which whole extents are read, in a random order that is always the same.

    Blocks until about `MAX_BYTES` are read, directly where the filesystem allows it.

    Args:
        path: the file.
        extents: (offset, length) of what may be read; at least one.
        chunk_bytes: the longest read; extents are cut into pieces of it.
        depth: reads in flight at once.

    Raises:
        ReadError: the file cannot be read.
    """
    with closing(ModelFile(path)) as file:
        chunks = list(_chunks(extents, chunk_bytes, file.mode.alignment))
        buffers = [_read_buffer(max(length for _, length, _ in chunks)) for _ in range(depth)]
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


def _read_buffer(n_bytes: int) -> memoryview:
    """Return memory of the same kind as an engine's slots, in huge pages; reading into it faults no page."""
    memory = map_anonymous(round_up(n_bytes, _HUGE_PAGE_BYTES))
    ask_for_huge_pages(memory)
    buffer = memoryview(memory)
    buffer[:] = bytes(len(buffer))
    return buffer[:n_bytes]


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
