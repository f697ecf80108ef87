"""Weights as numbers, activations as int8, and the products of both.

`types` takes the quantized types apart.
"""

from __future__ import annotations

import functools
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.reference.types import F32, UNPACK, Raw, unpack
from mer.io.ggml import GGMLType

F64: TypeAlias = npt.NDArray[np.float64]
I8: TypeAlias = npt.NDArray[np.int8]


def dequantize(type: GGMLType, raw: Raw, shape: tuple[int, ...]) -> F32:
    """Return the weights that raw bytes of a GGML type stand for, in float32 and to the bit as GGML has them."""
    data = np.frombuffer(raw, np.uint8)
    if type is GGMLType.F32:
        return data.view(np.float32).reshape(shape).copy()
    if type is GGMLType.F16:
        return data.view(np.float16).astype(np.float32).reshape(shape)
    if type is GGMLType.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    parts = unpack(type, raw)
    run = type.block_size // parts.factor.shape[1]
    scales = parts.scale * parts.factor.astype(np.float32)  # [blocks, runs], in float32
    weights = np.repeat(scales, run, axis=1) * parts.q.astype(np.float32)
    if parts.minimum is not None:  # adding zero elsewhere would lose the sign of negative zeros
        weights = weights + np.repeat(parts.minimum * parts.lift.astype(np.float32), run, axis=1)
    return weights.reshape(shape)


def quantize_q8_0(x: npt.ArrayLike) -> tuple[I8, F32]:
    """Return `(q, scales)` of activations in blocks of 32 along the last axis: q [..., n], scales [..., n / 32].

    With x in float32, scale = max|x| / 127 in float32 and q = rint(x / scale), the quotient in float32, ties to even;
    a block whose scale is zero has q = 0.

    Raises:
        ValueError: the last axis is not a multiple of 32, or a value is not finite.
    """
    return quantize_int8(x, 32)


def quantize_q8_k(x: npt.ArrayLike) -> tuple[I8, F32]:
    """Return `(q, scales)` as `quantize_q8_0` does, in blocks of 256: the partner of the K types."""
    return quantize_int8(x, 256)


def quantize_int8(x: npt.ArrayLike, block: int) -> tuple[I8, F32]:
    """Return `(q, scales)` as `quantize_q8_0` does, in blocks of any length."""
    values = np.asarray(x, np.float32)
    if values.shape[-1] % block or not np.isfinite(values).all():
        raise ValueError(f"activations of shape {values.shape} must be finite, in rows of whole blocks of {block}")
    blocks = values.reshape(*values.shape[:-1], -1, block)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    quotients = np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales != 0)
    q = np.rint(quotients).clip(-127, 127).astype(np.int8)
    return q.reshape(values.shape), scales[..., 0]


def matmul_quantized(type: GGMLType, raw: Raw, x: npt.ArrayLike) -> F64:
    """Return `x @ W.T` [T, rows] as an exact integer kernel computes it, from W's raw bytes and x [T, cols].

    x is rounded to int8 in blocks as long as those of the weights, each block's dot product with the integer weights is
    exact, and the scaled block results are summed in float64. Types with minima add these times sums of the rounded x.
    With F32, F16 and BF16 weights x is only rounded to float32.
    """
    values = np.asarray(x, np.float32)
    n_tokens, cols = values.shape
    if type not in UNPACK:
        rows = len(np.frombuffer(raw, np.uint8)) // (cols * type.block_bytes)
        return values.astype(np.float64) @ dequantize(type, raw, (rows, cols)).astype(np.float64).T
    parts = unpack(type, raw)
    q, scales = quantize_int8(values, type.block_size)
    n_blocks, n_runs = cols // type.block_size, parts.factor.shape[1]
    factors = np.repeat(parts.factor, type.block_size // n_runs, axis=1)
    weights = (parts.q * factors).astype(np.float64).reshape(-1, n_blocks, type.block_size)  # integers, exact
    columns = q.astype(np.float64).reshape(n_tokens, n_blocks, type.block_size)
    x_scales = scales.astype(np.float64)  # [T, blocks]

    def scaled(left: F64, right: F64, scale: F32) -> F64:
        """Return the sum over blocks of (left [T, B, n] @ right [R, B, n]) * scale [R, B] * x_scales."""
        dots = left.transpose(1, 0, 2) @ right.transpose(1, 2, 0)  # [blocks, T, rows], exact
        out: F64 = np.einsum("btr,rb,tb->tr", dots, scale.astype(np.float64).reshape(-1, n_blocks), x_scales)
        return out

    out = scaled(columns, weights, parts.scale)
    if parts.minimum is not None:
        sums = columns.reshape(n_tokens, n_blocks, n_runs, -1).sum(-1)
        out += scaled(sums, parts.lift.astype(np.float64).reshape(-1, n_blocks, n_runs), parts.minimum)
    return out


@attrs.frozen
class Matrix:
    """A weight matrix [rows, cols] as the file has it."""

    type: GGMLType
    raw: bytes
    shape: tuple[int, int]

    @functools.cached_property
    def weights(self) -> F64:
        """The weights as numbers."""
        return dequantize(self.type, self.raw, self.shape).astype(np.float64)

    def matmul(self, x: F64, *, int8_activations: bool) -> F64:
        """Return `x @ W.T` [T, rows] of x [T, cols]."""
        if int8_activations:
            return matmul_quantized(self.type, self.raw, x)
        return x @ self.weights.T
