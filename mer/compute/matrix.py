"""Weight matrices in memory, activations in the forms that the kernels read, and the product of the two."""

from __future__ import annotations

import functools

import attrs

from mer.compute.kernels.interleave import FIELDS
from mer.compute.kernels.matmul import block_format, matmul_step
from mer.compute.kernels.pack import pack
from mer.compute.kernels.step import Step
from mer.compute.kernels.tile import ROWS, BlockFormat
from mer.compute.program import Memory, Program
from mer.io.extents import round_up
from mer.io.ggml import GGMLType

FLOAT_BYTES = 4
_CHUNKS_PER_THREAD = 8  # work is handed out in about this many pieces per thread


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

    def offset(self, first_row: int, cols: int) -> PackedArea:
        """Return the room that begins `first_row` rows of `cols` later."""
        blocks = first_row * (cols // self.block_weights)
        return attrs.evolve(
            self,
            xq=self.xq + self.planes * first_row * cols,
            xs=self.xs + FLOAT_BYTES * blocks,
            xsum=self.xsum + FLOAT_BYTES * self.planes * blocks * self.sums_per_block,
        )


@attrs.frozen
class Activations:
    """n rows of activations: as float32, and packed for the block sizes in use."""

    n: int
    address: int
    stride: int  # bytes
    packed: dict[int, PackedArea]  # {weights per block: area}

    def pack(self, program: Program, cols: int, kinds: set[GGMLType], *, source: int = 0, index: int = 0) -> None:
        """Add the steps that quantize these rows for matrices of the given types.

        Args:
            program: where the steps go.
            cols: length of a row.
            kinds: types of the matrices that will be multiplied.
            source: address of the float32 rows, if not `self.address`.
            index: address of int32 row numbers in `source`, or 0.
        """
        sizes = {fmt.block_weights for fmt in map(block_format, kinds) if fmt is not None}
        for size in sizes:
            area = self.packed[size]
            program.add(
                pack, source or self.address, self.stride, index, self.n, cols // size, size, area.sums_per_block,
                area.xq, area.xs, area.xsum, area.planes,
            )  # fmt: skip


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
    planes = next(iter(x.packed.values())).planes if x.packed else 1
    block_weights, step, head, chunk = _product(matrix.type, matrix.rows, matrix.cols, planes, n_threads)
    if block_weights:
        area = x.packed[block_weights]
        program.add(
            step, matrix.address, *head, x.n, area.xq, area.xs, area.xsum, block_weights, area.sums_per_block,
            out, out_stride, int(add), chunk,
        )  # fmt: skip
    else:
        program.add(
            step, matrix.address, *head, x.n, x.address, x.stride, out, out_stride, int(add), chunk
        )  # fmt: skip


@functools.cache
def _product(
    kind: GGMLType, rows: int, cols: int, planes: int, n_threads: int
) -> tuple[int, Step, tuple[int, int, int], int]:
    """Return what is the same for all products with matrices of one shape.

    These are the weights per block (0 for float types), the step, its three arguments behind the address, and how
    many tiles or rows are handed out at a time.
    """
    fmt = block_format(int(kind))
    row_bytes = cols // kind.block_size * kind.block_bytes
    pieces = n_threads * _CHUNKS_PER_THREAD
    if fmt is None:
        chunk = round_up(max(1, rows // pieces), 4)
        return 0, matmul_step(int(kind), 1), (rows, cols, row_bytes), chunk
    n_tiles = -(-rows // ROWS)
    head = (n_tiles, cols // kind.block_size, ROWS * row_bytes)
    return fmt.block_weights, matmul_step(int(kind), planes), head, round_up(max(1, n_tiles // pieces), 2)
