"""Which step multiplies which weight type, and the form its activations take."""

from __future__ import annotations

from mer.compute.kernels.floats import matmul_bf16, matmul_f16, matmul_f32
from mer.compute.kernels.q4_0 import matmul_q4_0
from mer.compute.kernels.q4_1 import matmul_q4_1
from mer.compute.kernels.q6_k import matmul_q6_k
from mer.compute.kernels.q8_0 import matmul_q8_0
from mer.compute.kernels.step import Step
from mer.compute.kernels.tile import FORMATS, BlockFormat

# {ggml type id: step}; a quantized type also registers its BlockFormat in FORMATS
STEPS: dict[int, Step] = {
    0: matmul_f32,
    1: matmul_f16,
    2: matmul_q4_0,
    3: matmul_q4_1,
    8: matmul_q8_0,
    14: matmul_q6_k,
    30: matmul_bf16,
}


def block_format(kind: int) -> BlockFormat | None:
    """Return the block format of a quantized type, or None for float types, which take float32 activations."""
    return FORMATS.get(kind)
