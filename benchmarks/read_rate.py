"""Compare the rate of ThreadReader on a file with the plainest O_DIRECT reads of the same chunk and depth.

Usage: python benchmarks/read_rate.py PATH [ROUNDS]

Both read the first 1 GiB of the file, or all of it, in turns A B A B ...; the medians and the median of the rounds'
ratios are printed. PATH should be on the disk to be measured and hold at least 1 GiB.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time

import trio

from mer.io.arena import Arena
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS
from mer.io.reader import ReadOperation
from mer.io.thread_reader import ThreadReader

OPERATION_BYTES = 16 * 1024 * 1024  # about one matrix of a large expert
SLOTS = 4


def probe(path: str, arena: Arena, n_bytes: int) -> float:
    """Return the bytes per second of DEFAULT_THREADS threads that read every so many chunks each."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(number: int) -> None:
        for offset in range(number * DEFAULT_CHUNK_BYTES, n_bytes, DEFAULT_THREADS * DEFAULT_CHUNK_BYTES):
            slot, begin = divmod(offset % arena.n_bytes, arena.slot_bytes(0))  # as much memory as the reader gets
            os.preadv(fd, [arena.view(slot)[begin : begin + DEFAULT_CHUNK_BYTES].data], offset)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(DEFAULT_THREADS)]
    began_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began_s
    os.close(fd)
    return n_bytes / took_s


def reader_rate(path: str, arena: Arena, n_bytes: int) -> float:
    """Return the bytes per second of a ThreadReader that always has SLOTS operations in flight."""

    async def main() -> float:
        done = trio.Event()
        offsets = iter(range(0, n_bytes, OPERATION_BYTES))
        left = n_bytes // OPERATION_BYTES

        with ThreadReader([path]) as reader:

            def start(slot: int) -> None:
                if (offset := next(offsets, None)) is not None:
                    reader.start(
                        ReadOperation(
                            file=0,
                            start=offset,
                            length=OPERATION_BYTES,
                            needed=OPERATION_BYTES,
                            buffer=arena.view(slot),
                            on_landed=lambda operation: landed(slot, operation),
                        )
                    )

            def landed(slot: int, operation: ReadOperation) -> None:
                nonlocal left
                if operation.error is not None:
                    raise operation.error
                left -= 1
                if not left:
                    done.set()
                start(slot)

            began_s = time.perf_counter()
            for slot in range(SLOTS):
                start(slot)
            await done.wait()
            return n_bytes / (time.perf_counter() - began_s)

    return trio.run(main)


def main(path: str, rounds: int) -> None:
    """Measure and print."""
    n_bytes = min(os.path.getsize(path), 1 << 30) // OPERATION_BYTES * OPERATION_BYTES
    if n_bytes == 0:
        raise SystemExit(f"{path} is smaller than {OPERATION_BYTES} bytes")
    arena = Arena((SLOTS,), (OPERATION_BYTES,))
    arena.view(0)[:] = arena.view(1)[:] = arena.view(2)[:] = arena.view(3)[:] = 0  # no page faults in the first round
    rates = []
    for _ in range(rounds):
        rates.append((reader_rate(path, arena, n_bytes), probe(path, arena, n_bytes)))
        print(f"reader {rates[-1][0] / 1e9:.2f} GB/s   probe {rates[-1][1] / 1e9:.2f} GB/s")
    ours, plain = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    print(f"median: reader {ours / 1e9:.2f} GB/s   probe {plain / 1e9:.2f} GB/s   ratio {ratio:.3f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 5)
