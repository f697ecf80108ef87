"""The products with quantized weights: the plain torch form, which is the reference of the Triton form.

Both are made of two operations: a product with one matrix, and the feed-forward networks of a few experts for a few
rows. Weights are never kept dequantized; a product dequantizes some rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import numpy.typing as npt
import torch

from mer.compute.cuda.activation import activated
from mer.compute.cuda.dequantize import dequantize
from mer.compute.cuda.device import Device
from mer.compute.cuda.sizes import CHUNK_WEIGHTS
from mer.compute.cuda.weights import DeviceMatrix
from mer.io.ggml import GGMLType
from mer.model.operators import SWIGLU, Activation

Tensor = torch.Tensor


@attrs.frozen(eq=False)
class Biases:
    """What is added to the products of a layer's experts, a row for each expert: [E, F], [E, F], [E, D]."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def of(self, expert: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of an expert, or those of an int64 [1], which the host need not know, as [1, F] or [1, D]."""
        return self.gate[expert], self.up[expert], self.down[expert]


@attrs.frozen(eq=False)
class DeviceExpert:
    """An expert's matrices on the device, and how gate and up are joined."""

    gate: DeviceMatrix
    up: DeviceMatrix
    down: DeviceMatrix
    activation: Activation = SWIGLU
    biases: tuple[Tensor, Tensor, Tensor] | None = None  # [F], [F], [D]


@attrs.frozen(eq=False)
class Work:
    """What one expert has to do.

    Attributes:
        expert: its matrices.
        numbers: int64 [2, n] in memory: the rows of y that it computes, and the rows of h that they are computed from.
        pairs, rows: the same on the device, int64 [n] each.
    """

    expert: DeviceExpert
    numbers: npt.NDArray[np.int64]
    pairs: Tensor
    rows: Tensor

    @property
    def n(self) -> int:
        """How many rows it computes."""
        return len(self.numbers[0])


class TorchKernels:
    """Dequantize, then multiply: for prompts on every device, for decoding where there is no Triton.

    Args:
        device: whose `gemm_type` products of quantized weights are computed in.
        form: what is reported.
    """

    def __init__(self, device: Device, form: str = "torch") -> None:
        self._device = device
        self.form = form

    def matmul(self, matrix: DeviceMatrix, x: Tensor, *, exact: bool = False) -> Tensor:
        """Return x [T, cols] @ matrix.T in float32 [T, rows]; computed in float32 if `exact` or of float32 weights."""
        operand = x if exact or matrix.type is GGMLType.F32 else x.to(self._device.gemm_type)
        step = max(1, CHUNK_WEIGHTS // matrix.cols)
        parts = []
        for first in range(0, matrix.rows, step):
            weights = dequantize(matrix.type, matrix.raw[first : first + step])
            parts.append((operand @ weights.to(operand.dtype).T).float())
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def ffn(self, expert: DeviceExpert, x: Tensor) -> Tensor:
        """Return what an expert gives [n, D] for x [n, D]."""
        gate, up = self.matmul(expert.gate, x), self.matmul(expert.up, x)
        if expert.biases is None:
            return self.matmul(expert.down, activated(expert.activation, gate, up))
        of_gate, of_up, of_down = expert.biases
        return self.matmul(expert.down, activated(expert.activation, gate + of_gate, up + of_up)) + of_down

    def experts(self, works: Sequence[Work], h: Tensor, y: Tensor) -> None:
        """Compute experts for their rows of h [T, D] into their rows of y [T * K, D]."""
        for work in works:
            y[work.pairs] = self.ffn(work.expert, h[work.rows])

    def chosen(
        self, slab: Tensor, slots: Tensor, ids: Tensor, cut: ExpertCut, biases: Biases | None, h: Tensor, y: Tensor
    ) -> None:
        """Compute for every row of h [T, D] the K experts in these slots into y [T * K, D], without asking the host.

        Args:
            slab: uint8 [slots, slot bytes].
            slots: int64 [T, K].
            ids: int64 [T, K], the numbers of the experts.
            cut: how an expert lies in a slot.
            biases: of the layer's experts, if they have any.
            h: float32 [T, D].
            y: float32 [T * K, D].
        """
        top_k = slots.shape[1]
        for pair, (slot, number) in enumerate(zip(slots.reshape(-1, 1), ids.reshape(-1, 1), strict=True)):
            row = pair // top_k
            expert = cut.expert(slab[slot][0], None if biases is None else biases.of(number))
            y[pair] = self.ffn(expert, h[row : row + 1])[0]


@attrs.frozen
class ExpertCut:
    """How the three matrices lie in a slot: types and shapes, and where each begins; and how they are computed."""

    types: tuple[GGMLType, GGMLType, GGMLType]  # gate, up, down
    shapes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    offsets: tuple[int, int, int]
    sizes: tuple[int, int, int]
    activation: Activation = SWIGLU

    def expert(self, raw: Tensor, biases: tuple[Tensor, Tensor, Tensor] | None) -> DeviceExpert:
        """Return the matrices in the bytes of a slot, with an expert's biases."""
        gate, up, down = (
            DeviceMatrix.of(kind, *shape, raw[offset : offset + size])
            for kind, shape, offset, size in zip(self.types, self.shapes, self.offsets, self.sizes, strict=True)
        )
        return DeviceExpert(gate, up, down, self.activation, biases)
