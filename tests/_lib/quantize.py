"""Weights as the bytes of GGML types and back, by the `gguf` package; types that it cannot write, by our own."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from tests._lib import k_quants

Type = gguf.GGMLQuantizationType

# Where in a block the half floats lie of types that have any.
HALVES: dict[Type, tuple[int, ...]] = {
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
    Type.IQ1_S: (0,),
    Type.IQ1_M: (54,),  # where its highest bits are: a quarter is in each second byte from 49 on
    Type.IQ2_XXS: (0,),
    Type.IQ2_XS: (0,),
    Type.IQ2_S: (0,),
    Type.IQ3_XXS: (0,),
    Type.IQ3_S: (0,),
}


def put_half(blocks: npt.NDArray[np.uint8], kind: Type, at: int, halves: npt.ArrayLike) -> None:
    """Put half floats [...] or one into blocks [..., block bytes], at one of the places in `HALVES`."""
    bits = np.asarray(halves, np.float16).view(np.uint16)
    if kind is not Type.IQ1_M:
        blocks[..., at : at + 2] = bits[..., None].view(np.uint8)
        return
    for quarter in range(4):
        byte = blocks[..., 49 + 2 * quarter]
        byte[...] = byte & 15 | (bits >> 4 * quarter & 15) << 4


def encode(array: npt.NDArray[np.float32], kind: Type) -> npt.NDArray[np.uint8]:
    """Return an array [..., cols] as the bytes [..., row bytes] of a GGML type."""
    if kind in k_quants.ENCODERS:
        return k_quants.encode(array, kind)
    raw = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    return np.ascontiguousarray(raw).view(np.uint8)


def decode(raw: npt.NDArray[np.uint8], kind: Type) -> npt.NDArray[np.float32]:
    """Return bytes [..., row bytes] of a GGML type as an array [..., cols]."""
    return np.ascontiguousarray(gguf.quants.dequantize(raw, kind), np.float32)
