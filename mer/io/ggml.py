"""Tensor types of ggml: their ids in GGUF files, and how many bytes their blocks take."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType

from mer.errors import ModelFileError


class GGMLType(enum.IntEnum):
    """A tensor's storage type; the value is its id in a GGUF file.

    Quantized types store `block_size` consecutive weights of a row in `block_bytes` bytes; for plain types a block is
    one element. Ids and sizes follow `enum ggml_type` and the block structs of ggml (ggml.h, ggml-common.h).
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @property
    def block_size(self) -> int:
        """Weights per block."""
        return BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return BLOCKS[self][1]


BLOCKS: Mapping[GGMLType, tuple[int, int]] = MappingProxyType(
    {
        GGMLType.F32: (1, 4),
        GGMLType.F16: (1, 2),
        GGMLType.Q4_0: (32, 18),
        GGMLType.Q4_1: (32, 20),
        GGMLType.Q5_0: (32, 22),
        GGMLType.Q5_1: (32, 24),
        GGMLType.Q8_0: (32, 34),
        GGMLType.Q8_1: (32, 40),
        GGMLType.Q2_K: (256, 84),
        GGMLType.Q3_K: (256, 110),
        GGMLType.Q4_K: (256, 144),
        GGMLType.Q5_K: (256, 176),
        GGMLType.Q6_K: (256, 210),
        GGMLType.Q8_K: (256, 292),
        GGMLType.IQ2_XXS: (256, 66),
        GGMLType.IQ2_XS: (256, 74),
        GGMLType.IQ3_XXS: (256, 98),
        GGMLType.IQ1_S: (256, 50),
        GGMLType.IQ4_NL: (32, 18),
        GGMLType.IQ3_S: (256, 110),
        GGMLType.IQ2_S: (256, 82),
        GGMLType.IQ4_XS: (256, 136),
        GGMLType.I8: (1, 1),
        GGMLType.I16: (1, 2),
        GGMLType.I32: (1, 4),
        GGMLType.I64: (1, 8),
        GGMLType.F64: (1, 8),
        GGMLType.IQ1_M: (256, 56),
        GGMLType.BF16: (1, 2),
        GGMLType.TQ1_0: (256, 54),
        GGMLType.TQ2_0: (256, 66),
        GGMLType.MXFP4: (32, 17),
        GGMLType.NVFP4: (64, 36),
        GGMLType.Q1_0: (128, 18),
    }
)
"""{type: (block_size, block_bytes)}"""


REMOVED_TYPES: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
    }
)
"""Ids that ggml once used and no longer reads; files that have them must be quantized again."""


def tensor_bytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Return the bytes that a tensor of `shape` takes, slowest dimension first, without padding.

    Rows (the last dimension) are stored as whole blocks. Computed in Python ints, so that it cannot overflow.

    Raises:
        ModelFileError: a dimension is not positive, or the last one is not a multiple of `type.block_size`.
    """
    if any(size <= 0 for size in shape):
        raise ModelFileError(f"shape {tuple(shape)} has a dimension that is not positive")
    row = shape[-1] if shape else 1
    if row % type.block_size:
        raise ModelFileError(
            f"shape {tuple(shape)} cannot be {type.name}: its last dimension must be a multiple of {type.block_size}"
        )
    return prod(shape) // type.block_size * type.block_bytes
