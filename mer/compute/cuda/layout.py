"""The places of an expert's three matrices in a slot of the device."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from mer.compute.cpu.matrix import stored_bytes
from mer.io.extents import ExpertPart, round_up

ALIGNMENT = 256  # of a matrix on the device, so that kernels may load whole words


@attrs.frozen
class Layout:
    """Offsets of gate, up and down, and the bytes of all three."""

    offsets: tuple[int, int, int]
    sizes: tuple[int, int, int]
    n_bytes: int


def file_layout(parts: Sequence[ExpertPart]) -> Layout:
    """Return the layout of an expert's matrices as they are in the file."""
    return _layout([part.n_bytes for part in parts])


def tile_layout(parts: Sequence[ExpertPart]) -> Layout:
    """Return the layout of an expert's matrices as the CPU kernels re-arrange them, rows padded to whole tiles."""
    return _layout([stored_bytes(part.type, part.rows, part.cols) for part in parts])


def _layout(sizes: Sequence[int]) -> Layout:
    gate, up, down = (round_up(size, ALIGNMENT) for size in sizes)
    return Layout((0, gate, gate + up), (sizes[0], sizes[1], sizes[2]), gate + up + down)
