"""Weights as the bytes of GGML types and back, by the `gguf` package; Q6_K, which it cannot write, by our own."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

Type = gguf.GGMLQuantizationType


def encode(array: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[np.uint8]:
    """Return an array [..., cols] as the bytes [..., row bytes] of a GGML type."""
    if kind == Type.Q6_K:
        return q6_k(array)
    raw = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    return np.ascontiguousarray(raw).view(np.uint8)


def decode(raw: npt.NDArray[np.uint8], kind: Type) -> npt.NDArray[np.float32]:
    """Return bytes [..., row bytes] of a GGML type as an array [..., cols]."""
    return np.ascontiguousarray(gguf.quants.dequantize(raw, kind), np.float32)


def q6_k(array: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return an array [..., cols] as Q6_K: blocks of 256 with 16 int8 scales and one float16 scale of these.

    Scales come from the largest magnitude of each 16 weights; no search for better ones.
    """
    groups = array.reshape(-1, 16, 16).astype(np.float32)  # [blocks, groups, weights]
    peaks = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
    steps = peaks / np.float32(-32)  # [blocks, groups]
    widest = np.take_along_axis(steps, np.abs(steps).argmax(-1, keepdims=True), -1)
    scale = (widest / np.float32(-128)).astype(np.float16)
    wide = scale.astype(np.float32)
    scales = np.rint(np.divide(steps, wide, out=np.zeros_like(steps), where=wide != 0)).clip(-128, 127).astype(np.int8)
    step = (wide * scales)[..., None]
    q = np.rint(np.divide(groups, step, out=np.zeros_like(groups), where=step != 0)).clip(-32, 31).astype(np.int64) + 32
    halves = q.reshape(-1, 2, 4, 32)  # two halves of four runs of 32 weights
    low = (halves[:, :, :2] & 15) | ((halves[:, :, 2:] & 15) << 4)
    high = ((halves >> 4) << np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)).sum(2)
    blocks = np.concatenate(
        [
            low.reshape(-1, 128).astype(np.uint8),
            high.reshape(-1, 64).astype(np.uint8),
            scales.view(np.uint8),
            scale.view(np.uint8),
        ],
        axis=1,
    )
    return blocks.reshape(*array.shape[:-1], array.shape[-1] // 256 * 210)
