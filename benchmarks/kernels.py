"""Rate of every weight type's matrix product: GB/s of weights with one column (GEMV), GOPS with 64 (GEMM).

Usage: python benchmarks/kernels.py [TYPE ...]

Weights are random bytes, several matrices one after another, together so many that caches do not help a GEMV; the
memory rate that a plain read reaches stands above. Each figure is the best of 5 rounds; one operation is a multiply or
an add. To compare two versions, run them in turns: the speed of a machine drifts.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import numba
import numpy as np

from mer.compute.cpu.matrix import Activations, Matrix, PackedArea, float_stride, multiply, stored_bytes
from mer.compute.cpu.program import Memory, Program
from mer.compute.cpu.worker import Team
from mer.compute.kernels.matmul import STEPS
from mer.compute.kernels.runtime import run_alone
from mer.compute.kernels.target import FORM
from mer.compute.kernels.tile import FORMATS
from mer.compute.kernels.words import COUNTER
from mer.io.ggml import GGMLType

ROWS, COLS = 4096, 14336  # Mixtral's down projection
GEMV_BYTES = 768 << 20
GEMM_COLUMNS, GEMM_MATRICES = 64, 2
ROUNDS = 5
BITS = {  # {type: (kept random bits, bits set)}, for numbers from 1 to 2
    GGMLType.F32: (0x807FFFFF_807FFFFF, 0x3F800000_3F800000),
    GGMLType.F16: (0x83FF_83FF_83FF_83FF, 0x3C00_3C00_3C00_3C00),
    GGMLType.BF16: (0x807F_807F_807F_807F, 0x3F80_3F80_3F80_3F80),
}


def best_s(work: Callable[[], object]) -> float:
    """Return the shortest time of ROUNDS runs, in seconds."""
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def product_s(kind: GGMLType, n_matrices: int, columns: int, n_threads: int, weights: Memory) -> float:
    """Return the seconds that `n_matrices` different matrices take to multiply `columns` columns each."""
    fmt = FORMATS.get(int(kind))
    each = stored_bytes(kind, ROWS, COLS)
    out_stride = float_stride(ROWS)
    room = Memory(columns * (float_stride(COLS) + out_stride + COLS) + 3 * columns * COLS + 4096)
    x = room.cut(columns * float_stride(COLS))
    room.floats(x, columns, COLS)[:] = np.random.default_rng(0).normal(size=(columns, COLS))
    out = room.cut(columns * out_stride)
    areas = {} if fmt is None else {fmt.block_weights: PackedArea.cut(room, fmt, columns, COLS)}
    activations = Activations(columns, x, float_stride(COLS), areas)
    team, packing, program = Team(n_threads), Program(), Program()
    activations.pack(packing, COLS, {kind})
    for i in range(n_matrices):
        matrix = Matrix(kind, ROWS, COLS, weights.address + i * each)
        multiply(program, matrix, activations, out, out_stride, n_threads)
        program.barrier()

    def run() -> None:
        program.rows[:, COUNTER] = 0
        team.start(program)
        team.block()

    if packing.length:
        run_alone(packing.address, packing.length)
    team.open()
    try:
        return best_s(run)
    finally:
        team.close()


@numba.njit(nogil=True)
def read(words: np.ndarray) -> int:
    """Add up all words, so that they must be read."""
    total = 0
    for word in words:
        total += word
    return total


def read_s(weights: Memory, n_threads: int) -> float:
    """Return the seconds that reading all weights takes."""
    pieces = np.array_split(weights.bytes.view(np.int64), n_threads)

    def run() -> None:
        threads = [threading.Thread(target=read, args=(piece,)) for piece in pieces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    read(pieces[0][:8])
    return best_s(run)


def main() -> None:
    """Print a line for the memory and one for each type, on 1 and 2 threads."""
    kinds = [GGMLType[name] for name in sys.argv[1:]] or [GGMLType(kind) for kind in STEPS]
    most = max(stored_bytes(kind, ROWS, COLS) for kind in kinds)
    weights = Memory(max(GEMV_BYTES, GEMM_MATRICES * most))
    noise = np.random.default_rng(0).integers(0, 1 << 64, len(weights.bytes) // 8, np.uint64)
    weights.bytes.view(np.uint64)[:] = noise
    print(f"kernels {FORM.value}")
    for n_threads in (1, 2):
        rate = len(weights.bytes) / read_s(weights, n_threads) / 1e9
        print(f"{n_threads} threads  read    {rate:6.1f} GB/s")
        for kind in kinds:
            keep, put = BITS.get(kind, (0xBFBFBFBFBFBFBFBF, 0))  # every half float finite
            np.bitwise_or(noise & np.uint64(keep), np.uint64(put), out=weights.bytes.view(np.uint64))
            each = stored_bytes(kind, ROWS, COLS)
            n = len(weights.bytes) // each
            gemv = n * each / product_s(kind, n, 1, n_threads, weights) / 1e9
            operations = 2 * ROWS * COLS * GEMM_COLUMNS * GEMM_MATRICES
            gemm = operations / product_s(kind, GEMM_MATRICES, GEMM_COLUMNS, n_threads, weights) / 1e9
            print(f"{n_threads} threads  {kind.name:6}  {gemv:6.1f} GB/s GEMV  {gemm:7.0f} GOPS GEMM", flush=True)


if __name__ == "__main__":
    main()
