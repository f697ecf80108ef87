"""Weights as the types that the `gguf` package reads but cannot write; no search for better scales."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt

from tests._lib import iq_quants

Type = gguf.GGMLQuantizationType
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


def encode(array: F32, kind: Type) -> U8:
    """Return an array [..., cols] as the bytes [..., row bytes] of one of `ENCODERS`."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = ENCODERS[kind](array.reshape(-1, size).astype(np.float32))
    return blocks.reshape(*array.shape[:-1], array.shape[-1] // size * block_bytes)


def _quotient(a: F32, b: F32) -> F32:
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0)


def _half_bytes(numbers: F32) -> U8:
    """Return float16 numbers [blocks, 1] as bytes."""
    return numbers.astype(np.float16).view(np.uint8)


def _whole(values: F32, least: int, most: int) -> Ints:
    return np.rint(values).clip(least, most).astype(np.int64)


def _symmetric(blocks: F32, run: int, q_range: tuple[int, int], scale_range: tuple[int, int]) -> tuple[F32, Ints, Ints]:
    """Return `(scale, scales, q)` with blocks about scale * scales[run] * q.

    The largest magnitude of a run becomes the first of the two ends of q's range.
    """
    groups = blocks.reshape(len(blocks), -1, run)
    peaks = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
    steps = peaks / np.float32(q_range[0])  # [blocks, groups]
    widest = np.take_along_axis(steps, np.abs(steps).argmax(-1, keepdims=True), -1)
    scale = (widest / np.float32(scale_range[0])).astype(np.float16).astype(np.float32)
    scales = _whole(_quotient(steps, scale), *scale_range)
    step = (scale * scales.astype(np.float32))[..., None]
    return scale, scales, _whole(_quotient(groups, step), *q_range)


def _with_minima(blocks: F32, run: int, q_max: int, scale_max: int) -> tuple[F32, F32, Ints, Ints, Ints]:
    """Return `(scale, minimum, scales, minima, q)` with blocks about scale * scales[run] * q - minimum * minima[run].

    q is from 0 to `q_max`, scales and minima are from 0 to `scale_max`.
    """
    groups = blocks.reshape(len(blocks), -1, run)
    depths = np.maximum(-groups.min(-1), 0)
    steps = np.maximum(groups.max(-1) + depths, 0) / np.float32(q_max)
    scale, minimum = (
        (part.max(-1, keepdims=True) / np.float32(scale_max)).astype(np.float16).astype(np.float32)
        for part in (steps, depths)
    )
    scales, minima = (_whole(_quotient(a, b), 0, scale_max) for a, b in ((steps, scale), (depths, minimum)))
    lifted = groups + (minimum * minima.astype(np.float32))[..., None]
    q = _whole(_quotient(lifted, (scale * scales.astype(np.float32))[..., None]), 0, q_max)
    return scale, minimum, scales, minima, q


def _bytes(*parts: Ints | U8) -> U8:
    return np.concatenate([part.reshape(len(part), -1).astype(np.uint8) for part in parts], axis=1)


def _nibbles(q: Ints, run: int) -> Ints:
    """Return each `run` values as low nibbles with the next `run` as high ones."""
    pairs = (q & 15).reshape(len(q), -1, 2, run)
    return pairs[:, :, 0] | pairs[:, :, 1] << 4


def _six_bits(scales: Ints, minima: Ints) -> Ints:
    """Return 8 scales and 8 minima as the 12 bytes of Q4_K and Q5_K."""
    (s0, s1), (m0, m1) = (part.reshape(-1, 2, 4).swapaxes(0, 1) for part in (scales, minima))
    return np.concatenate([s0 | s1 >> 4 << 6, m0 | m1 >> 4 << 6, s1 & 15 | (m1 & 15) << 4], axis=1)


def _bit_pairs(q: Ints) -> Ints:
    """Return the 64 bytes of Q2_K and Q3_K for the lower two bits of 256 weights."""
    return ((q & 3).reshape(-1, 2, 4, 32) << np.arange(0, 8, 2).reshape(1, 1, 4, 1)).sum(2)


def _bit_planes(bits: Ints) -> Ints:
    """Return the 32 bytes of Q3_K and Q5_K for one bit of each of 256 weights."""
    return (bits.reshape(-1, 8, 32) << np.arange(8).reshape(1, 8, 1)).sum(1)


