"""Weight matrices in memory, activations in the forms that the kernels read, and the product of the two."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from mer.compute.cpu.program import Memory, Program
from mer.compute.kernels.blocks import BlockFormat
from mer.compute.kernels.entry import flags
from mer.compute.kernels.interleave import FIELDS, ROWS
from mer.compute.kernels.matmul import block_format, matmul_step
from mer.compute.kernels.pack import pack
from mer.compute.kernels.step import Row
from mer.io.extents import round_up
from mer.io.ggml import GGMLType

FLOAT_BYTES = 4
_CHUNKS_PER_THREAD = 4  # work is handed out in about this many pieces per thread


@attrs.frozen
class Matrix:
    """A weight matrix at an address; quantized types lie in tiles of 16 rows, the last one padded with zero rows."""

    type: GGMLType
    rows: int
    cols: int
    address: int

    @property
    def n_blocks(self) -> int:
        """Blocks in a row."""
        return self.cols // self.type.block_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.n_blocks * self.type.block_bytes


def is_tiled(kind: GGMLType) -> bool:
    """Return whether a type is kept in 16-row tiles."""
    return int(kind) in FIELDS


def stored_bytes(kind: GGMLType, rows: int, cols: int) -> int:
    """Return the bytes a matrix takes in memory, padding rows included."""
    return (round_up(rows, ROWS) if is_tiled(kind) else rows) * (cols // kind.block_size) * kind.block_bytes


def float_stride(n: int) -> int:
    """Return the bytes of a row of n float32 padded to whole vectors of 16."""
    return FLOAT_BYTES * round_up(n, ROWS)


@attrs.frozen
class PackedArea:
    """Room for packed activations in blocks of one size, each value in one int8 plane or in two."""

    block_weights: int
    sums_per_block: int
    xq: int
    xs: int
    xsum: int
    planes: int = 1

    @classmethod
    def sizes(cls, fmt: BlockFormat, rows: int, cols: int, planes: int = 1) -> tuple[int, int, int]:
        """Return the bytes of values, scales and sums."""
        blocks = rows * round_up(cols, fmt.block_weights) // fmt.block_weights
        return planes * rows * cols, FLOAT_BYTES * blocks, FLOAT_BYTES * planes * blocks * fmt.sums_per_block

    @classmethod
    def cut(cls, memory: Memory, fmt: BlockFormat, rows: int, cols: int, planes: int = 1) -> PackedArea:
        """Take the room for `rows` rows of `cols` from `memory`."""
        xq, xs, xsum = map(memory.cut, cls.sizes(fmt, rows, cols, planes))
        return cls(fmt.block_weights, fmt.sums_per_block, xq, xs, xsum, planes)

    def pack(self, cols: int, x: int, stride: int, *, index: int = 0, up: int = 0, activation: int = 0) -> Row:
        """Return the step that packs rows of `cols` float32 at x, or what an activation makes of them and of `up`."""
        return pack.row(
            x=x,
            x_stride=stride,
            index=index,
            up=up,
            activation=activation,
            n_blocks=cols // self.block_weights,
            block_weights=self.block_weights,
            sums_per_block=self.sums_per_block,
            xq=self.xq,
            xs=self.xs,
            xsum=self.xsum,
            planes=self.planes,
        )


@attrs.frozen
class Activations:
    """n rows of activations: as float32, and packed for the block sizes in use."""

    n: int
    address: int
    stride: int  # bytes
    packed: dict[int, PackedArea]  # {weights per block: area}

    def pack(self, program: Program, cols: int, kinds: Iterable[GGMLType]) -> None:
        """Add the steps that quantize these rows, of `cols` float32, for matrices of the given types."""
        for size in block_sizes(kinds):
            area = self.packed[size]
            program.add_alone(area.pack(cols, self.address, self.stride), rows_entry(self.n))


def block_sizes(kinds: Iterable[GGMLType]) -> list[int]:
    """Return the sizes of the blocks in which activations for matrices of these types are packed."""
    return sorted({fmt.block_weights for fmt in map(block_format, kinds) if fmt is not None})


def rows_entry(n: int, address: int = 0) -> tuple[int, ...]:
    """Return the entry of n rows of activations, with one matrix."""
    return (address, 0, 0, n, 0, 0, 0, 0)


@attrs.frozen
class RawRoom:
    """Room for every thread to arrange 16 rows of a raw matrix in, whichever of a job's matrices it is at."""

    address: int
    thread_bytes: int  # at least `raw_bytes` of each of these matrices


NO_RAW_ROOM = RawRoom(0, 0)


def product(
    matrix: Matrix,
    x: Activations,
    out: int,
    out_stride: int,
    n_threads: int,
    settings: int,
    *,
    out_step: int = 0,
    raw: RawRoom = NO_RAW_ROOM,
) -> Row:
    """Return the step out[t] = matrix @ x[t] for rows t of x and all matrices of one shape in a table of entries.

    Args:
        matrix: gives type and shape.
        x: gives the areas of the activations.
        out: address of the results.
        out_stride: bytes from one row of results to the next.
        n_threads: threads that will share the work.
        settings: flags (see `entry.py`).
        out_step: bytes from the results of an entry's first matrix to those of its second.
        raw: room to arrange raw matrices in; needed only if there are any.
    """
    kind, rows = matrix.type, matrix.rows
    # More pieces than threads, and not an even share for each: one that the kernel preempts would let all others wait.
    pieces = n_threads * _CHUNKS_PER_THREAD
    fmt = block_format(int(kind))
    if fmt is None:
        return matmul_step(int(kind), 1).row(
            flags=settings,
            chunk=round_up(max(1, rows // pieces), 4),
            n_rows=rows,
            k=matrix.cols,
            row_bytes=matrix.row_bytes,
            x=x.address,  # [T, cols]
            x_stride=x.stride,
            out=out,  # [T, rows]
            out_step=out_step,
            out_stride=out_stride,
        )
    area = x.packed[fmt.block_weights]
    return matmul_step(int(kind), area.planes).row(
        flags=settings,
        chunk=max(1, -(-rows // ROWS) // pieces),
        n_rows=rows,
        n_blocks=matrix.n_blocks,
        block_bytes=kind.block_bytes,
        block_weights=fmt.block_weights,
        sums_per_block=fmt.sums_per_block,
        xq=area.xq,  # int8, [T, cols] in column tiles
        xs=area.xs,  # float32, [T, n_blocks]
        xsum=area.xsum,  # int32, [T, n_blocks, sums_per_block]
        out=out,  # [T, rows]
        out_step=out_step,
        out_stride=out_stride,
        raw=raw.address,
        raw_stride=raw.thread_bytes,
    )


def multiply(
    program: Program,
    matrix: Matrix,
    x: Activations,
    out: int,
    out_stride: int,
    n_threads: int,
    *,
    add: bool = False,
) -> None:
    """Add the step out[t] = matrix @ x[t] for all rows t of x, or out[t] += with `add`."""
    made = product(matrix, x, out, out_stride, n_threads, flags(add=add))
    program.add_alone(made, rows_entry(x.n, matrix.address))


def raw_bytes(kind: GGMLType, cols: int) -> int:
    """Return the room that one thread needs to arrange a raw matrix."""
    return round_up(ROWS * (cols // kind.block_size) * kind.block_bytes, 64) if is_tiled(kind) else 0
