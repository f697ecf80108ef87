"""Running single kernel steps on areas between canaries."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.matrix import (
    Activations,
    Matrix,
    PackedArea,
    RawRoom,
    float_stride,
    multiply,
    raw_bytes,
    stored_bytes,
)
from mer.compute.cpu.matrix import product as made_product
from mer.compute.cpu.program import Program
from mer.compute.kernels.entry import PAIR, ROW, ZERO, flags
from mer.compute.kernels.interleave import ROWS
from mer.compute.kernels.matmul import INTERLEAVE_STEPS
from mer.compute.kernels.step import Row, Step
from mer.compute.kernels.tile import FORMATS
from mer.compute.kernels.words import COUNTER
from mer.io.ggml import GGMLType

MARGIN = 256  # canary bytes before and after every area
CANARY = 0xFF  # as float32, float16 or bfloat16: NaN, so that a read outside spoils results
_ENTRY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


class Areas:
    """Areas of memory for a step's arguments, each between canaries."""

    def __init__(self) -> None:
        self._buffers: list[tuple[U8, int, int]] = []

    def room(self, n_bytes: int, shift: int = 0) -> U8:
        """Return canary-filled bytes whose address is a multiple of 64, plus `shift`."""
        buffer = np.full(n_bytes + 2 * MARGIN + 128, CANARY, np.uint8)
        start = MARGIN + -(buffer.ctypes.data + MARGIN) % 64 + shift
        self._buffers.append((buffer, start, start + n_bytes))
        return buffer[start : start + n_bytes]

    def put(self, array: npt.NDArray[Any], shift: int = 0) -> int:
        """Copy an array into an area and return its address."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        area = self.room(len(raw), shift)
        area[:] = raw
        return int(area.ctypes.data)

    def put_rows(self, array: F32, pad: float = np.nan) -> int:
        """Copy rows of float32 into an area where each takes whole vectors of 16, and return its address."""
        rows, cols = array.shape
        padded = np.full((rows, float_stride(cols) // 4), pad, np.float32)
        padded[:, :cols] = array
        return self.put(padded)

    def put_entries(self, entries: Sequence[tuple[int, int, int]]) -> int:
        """Return the address of a table of (rows, first row, first pair), without matrices."""
        return self.put(np.array([(0, 0, 0, *entry, 0, 0) for entry in entries], np.int64))

    def floats(self, *shape: int) -> F32:
        """Return an area of float32, NaN throughout."""
        return self.room(4 * int(np.prod(shape))).view(np.float32).reshape(shape)

    def ints(self, *shape: int) -> npt.NDArray[np.int32]:
        """Return an area of int32."""
        return self.room(4 * int(np.prod(shape))).view(np.int32).reshape(shape)

    def check(self) -> None:
        """Fail if a byte outside the areas has changed."""
        for buffer, start, end in self._buffers:
            outside = np.concatenate([buffer[:start], buffer[end:]])
            assert (outside == CANARY).all(), f"bytes beside an area of {end - start} were written"


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return int(array.ctypes.data)


def run_program(program: Program, n_threads: int = 1) -> None:
    """Run a program's steps in order, each for all thread numbers one after another, the last thread first."""
    for row in program.rows[: program.length]:
        row[COUNTER] = 0
        for thread in reversed(range(n_threads)):
            _ENTRY(int(row[0]))(row.ctypes.data, thread, n_threads)


def row_of(step: Step, *values: int) -> Row:
    """Return a step's row from the values of all its words, in the order of their declaration."""
    return step.row(**dict(zip(step.words, values, strict=True)))


def run_step(step: Step, *arguments: int, n_threads: int = 1) -> None:
    """Run one step for all thread numbers."""
    program = Program()
    program.add(row_of(step, *arguments))
    run_program(program, n_threads)


def tiles(areas: Areas, kind: GGMLType, raw: U8, rows: int, cols: int, n_threads: int = 1) -> Matrix:
    """Return a matrix in memory in the kernels' layout, from the file's bytes."""
    n_blocks = cols // kind.block_size
    if int(kind) not in INTERLEAVE_STEPS:
        return Matrix(kind, rows, cols, areas.put(raw, shift=2))
    row_bytes = n_blocks * kind.block_bytes
    target = areas.room(stored_bytes(kind, rows, cols), shift=32)
    scratch = areas.room(n_threads * ROWS * row_bytes)
    run_step(
        INTERLEAVE_STEPS[int(kind)], areas.put(raw, shift=3), address(target), rows, n_blocks, kind.block_bytes,
        address(scratch), n_threads=n_threads,
    )  # fmt: skip
    return Matrix(kind, rows, cols, address(target))


