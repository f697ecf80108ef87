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

    _value_: int
    block_size: int  # weights per block
    block_bytes: int

    def __new__(cls, value: int, block_size: int, block_bytes: int) -> GGMLType:
        member = int.__new__(cls, value)
        member._value_ = value
        member.block_size = block_size
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18


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
