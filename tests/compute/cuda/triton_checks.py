"""What `test_triton` runs: every fused kernel against dequantized weights in float64, under TRITON_INTERPRET=1, and
their compilation to machine code, which needs no GPU.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np
import torch

from mer.compute.cuda import triton_kernels
from mer.compute.cuda.device import TORCH_CPU, Device
from mer.compute.cuda.fused import TritonKernels
from mer.compute.cuda.layout import ALIGNMENT
from mer.compute.cuda.products import Biases, DeviceExpert, ExpertCut, Work
from mer.compute.cuda.triton_kernels import KINDS
from mer.compute.cuda.weights import DeviceMatrix
from mer.compute.reference.blocks.feed_forward import activated
from mer.io.extents import round_up
from mer.io.ggml import GGMLType
from mer.model.operators import GEGLU, SWIGLU, Activation
from tests._lib.quantize import Type
from tests.compute.cuda.test_blocks import random_bytes

TYPES = [GGMLType(kind) for kind in sorted(KINDS)]


def matrix(kind: GGMLType, rows: int, cols: int, seed: int) -> DeviceMatrix:
    """Return a matrix of random bytes."""
    raw = random_bytes(kind, rows, cols // kind.block_size, seed)
    if kind is GGMLType.MXFP4:
        raw = raw.reshape(rows, -1, kind.block_bytes)
        raw[:, :, 0] = 120 + raw[:, :, 0] % 8
    return DeviceMatrix.of(kind, rows, cols, torch.from_numpy(raw.reshape(-1).copy()))


def weights(it: DeviceMatrix) -> np.ndarray:
    """Return a matrix by the `gguf` package, in float64."""
    return np.asarray(gguf.quants.dequantize(it.raw.numpy(), Type(int(it.type))), np.float64).reshape(it.rows, it.cols)


def assert_near(got: torch.Tensor, want: np.ndarray, what: str) -> None:
    """Compare relative to the largest number."""
    error = np.abs(got.numpy() - want).max() / np.abs(want).max()
    assert error < 2e-5, f"{what}: {error}"


def check_matvec() -> None:
    """Odd numbers of rows, columns that are no multiple of a step, one and several rows of activations."""
    kernels = TritonKernels(Device(TORCH_CPU))
    for kind in TYPES:
        for rows, blocks, n in ((37, 3, 1), (8, 1, 3), (19, 9, 8)):
            cols = blocks * (100 if kind.block_size == 1 else kind.block_size)
            it = matrix(kind, rows, cols, seed=rows)
            x = np.random.default_rng(n).normal(0.3, 1, (n, cols)).astype(np.float32)
            assert_near(kernels.matmul(it, torch.from_numpy(x)), x @ weights(it).T, f"{kind.name} {rows}x{cols}x{n}")


def expert_of(
    kinds: tuple[GGMLType, GGMLType, GGMLType], d: int, f: int, seed: int, activation: Activation, *, biased: bool
) -> DeviceExpert:
    """Return an expert of random bytes."""
    gate, up, down = kinds
    matrices = matrix(gate, f, d, seed), matrix(up, f, d, seed + 1), matrix(down, d, f, seed + 2)
    rng = np.random.default_rng(seed)
    biases = tuple(torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in (f, f, d))
    return DeviceExpert(*matrices, activation, (biases[0], biases[1], biases[2]) if biased else None)


def ffn(expert: DeviceExpert, x: np.ndarray) -> np.ndarray:
    """Return an expert's output in float64."""
    g, u = x @ weights(expert.gate).T, x @ weights(expert.up).T
    biases = (
        [np.float64(0)] * 3 if expert.biases is None else [bias.numpy().astype(np.float64) for bias in expert.biases]
    )
    inner = activated(expert.activation, g + biases[0], u + biases[1])
    return np.asarray(inner @ weights(expert.down).T + biases[2])


ACTIVATIONS = (SWIGLU, GEGLU, Activation(alpha=1.702, limit=0.7, shift=1.0), Activation(limit=0.5))


FORMS = [
    (GGMLType.Q4_0, GGMLType.Q4_0, GGMLType.Q8_0),
    (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q6_K),
    (GGMLType.MXFP4, GGMLType.MXFP4, GGMLType.BF16),
    (GGMLType.F32, GGMLType.F16, GGMLType.Q4_0),
    (GGMLType.IQ2_XXS, GGMLType.IQ3_XXS, GGMLType.IQ4_NL),
]


