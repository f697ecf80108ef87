"""The Triton form of the products: few launches for few rows; for more rows, and for other types, the torch form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mer.compute.cuda import triton_kernels as kernels
from mer.compute.cuda.dequantize import book
from mer.compute.cuda.device import Device
from mer.compute.cuda.products import Biases, DeviceExpert, ExpertCut, TorchKernels, Work
from mer.compute.cuda.weights import DeviceMatrix

Tensor = torch.Tensor

FUSED_ROWS = 8  # of activations for one matrix: with more, a product by tensor cores is worth the dequantizing


class TritonKernels(TorchKernels):
    """Fused kernels where they are faster, launched on torch's current stream."""

    def __init__(self, device: Device) -> None:
        super().__init__(device, "triton")
        words = [book(name).to(torch.uint8).view(torch.int32).reshape(-1) for name, _ in kernels.BOOKS]
        self._books = torch.cat(words).to(device.torch)

    def matmul(self, matrix: DeviceMatrix, x: Tensor, *, exact: bool = False) -> Tensor:
        """See `TorchKernels.matmul`."""
        if len(x) > FUSED_ROWS or int(matrix.type) not in kernels.KINDS:
            return super().matmul(matrix, x, exact=exact)
        x = x.contiguous()
        out = torch.empty((len(x), matrix.rows), dtype=torch.float32, device=x.device)
        kernels.matvec[_grid(matrix, len(x))](
            matrix.raw.data_ptr(), self._books, x, out, matrix.rows, matrix.cols, matrix.raw.shape[1],
            int(matrix.type), kernels.R, num_warps=kernels.WARPS,
        )  # fmt: skip
        return out

    def experts(self, works: Sequence[Work], h: Tensor, y: Tensor) -> None:
        """See `TorchKernels.experts`: experts of the same types and shapes and few rows go in two launches."""
        groups: dict[tuple[object, ...], list[Work]] = {}
        for work in works:
            if work.n > FUSED_ROWS or not _is_fused(work.expert):
                super().experts([work], h, y)
            else:
                groups.setdefault(_key(work.expert), []).append(work)
        for group in groups.values():
            words = kernels.WORK_WORDS if group[0].expert.biases is None else kernels.BIASED_WORDS
            table = np.empty((sum(work.n for work in group), words), np.int64)
            first = 0
            for work in group:
                mine = table[first : first + work.n]
                mine[:, 0], mine[:, 1] = work.numbers[1], work.numbers[0]
                addresses = [m.raw.data_ptr() for m in (work.expert.gate, work.expert.up, work.expert.down)]
                mine[:, 2:] = addresses + [bias.data_ptr() for bias in work.expert.biases or ()]
                first += work.n
            self._launch(group[0].expert, self._device.to_device(table), h, y)

    def chosen(
        self, slab: Tensor, slots: Tensor, ids: Tensor, cut: ExpertCut, biases: Biases | None, h: Tensor, y: Tensor
    ) -> None:
        """See `TorchKernels.chosen`."""
        expert = cut.expert(slab[0], None if biases is None else biases.of(0))
        if not _is_fused(expert):
            super().chosen(slab, slots, ids, cut, biases, h, y)
            return
        pairs = torch.arange(slots.numel(), device=slots.device)
        base = slab.data_ptr() + slots.reshape(-1) * slab.shape[1]
        columns = [pairs // slots.shape[1], pairs, *(base + offset for offset in cut.offsets)]
        for rows in () if biases is None else (biases.gate, biases.up, biases.down):
            columns.append(rows.data_ptr() + ids.reshape(-1) * rows.stride(0) * rows.element_size())
        work = torch.stack(columns, 1)
        self._launch(expert, work, h, y)

    def _launch(self, like: DeviceExpert, work: Tensor, h: Tensor, y: Tensor) -> None:
        """Compute pairs, given as the kernels want them, with experts of one form."""
        biased = like.biases is not None
        n, (gate, up, down), act = len(work), (like.gate, like.up, like.down), like.activation
        inner = torch.empty((n, gate.rows), dtype=torch.float32, device=h.device)
        kernels.gate_up[_grid(gate, n)](
            work, self._books, h, inner, gate.rows, gate.cols, gate.raw.shape[1], up.raw.shape[1],
            int(gate.type), int(up.type),
            act.alpha, act.beta, act.limit, act.shift, biased, kernels.R, num_warps=kernels.WARPS,
        )  # fmt: skip
        kernels.down[_grid(down, n)](
            work, self._books, inner, y, down.rows, down.cols, down.raw.shape[1], int(down.type), biased, kernels.R,
            num_warps=kernels.WARPS,
        )  # fmt: skip


def _grid(matrix: DeviceMatrix, n: int) -> tuple[int, int]:
    return -(-matrix.rows // kernels.R), n


def _is_fused(expert: DeviceExpert) -> bool:
    return all(int(matrix.type) in kernels.KINDS for matrix in (expert.gate, expert.up, expert.down))


def _key(expert: DeviceExpert) -> tuple[object, ...]:
    return expert.activation, *((m.type, m.rows, m.cols) for m in (expert.gate, expert.up, expert.down))