def q2_k(blocks: F32) -> U8:
    """Return Q2_K: 16 sub-blocks with 4-bit scales and minima."""
    scale, minimum, scales, minima, q = _with_minima(blocks, 16, 3, 15)
    return _bytes(scales | minima << 4, _bit_pairs(q), _half_bytes(scale), _half_bytes(minimum))


def q3_k(blocks: F32) -> U8:
    """Return Q3_K: 16 sub-blocks with 6-bit scales."""
    scale, signed_scales, signed = _symmetric(blocks, 16, (-4, 3), (-32, 31))
    q, scales = signed + 4, signed_scales + 32
    low = (scales & 15)[:, :8] | (scales & 15)[:, 8:] << 4
    high = ((scales >> 4).reshape(-1, 4, 4) << np.arange(0, 8, 2).reshape(1, 4, 1)).sum(1)
    return _bytes(_bit_planes(q >> 2), _bit_pairs(q), low, high, _half_bytes(scale))


def q4_k(blocks: F32) -> U8:
    """Return Q4_K: 8 sub-blocks with 6-bit scales and minima."""
    scale, minimum, scales, minima, q = _with_minima(blocks, 32, 15, 63)
    return _bytes(_half_bytes(scale), _half_bytes(minimum), _six_bits(scales, minima), _nibbles(q, 32))


def q5_k(blocks: F32) -> U8:
    """Return Q5_K: Q4_K with a fifth bit."""
    scale, minimum, scales, minima, q = _with_minima(blocks, 32, 31, 63)
    high = _bit_planes(q >> 4)
    return _bytes(_half_bytes(scale), _half_bytes(minimum), _six_bits(scales, minima), high, _nibbles(q, 32))


def q6_k(blocks: F32) -> U8:
    """Return Q6_K: 16 sub-blocks with int8 scales."""
    scale, scales, signed = _symmetric(blocks, 16, (-32, 31), (-128, 127))
    q = (signed + 32).reshape(-1, 2, 4, 32)  # two halves of four runs of 32 weights
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = ((q >> 4) << np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)).sum(2)
    return _bytes(low, high, scales, _half_bytes(scale))


IQ4_VALUES = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)


def _nearest(groups: F32, scale: F32) -> Ints:
    """Return which of IQ4's values times scale is nearest to each weight."""
    return np.abs(_quotient(groups, scale)[..., None] - IQ4_VALUES).argmin(-1)


def iq4_nl(blocks: F32) -> U8:
    """Return IQ4_NL: a scale times one of 16 numbers."""
    peaks = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    scale = (peaks / IQ4_VALUES[0]).astype(np.float16).astype(np.float32)
    return _bytes(_half_bytes(scale), _nibbles(_nearest(blocks, scale), 16))


def iq4_xs(blocks: F32) -> U8:
    """Return IQ4_XS: 8 sub-blocks with 6-bit scales, of IQ4_NL's numbers."""
    scale, signed_scales, _ = _symmetric(blocks, 32, (-127, 127), (-32, 31))
    step = (scale * signed_scales.astype(np.float32))[..., None]
    q = _nearest(blocks.reshape(-1, 8, 32), step).reshape(-1, 256)
    scales = signed_scales + 32
    high = ((scales >> 4) << np.arange(0, 16, 2)).sum(1).astype(np.uint16)
    low = (scales & 15).reshape(-1, 4, 2)
    return _bytes(_half_bytes(scale), high[:, None].view(np.uint8), low[..., 0] | low[..., 1] << 4, _nibbles(q, 16))


def nvfp4(blocks: F32) -> U8:
    """Return NVFP4: 4 runs, a scale of 8 bits for each, of the numbers that E2M1 has."""
    values = np.array(gguf.quants.NVFP4.kvalues, np.float32)
    runs = blocks.reshape(-1, 4, 16)
    code = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(runs).max(2) / 6)
    scale = np.asarray(gguf.quants.NVFP4.ue4m3_to_fp32(code), np.float32)[..., None]
    q = np.abs(_quotient(runs, scale)[..., None] - values).argmin(-1)
    return _bytes(code, q[..., :8] | q[..., 8:] << 4)


ENCODERS: dict[Type, Callable[[F32], U8]] = {
    Type.Q2_K: q2_k,
    Type.Q3_K: q3_k,
    Type.Q4_K: q4_k,
    Type.Q5_K: q5_k,
    Type.Q6_K: q6_k,
    Type.IQ4_NL: iq4_nl,
    Type.IQ4_XS: iq4_xs,
    Type.NVFP4: nvfp4,
    **iq_quants.ENCODERS,
}
