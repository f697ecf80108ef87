"""The dense weights: read once into anonymous memory and kept there in the kernels' layout."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping

import attrs
import gguf.quants
import numpy as np
import numpy.typing as npt
import trio

from mer.compute.cpu.matrix import Matrix, float_stride, is_tiled, stored_bytes
from mer.compute.cpu.program import Memory, Program
from mer.compute.kernels.interleave import ROWS, rows_of_tiles
from mer.compute.kernels.matmul import INTERLEAVE_STEPS
from mer.compute.kernels.runtime import run_alone
from mer.io.extents import round_up
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.io.reader import PendingExtent, Reader, start_extent

READ_BYTES = 8 << 20  # a tensor is read in pieces of about this size
READS_AHEAD = 2
_FEW_ROWS = 16


def _bytes_of(tensor: TensorInfo) -> int:
    if len(tensor.shape) == 1:
        return float_stride(tensor.shape[0])
    return stored_bytes(tensor.type, *tensor.shape)


def dense_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes that the dense weights take in memory."""
    return sum(round_up(_bytes_of(t), 64) for t in tensors.values())


@attrs.frozen
class Piece:
    """Rows of a tensor that are read together."""

    tensor: TensorInfo
    row_bytes: int
    first: int
    n_rows: int


class DenseWeights:
    """Every dense tensor by name: matrices in the kernels' layout, vectors as float32 padded with zeros.

    Args:
        tensors: the checked dense tensors of the file.
        factors: what vectors are multiplied by, see `ModelSpec.norm_factors`.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], factors: Mapping[str, float]) -> None:
        self._tensors, self._factors = tensors, factors
        self._memory = Memory(dense_bytes(tensors))
        self._address = {name: self._memory.cut(_bytes_of(t)) for name, t in tensors.items()}
        self._scratch = Memory(
            max([ROWS * t.n_bytes // t.shape[0] for t in tensors.values() if len(t.shape) == 2], default=1)
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that the weights take."""
        return len(self._memory.bytes)

    def used_bytes(self, *, tied_head: bool) -> int:
        """Return the bytes of the matrices that every token is multiplied with."""
        names = {name for name, t in self._tensors.items() if len(t.shape) == 2}
        return sum(_bytes_of(self._tensors[name]) for name in names if tied_head or name != "token_embd.weight")

    @property
    def types(self) -> set[GGMLType]:
        """Types of the matrices."""
        return {t.type for t in self._tensors.values() if len(t.shape) == 2}

    def matrix(self, name: str) -> Matrix:
        """Return a matrix by its tensor name."""
        tensor = self._tensors[name]
        rows, cols = tensor.shape
        return Matrix(tensor.type, rows, cols, self._address[name])

    def vector(self, name: str) -> int:
        """Return the address of a float32 vector by its tensor name."""
        return self._address[name]

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """Return a tensor of float32 by its name, in its shape and in place."""
        return self._memory.floats(self._address[name], *self._tensors[name].shape)

    def rows(self, name: str, numbers: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return chosen rows of a matrix as float32 [len(numbers), cols]."""
        matrix = self.matrix(name)
        stored = self._memory.view(matrix.address, stored_bytes(matrix.type, matrix.rows, matrix.cols))
        if is_tiled(matrix.type):
            tiles = stored.reshape(-1, ROWS * matrix.row_bytes)
            raw = rows_of_tiles(int(matrix.type), tiles, matrix.type.block_bytes, numbers.astype(np.int64))
        else:
            raw = stored.reshape(matrix.rows, matrix.row_bytes)[numbers]
        return _floats(matrix.type, raw).reshape(len(numbers), matrix.cols)

    async def load(self, reader: Reader, on_progress: Callable[[int, int], None]) -> None:
        """Read every tensor and bring it into the kernels' layout; see `load_pieces`."""
        await load_pieces(self._tensors.values(), reader, self._place, on_progress)

    def _place(self, piece: Piece, raw: npt.NDArray[np.uint8]) -> None:
        """Put rows as read from the file at their address, in the kernels' layout."""
        tensor, n_rows = piece.tensor, piece.n_rows
        target = self._address[tensor.name] + piece.first * piece.row_bytes
        if len(tensor.shape) == 1 or not is_tiled(tensor.type):
            stored = self._memory.view(target, len(raw))
            stored[:] = raw
            if tensor.name in self._factors:
                stored.view(np.float32)[:] *= np.float32(self._factors[tensor.name])
            return
        program = Program()
        program.add(
            INTERLEAVE_STEPS[int(tensor.type)].row(
                source=int(raw.ctypes.data),  # [rows, cols]
                target=target,  # [rows / 16, 16 * cols]
                n_rows=n_rows,
                n_blocks=tensor.shape[1] // tensor.type.block_size,
                block_bytes=tensor.type.block_bytes,
                raw=self._scratch.address,
            )
        )
        run_alone(program.address, program.length)


def _floats(kind: GGMLType, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Return the weights in rows of blocks."""
    quant = getattr(gguf.quants, kind.name, None)
    if quant is not None and len(raw) <= _FEW_ROWS:
        # `dequantize` cuts what it is given into groups, which takes longer than a row
        quant.init_grid()  # which `dequantize` does for the types with code books
        return np.asarray(quant.dequantize_rows(raw), np.float32)
    return np.asarray(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind))), np.float32)


async def load_pieces(
    tensors: Collection[TensorInfo],
    reader: Reader,
    place: Callable[[Piece, npt.NDArray[np.uint8]], None],
    on_progress: Callable[[int, int], None],
) -> None:
    """Read tensors piece by piece and put each in its place in a thread, reading ahead meanwhile.

    If cancelled, reads under way keep their own memory until they land; the weights stay incomplete.

    Args:
        tensors: what to read.
        reader: reads the files.
        place: takes a piece and its bytes as they are in the file.
        on_progress: called with the bytes loaded so far and in all.

    Raises:
        ReadError: bytes could not be read.
    """
    total = sum(tensor.n_bytes for tensor in tensors)
    loaded = 0
    ahead: deque[tuple[Piece, PendingExtent]] = deque()
    pieces = deque(piece for tensor in tensors for piece in _pieces(tensor))
    while pieces or ahead:
        while pieces and len(ahead) <= READS_AHEAD:
            piece = pieces.popleft()
            offset = piece.tensor.offset + piece.first * piece.row_bytes
            ahead.append((piece, start_extent(reader, piece.tensor.file, offset, piece.n_rows * piece.row_bytes)))
        piece, pending = ahead.popleft()
        raw = await pending.wait()
        await trio.to_thread.run_sync(place, piece, raw)
        loaded += len(raw)
        on_progress(loaded, total)


def _pieces(tensor: TensorInfo) -> Iterator[Piece]:
    """Cut a tensor into pieces of whole groups of rows, about READ_BYTES each."""
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    step = round_up(max(1, READ_BYTES * rows // tensor.n_bytes), ROWS)
    for first in range(0, rows, step):
        yield Piece(tensor, tensor.n_bytes // rows, first, min(step, rows - first))