def product(
    kind: GGMLType,
    raw: U8,
    rows: int,
    x: F32,
    *,
    planes: int = 1,
    out: F32 | None = None,
    n_threads: int = 1,
) -> F32:
    """Return x @ W.T [n, rows] by the kernels, from W's bytes in the file and x [n, cols].

    Args:
        kind: type of W.
        raw: its bytes.
        rows: its rows.
        x: activations.
        planes: int8 planes that they are rounded to, if W is quantized.
        out: what to add the product to.
        n_threads: thread numbers that share the work.
    """
    n, cols = x.shape
    areas = Areas()
    matrix = tiles(areas, kind, raw, rows, cols, n_threads)
    fmt = FORMATS.get(int(kind))
    packed = {}
    if fmt is not None:
        q, scales, sums = (address(areas.room(size)) for size in PackedArea.sizes(fmt, n, cols, planes))
        packed[fmt.block_weights] = PackedArea(fmt.block_weights, fmt.sums_per_block, q, scales, sums, planes)
    activations = Activations(n, areas.put_rows(x), float_stride(cols), packed)
    results = areas.floats(n, float_stride(rows) // 4)
    if out is not None:
        results[:, :rows] = out
    program = Program()
    activations.pack(program, cols, {kind})
    multiply(program, matrix, activations, address(results), float_stride(rows), n_threads, add=out is not None)
    run_program(program, n_threads)
    areas.check()
    if fmt is None:
        assert np.isnan(results[:, rows:]).all()
    return results[:, :rows].copy()


def products(
    kind: GGMLType,
    weights: Sequence[Sequence[U8]],
    rows: int,
    x: Sequence[F32],
    fresh: Sequence[int],
    *,
    planes: int,
    first: int,
    shared: bool,
    n_threads: int,
) -> list[list[F32]]:
    """Return the products of a table's matrices, for each entry and matrix.

    Args:
        kind: type of the matrices.
        weights: for each entry two matrices as they are in the file.
        rows: their rows.
        x: for each entry its activations [n, cols].
        fresh: for each entry the bits that say which matrices lie there as they are in the file.
        planes: int8 planes of the activations.
        first: number of the first matrix in the entry, 0 to 2.
        shared: whether all entries have the same activations.
        n_threads: thread numbers that share the work.
    """
    areas, program = Areas(), Program()
    counts = [len(part) for part in x]
    firsts = np.cumsum([0, *counts])
    cols, fmt = x[0].shape[1], FORMATS.get(int(kind))
    every = x[0] if shared else np.concatenate(list(x))
    packed = {}
    if fmt is not None:
        q, scales, sums = (address(areas.room(size)) for size in PackedArea.sizes(fmt, len(every), cols, planes))
        packed[fmt.block_weights] = PackedArea(fmt.block_weights, fmt.sums_per_block, q, scales, sums, planes)
    source, stride = areas.put_rows(every), float_stride(rows)
    words = []
    for number, pair in enumerate(weights):
        at = [0, 0, 0, 0]
        for m, raw in enumerate(pair, first):
            if fmt is not None and fresh[number] >> (m // 2) & 1:
                there = areas.room(stored_bytes(kind, rows, cols), shift=6)
                there[: raw.size] = raw.reshape(-1)
                at[m] = address(there)
            else:
                at[m] = tiles(areas, kind, raw, rows, cols).address
        own = 0 if shared else int(firsts[number])
        words.append((*at[:3], counts[number], own, int(firsts[number]), fresh[number], 0))
    pieces = [(1, 0, 0)] if shared else [(n, int(begin), 0) for n, begin in zip(counts, firsts, strict=False)]
    for area in packed.values():
        program.add_on(area.pack(cols, source, float_stride(cols)), areas.put_entries(pieces), len(pieces))
    results = areas.floats(2, max(sum(counts), 1), stride // 4)
    raw_room = RawRoom(address(areas.room(n_threads * raw_bytes(kind, cols))), raw_bytes(kind, cols))
    settings = flags(first, 2, x=ZERO if shared else ROW, out=PAIR)
    made = made_product(
        Matrix(kind, rows, cols, 0), Activations(1, source, float_stride(cols), packed), address(results), stride,
        n_threads, settings, out_step=results[0].nbytes, raw=raw_room,
    )  # fmt: skip
    program.add_on(made, areas.put(np.array(words, np.int64)), len(words))
    run_program(program, n_threads)
    areas.check()
    return [
        [results[m, begin : begin + n, :rows].copy() for m in range(2)] if n else []
        for n, begin in zip(counts, firsts, strict=False)
    ]
