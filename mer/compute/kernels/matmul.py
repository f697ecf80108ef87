"""Steps that multiply and arrange each weight type, and the forms of their activations."""

from __future__ import annotations

from mer.compute.kernels.blocks import BlockFormat
from mer.compute.kernels.floats import matmul_bf16, matmul_f16, matmul_f32
from mer.compute.kernels.iq1_m import interleave_iq1_m, matmul_iq1_m, matmul_iq1_m_a15
from mer.compute.kernels.iq1_s import interleave_iq1_s, matmul_iq1_s, matmul_iq1_s_a15
from mer.compute.kernels.iq2_s import interleave_iq2_s, matmul_iq2_s, matmul_iq2_s_a15
from mer.compute.kernels.iq2_xs import interleave_iq2_xs, matmul_iq2_xs, matmul_iq2_xs_a15
from mer.compute.kernels.iq2_xxs import interleave_iq2_xxs, matmul_iq2_xxs, matmul_iq2_xxs_a15
from mer.compute.kernels.iq3_s import interleave_iq3_s, matmul_iq3_s, matmul_iq3_s_a15
from mer.compute.kernels.iq3_xxs import interleave_iq3_xxs, matmul_iq3_xxs, matmul_iq3_xxs_a15
from mer.compute.kernels.iq4_nl import interleave_iq4_nl, matmul_iq4_nl, matmul_iq4_nl_a15
from mer.compute.kernels.iq4_xs import interleave_iq4_xs, matmul_iq4_xs, matmul_iq4_xs_a15
from mer.compute.kernels.mxfp4 import interleave_mxfp4, matmul_mxfp4, matmul_mxfp4_a15
from mer.compute.kernels.nvfp4 import interleave_nvfp4, matmul_nvfp4, matmul_nvfp4_a15
from mer.compute.kernels.q2_k import interleave_q2_k, matmul_q2_k, matmul_q2_k_a15
from mer.compute.kernels.q3_k import interleave_q3_k, matmul_q3_k, matmul_q3_k_a15
from mer.compute.kernels.q4_0 import interleave_q4_0, matmul_q4_0, matmul_q4_0_a15
from mer.compute.kernels.q4_1 import interleave_q4_1, matmul_q4_1, matmul_q4_1_a15
from mer.compute.kernels.q4_k import interleave_q4_k, matmul_q4_k, matmul_q4_k_a15
from mer.compute.kernels.q5_0 import interleave_q5_0, matmul_q5_0, matmul_q5_0_a15
from mer.compute.kernels.q5_1 import interleave_q5_1, matmul_q5_1, matmul_q5_1_a15
from mer.compute.kernels.q5_k import interleave_q5_k, matmul_q5_k, matmul_q5_k_a15
from mer.compute.kernels.q6_k import interleave_q6_k, matmul_q6_k, matmul_q6_k_a15
from mer.compute.kernels.q8_0 import interleave_q8_0, matmul_q8_0, matmul_q8_0_a15
from mer.compute.kernels.step import Step
from mer.compute.kernels.tile import FORMATS

# {ggml type id: step}; a quantized type also registers its BlockFormat in FORMATS
STEPS: dict[int, Step] = {
    0: matmul_f32,
    1: matmul_f16,
    2: matmul_q4_0,
    3: matmul_q4_1,
    6: matmul_q5_0,
    7: matmul_q5_1,
    8: matmul_q8_0,
    10: matmul_q2_k,
    11: matmul_q3_k,
    12: matmul_q4_k,
    13: matmul_q5_k,
    14: matmul_q6_k,
    16: matmul_iq2_xxs,
    17: matmul_iq2_xs,
    18: matmul_iq3_xxs,
    19: matmul_iq1_s,
    20: matmul_iq4_nl,
    21: matmul_iq3_s,
    22: matmul_iq2_s,
    23: matmul_iq4_xs,
    29: matmul_iq1_m,
    30: matmul_bf16,
    39: matmul_mxfp4,
    40: matmul_nvfp4,
}

# The same for quantized types on activations of two planes
FINE_STEPS: dict[int, Step] = {
    2: matmul_q4_0_a15,
    3: matmul_q4_1_a15,
    6: matmul_q5_0_a15,
    7: matmul_q5_1_a15,
    8: matmul_q8_0_a15,
    10: matmul_q2_k_a15,
    11: matmul_q3_k_a15,
    12: matmul_q4_k_a15,
    13: matmul_q5_k_a15,
    14: matmul_q6_k_a15,
    16: matmul_iq2_xxs_a15,
    17: matmul_iq2_xs_a15,
    18: matmul_iq3_xxs_a15,
    19: matmul_iq1_s_a15,
    20: matmul_iq4_nl_a15,
    21: matmul_iq3_s_a15,
    22: matmul_iq2_s_a15,
    23: matmul_iq4_xs_a15,
    29: matmul_iq1_m_a15,
    39: matmul_mxfp4_a15,
    40: matmul_nvfp4_a15,
}

# The steps that bring quantized types into tiles
INTERLEAVE_STEPS: dict[int, Step] = {
    2: interleave_q4_0,
    3: interleave_q4_1,
    6: interleave_q5_0,
    7: interleave_q5_1,
    8: interleave_q8_0,
    10: interleave_q2_k,
    11: interleave_q3_k,
    12: interleave_q4_k,
    13: interleave_q5_k,
    14: interleave_q6_k,
    16: interleave_iq2_xxs,
    17: interleave_iq2_xs,
    18: interleave_iq3_xxs,
    19: interleave_iq1_s,
    20: interleave_iq4_nl,
    21: interleave_iq3_s,
    22: interleave_iq2_s,
    23: interleave_iq4_xs,
    29: interleave_iq1_m,
    39: interleave_mxfp4,
    40: interleave_nvfp4,
}


def matmul_step(kind: int, planes: int) -> Step:
    """Return the step for a weight type and a number of activation planes; float types have none and take float32."""
    return FINE_STEPS[kind] if planes == 2 and kind in FINE_STEPS else STEPS[kind]


def block_format(kind: int) -> BlockFormat | None:
    """Return the block format of a quantized type, or None for float types, which take float32 activations."""
    return FORMATS.get(kind)
