"""Weight matrices on the device, in the file's own bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import numpy as np
import numpy.typing as npt
import torch

from mer.compute.cpu.weights import Piece, load_pieces
from mer.compute.cuda.dequantize import dequantize
from mer.compute.cuda.device import Device
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.io.reader import Reader


@attrs.frozen(eq=False)
class DeviceMatrix:
    """A matrix [rows, cols] as the bytes of its type, uint8 [rows, row bytes]."""

    type: GGMLType
    rows: int
    cols: int
    raw: torch.Tensor

    @classmethod
    def of(cls, kind: GGMLType, rows: int, cols: int, raw: torch.Tensor) -> DeviceMatrix:
        """Return the matrix whose bytes are uint8 [n]."""
        return cls(kind, rows, cols, raw.view(rows, cols // kind.block_size * kind.block_bytes))


class DeviceWeights:
    """Every dense tensor by name: matrices in their file's bytes, vectors as float32.

    Args:
        tensors: the checked dense tensors of the file.
        device: where they are kept.
        factors: what vectors are multiplied by, see `ModelSpec.norm_factors`.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], device: Device, factors: Mapping[str, float]) -> None:
        self._tensors, self._device, self._factors = tensors, device, factors
        self._bytes = {name: device.zeros(t.n_bytes, dtype=torch.uint8) for name, t in tensors.items()}

    def matrix(self, name: str) -> DeviceMatrix:
        """Return a matrix by its tensor's name."""
        tensor = self._tensors[name]
        rows, cols = tensor.shape
        return DeviceMatrix.of(tensor.type, rows, cols, self._bytes[name])

    def vector(self, name: str) -> torch.Tensor:
        """Return a norm's weight, float32 [n], by its tensor's name."""
        return self._bytes[name].view(torch.float32)

    def rows(self, name: str, numbers: torch.Tensor) -> torch.Tensor:
        """Return chosen rows of a matrix as float32 [len(numbers), cols]."""
        matrix = self.matrix(name)
        return dequantize(matrix.type, matrix.raw[numbers])

    async def load(self, reader: Reader, on_progress: Callable[[int, int], None]) -> None:
        """Read every tensor and copy it to the device; see `load_pieces`."""
        await load_pieces(self._tensors.values(), reader, self._place, on_progress)

    def _place(self, piece: Piece, raw: npt.NDArray[np.uint8]) -> None:
        start = piece.first * piece.row_bytes
        with torch.inference_mode():
            stored = self._bytes[piece.tensor.name][start : start + len(raw)]
            stored.copy_(torch.from_numpy(raw))
            if piece.tensor.name in self._factors:
                stored.view(torch.float32).mul_(self._factors[piece.tensor.name])
