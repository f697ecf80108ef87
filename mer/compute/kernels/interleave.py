"""Re-interleaving quantized rows into 16-row tiles ("x16", see `tile.py`), in place or from one area to another.

A type's block is a list of fields; a field is `count` units of 1, 2 or 4 bytes from `offset` on. In the tile, each
unit of the 16 rows lies side by side, unit after unit, field after field. Bytes may be exclusive-or'ed on the way.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.compute.kernels.ir import copy_bytes, load_i64, move_u8, move_u16, move_u32, zero_bytes
from mer.compute.kernels.step import ARG0, step
from mer.compute.kernels.tile import ROWS

# {ggml type id: ((offset, unit bytes, count, exclusive-or per 4 bytes), ...)}, in the tile's order
FIELDS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    2: ((0, 2, 1, 0), (2, 4, 4, 0)),  # Q4_0: scale, nibbles
    3: ((0, 2, 1, 0), (2, 2, 1, 0), (4, 4, 4, 0)),  # Q4_1: scale, minimum, nibbles
    8: ((0, 2, 1, 0), (2, 4, 8, 0x80808080)),  # Q8_0: scale, weights made unsigned
    14: (
        (208, 2, 1, 0),
        (192, 1, 16, 0),
        (0, 4, 32, 0),
        (128, 4, 16, 0),
    ),  # Q6_K: scale, sub-scales, low, high bits
}


def field_table(kind: int) -> npt.NDArray[np.int64]:
    """Return a type's fields as an int64 matrix for the kernel."""
    return np.array(FIELDS[kind], np.int64)


def rows_of_tiles(
    kind: int, tiles: npt.NDArray[np.uint8], block_bytes: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint8]:
    """Return the original bytes [len(rows), n_blocks * block_bytes] of chosen rows of a matrix kept in tiles.

    `tiles` is uint8 [n_tiles, n_blocks * 16 * block_bytes].
    """
    blocks = tiles[rows // ROWS].reshape(len(rows), -1, ROWS * block_bytes)
    out = np.empty((len(rows), blocks.shape[1], block_bytes), np.uint8)
    lane = (rows % ROWS)[:, None, None, None, None]
    position = 0
    for offset, unit, count, flip in FIELDS[kind]:
        size = unit * count
        area = blocks[:, :, position : position + ROWS * size].reshape(len(rows), -1, count, ROWS, unit)
        part = np.take_along_axis(area, lane, 3)[:, :, :, 0].reshape(len(rows), -1, size)
        out[:, :, offset : offset + size] = part ^ np.uint8(flip & 0xFF)
        position += ROWS * size
    return out.reshape(len(rows), -1)


@step
def interleave(row: int, thread: int, n_threads: int) -> None:
    """Turn rows of blocks into tiles; tiles are split evenly over the threads.

    Arguments: source, target (may be the same address), n_rows, n_blocks, block_bytes, fields, n_fields, scratch,
    scratch_stride_bytes. The target holds n_rows rounded up to 16; missing rows become zero bytes.
    """
    source, target, n_rows = load_i64(row, ARG0), load_i64(row, ARG0 + 1), load_i64(row, ARG0 + 2)
    n_blocks, block_bytes = load_i64(row, ARG0 + 3), load_i64(row, ARG0 + 4)
    fields, n_fields = load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6)
    raw = load_i64(row, ARG0 + 7) + thread * load_i64(row, ARG0 + 8)
    row_bytes = n_blocks * block_bytes
    n_tiles = (n_rows + 15) // 16
    for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
        present = min(16, n_rows - 16 * tile)
        copy_bytes(raw, source + 16 * tile * row_bytes, present * row_bytes)
        if present < 16:
            zero_bytes(raw + present * row_bytes, (16 - present) * row_bytes)
        out = target + 16 * tile * row_bytes
        for k in range(n_blocks):
            block = raw + k * block_bytes
            for f in range(n_fields):
                offset, unit = load_i64(fields, 4 * f), load_i64(fields, 4 * f + 1)
                count, flip = load_i64(fields, 4 * f + 2), load_i64(fields, 4 * f + 3)
                for u in range(count):
                    first = block + offset + u * unit
                    if unit == 4:
                        for lane in range(16):
                            move_u32(out + 4 * lane, first + lane * row_bytes, flip)
                    elif unit == 2:
                        for lane in range(16):
                            move_u16(out + 2 * lane, first + lane * row_bytes)
                    else:
                        for lane in range(16):
                            move_u8(out + lane, first + lane * row_bytes)
                    out += 16 * unit