def check_experts() -> None:
    """Experts of two forms in one call, with different numbers of rows, some of them too many for a fused kernel."""
    kernels = TritonKernels(Device(TORCH_CPU))
    rng = np.random.default_rng(5)
    h = (rng.normal(0.1, 1, (12, 256)) / 16).astype(np.float32)
    y = torch.full((24, 256), 7.0)
    pairs = rng.permutation(24)
    works, want, first = [], np.full((24, 256), 7.0), 0
    for number, n in enumerate((1, 3, 9, 2)):
        expert = expert_of(
            FORMS[number % 2], 256, 256, seed=10 * number, activation=ACTIVATIONS[number], biased=number % 2 == 0
        )
        mine = pairs[first : first + n]
        first += n
        numbers = np.stack([mine, mine // 2])
        works.append(Work(expert, numbers, torch.from_numpy(mine), torch.from_numpy(mine // 2)))
        want[mine] = ffn(expert, h[mine // 2])
    kernels.experts(works, torch.from_numpy(h), y)
    assert_near(y, want, "experts")
    assert (y.numpy()[pairs[first:]] == 7).all()


def check_chosen() -> None:
    """Experts named on the device, in slots of one slab."""
    kernels = TritonKernels(Device(TORCH_CPU))
    rng = np.random.default_rng(6)
    for number, form in enumerate(FORMS):
        activation, biased = ACTIVATIONS[number % len(ACTIVATIONS)], number % 2 == 0
        experts = [
            expert_of(form, 256, 256, seed=100 * number + 10 * i, activation=activation, biased=biased)
            for i in range(4)
        ]
        rows = [expert.biases for expert in experts if expert.biases is not None]
        biases = Biases(*map(torch.stack, zip(*rows, strict=True))) if rows else None
        sizes = tuple(m.raw.numel() for m in (experts[0].gate, experts[0].up, experts[0].down))
        offsets = (0, round_up(sizes[0], ALIGNMENT), round_up(sizes[0], ALIGNMENT) + round_up(sizes[1], ALIGNMENT))
        slab = torch.zeros((5, offsets[2] + round_up(sizes[2], ALIGNMENT)), dtype=torch.uint8)
        for slot, it in enumerate(experts, 1):
            for offset, part in zip(offsets, (it.gate, it.up, it.down), strict=True):
                slab[slot, offset : offset + part.raw.numel()] = part.raw.reshape(-1)
        first = experts[0]
        cut = ExpertCut(
            types=form,
            shapes=((first.gate.rows, 256), (first.up.rows, 256), (256, first.down.cols)),
            offsets=offsets,
            sizes=(sizes[0], sizes[1], sizes[2]),
            activation=activation,
        )
        h = (rng.normal(0.1, 1, (3, 256)) / 16).astype(np.float32)
        slots = rng.integers(1, 5, (3, 2))
        y = torch.zeros((6, 256))
        ids = torch.from_numpy(slots - 1)
        kernels.chosen(slab, torch.from_numpy(slots), ids, cut, biases, torch.from_numpy(h), y)
        want = np.stack([ffn(experts[slots[p // 2, p % 2] - 1], h[p // 2 : p // 2 + 1])[0] for p in range(6)])
        assert_near(y, want, f"chosen {form}")


def check_compile() -> None:
    """Every weight type's branch, compiled for sm_90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = dict.fromkeys(("n_rows", "cols", "gate_bytes", "up_bytes"), "i32")
    numbers_of = {name.upper(): getattr(GEGLU, name) for name in ("alpha", "beta", "limit", "shift")}
    constants = dict.fromkeys(("GATE", "UP", "BIASED", "R", *numbers_of), "constexpr")
    signature = {"work": "*i64", "books": "*i32", "x": "*fp32", "inner": "*fp32"} | numbers | constants
    for kind in sorted(KINDS):
        values = {"GATE": kind, "UP": kind, "BIASED": True, "R": triton_kernels.R} | numbers_of
        source = ASTSource(triton_kernels.gate_up, signature, values)
        options = {"num_warps": triton_kernels.WARPS}
        assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


CHECKS = {"matvec": check_matvec, "experts": check_experts, "chosen": check_chosen, "compile": check_compile}


def main() -> None:
    """Run the check that is named."""
    with torch.inference_mode():
        CHECKS[sys.argv[1]]()


if __name__ == "__main__":
    main()
