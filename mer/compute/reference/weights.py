"""A file's tensors, read and dequantized when they are first asked for."""

from __future__ import annotations

from mer.compute.reference.products import F64, Matrix, dequantize
from mer.compute.reference.types import F32
from mer.io.extents import ExpertPart
from mer.io.ggml import GGMLType
from mer.model.loading import Model
from mer.model.operators import Linear


class Weights:
    """The weights of a model.

    Args:
        model: the file.
        int8_activations: round what meets quantized matrices to int8, as the integer kernels do.
    """

    def __init__(self, model: Model, *, int8_activations: bool) -> None:
        self._model = model
        self._int8 = int8_activations
        self._cache: dict[tuple[int, int], Matrix] = {}  # {(file, offset): matrix}

    def linear(self, record: Linear, x: F64) -> F64:
        """Return what a linear map gives for x [T, cols]."""
        out = self.matrix(record.weight.name).matmul(x, int8_activations=self._int8)
        return out if record.bias is None else out + self.vector(record.bias.name)

    def matrix(self, name: str) -> Matrix:
        """Return a dense matrix by its tensor's name."""
        tensor = self._model.dense[name]
        rows, cols = tensor.shape
        return self._matrix(tensor.type, tensor.file, tensor.offset, tensor.n_bytes, (rows, cols))

    def vector(self, name: str) -> F32:
        """Return a dense vector by its tensor's name."""
        tensor = self._model.dense[name]
        return dequantize(tensor.type, self._bytes(tensor.file, tensor.offset, tensor.n_bytes), tensor.shape)

    def part(self, part: ExpertPart) -> Matrix:
        """Return a matrix of a routed expert."""
        return self._matrix(part.type, part.file, part.offset, part.n_bytes, (part.rows, part.cols))

    def _matrix(self, type: GGMLType, file: int, offset: int, n_bytes: int, shape: tuple[int, int]) -> Matrix:
        if (file, offset) not in self._cache:
            self._cache[file, offset] = Matrix(type, self._bytes(file, offset, n_bytes), shape)
        return self._cache[file, offset]

    def _bytes(self, file: int, offset: int, n_bytes: int) -> bytes:
        path = self._model.gguf.paths[file]
        with open(path, "rb") as stream:
            stream.seek(offset)
            data = stream.read(n_bytes)
        assert len(data) == n_bytes, f"{path} ends inside a tensor"
        return data
