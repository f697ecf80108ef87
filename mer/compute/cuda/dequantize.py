"""Quantized bytes to weights in plain torch, for every type; and the CPU kernels' tiles back to the file's order.

Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h). All arithmetic is float32 in ggml's own order, so
that the weights are ggml's to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from mer.compute.kernels.interleave import FIELDS, ROWS
from mer.io.ggml import GGMLType

Tensor = torch.Tensor

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled


def dequantize(kind: GGMLType, raw: Tensor) -> Tensor:
    """Return the weights [..., cols] in float32 that raw bytes uint8 [..., row bytes] of a GGML type stand for."""
    if kind in _PLAIN:
        return raw.contiguous().view(_PLAIN[kind]).float()
    blocks = raw.reshape(-1, kind.block_bytes)
    return _DECODERS[kind](blocks).reshape(*raw.shape[:-1], -1)


def file_order(kind: GGMLType, tiles: Tensor, rows: int) -> Tensor:
    """Return the bytes [rows, row bytes] as the file has them of a matrix that the CPU kernels keep in tiles.

    `tiles` is uint8 [n], rows padded to whole tiles of 16. For a type that has no tiles they are the same bytes.
    """
    if int(kind) not in FIELDS:
        return tiles.reshape(rows, -1)
    n_tiles = -(-rows // ROWS)
    blocks = tiles.reshape(n_tiles, -1, ROWS * kind.block_bytes)
    out = torch.empty((n_tiles, ROWS, blocks.shape[1], kind.block_bytes), dtype=torch.uint8, device=tiles.device)
    position = 0
    for offset, unit, count, flip in FIELDS[int(kind)]:
        size = unit * count
        area = blocks[:, :, position : position + ROWS * size].reshape(n_tiles, -1, count, ROWS, unit)
        part = area.permute(0, 3, 1, 2, 4).reshape(n_tiles, ROWS, -1, size)
        out[..., offset : offset + size] = part ^ (flip & 0xFF)
        position += ROWS * size
    return out.reshape(n_tiles * ROWS, -1)[:rows]


def stored_bytes(kind: GGMLType, rows: int, n_bytes: int, *, tiled: bool) -> int:
    """Return the bytes of a matrix in memory: those of the file, and rows of zeros up to whole tiles if it is tiled."""
    return n_bytes // rows * (-(-rows // ROWS) * ROWS) if tiled and int(kind) in FIELDS else n_bytes


def _halves(blocks: Tensor, first: int) -> Tensor:
    """Return the float16 number that starts at byte `first` of every block, as float32 [blocks, 1]."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int = 16) -> Tensor:
    """Return the low halves of each `run` bytes, then their high halves."""
    runs = packed.reshape(len(packed), -1, run)
    return torch.cat([runs & 15, runs >> 4], 2).reshape(len(packed), -1)


def _spread(packed: Tensor, width: int, mask: int) -> Tensor:
    """Return for runs of 32 bytes their lowest `width` bits, then the next ones, and so on."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)[:, None]
    return ((runs >> shifts) & mask).reshape(len(packed), -1)


def _bits(packed: Tensor) -> Tensor:
    """Return the bits of 4 bytes, the lowest first, as the fifth bits [blocks, 32] of weights."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).reshape(len(packed), -1) << 4


@functools.cache
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _table(numbers: tuple[int, ...], codes: Tensor) -> Tensor:
    return _numbers(numbers, codes.device)[codes.int()]  # made once: a CUDA graph may not copy from memory


def _scaled(scale: Tensor, factor: Tensor, q: Tensor) -> Tensor:
    """Return scale [blocks, 1] * factor [blocks, runs] * q [blocks, weights], with one factor for each run."""
    scales = (scale * factor.float())[:, :, None]
    return (scales * q.float().reshape(len(q), factor.shape[1], -1)).reshape(len(q), -1)


def _lifted(weights: Tensor, minimum: Tensor, lift: Tensor) -> Tensor:
    """Return weights less minimum [blocks, 1] * lift [blocks, runs]."""
    minima = (-minimum * lift.float())[:, :, None]
    return (weights.reshape(len(weights), lift.shape[1], -1) + minima).reshape(len(weights), -1)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 8 scales and the 8 minima of 6 bits in the 12 bytes that Q4_K and Q5_K have for them."""
    scale, minimum, both = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    return (
        torch.cat([scale & 63, (both & 15) | (scale >> 6 << 4)], 1),
        torch.cat([minimum & 63, (both >> 4) | (minimum >> 6 << 4)], 1),
    )


def _q4_0(b: Tensor) -> Tensor:
    return _halves(b, 0) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _halves(b, 0) * _nibbles(b[:, 4:]).float() + _halves(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    return _halves(b, 0) * ((_nibbles(b[:, 6:]) | _bits(b[:, 2:6])).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _halves(b, 0) * (_nibbles(b[:, 8:]) | _bits(b[:, 4:8])).float() + _halves(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    return _halves(b, 0) * b[:, 2:].view(torch.int8).float()


def _q2_k(b: Tensor) -> Tensor:
    weights = _scaled(_halves(b, 80), b[:, :16] & 15, _spread(b[:, 16:80], 2, 3))
    return _lifted(weights, _halves(b, 82), b[:, :16] >> 4)


def _q3_k(b: Tensor) -> Tensor:
    q = _spread(b[:, 32:96], 2, 3) | _spread(b[:, :32], 1, 1) << 2
    low = torch.cat([b[:, 96:104] & 15, b[:, 96:104] >> 4], 1)
    high = torch.cat([(b[:, 104:108] >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    return _scaled(_halves(b, 108), (low | high << 4).float() - 32, q.float() - 4)


def _q4_k(b: Tensor) -> Tensor:
    factor, lift = _six_bits(b[:, 4:16])
    return _lifted(_scaled(_halves(b, 0), factor, _nibbles(b[:, 16:], 32)), _halves(b, 2), lift)


def _q5_k(b: Tensor) -> Tensor:
    factor, lift = _six_bits(b[:, 4:16])
    q = _nibbles(b[:, 48:], 32) | _spread(b[:, 16:48], 1, 1) << 4
    return _lifted(_scaled(_halves(b, 0), factor, q), _halves(b, 2), lift)


def _q6_k(b: Tensor) -> Tensor:
    low = b[:, :128].reshape(-1, 2, 2, 32)  # two halves of the block, two runs of bytes each
    low = torch.cat([low & 15, low >> 4], 2)
    q = low | _spread(b[:, 128:192], 2, 3).reshape(-1, 2, 4, 32) << 4
    return _scaled(_halves(b, 208), b[:, 192:208].view(torch.int8), q.reshape(len(b), -1).float() - 32)


def _iq4_nl(b: Tensor) -> Tensor:
    return _halves(b, 0) * _table(_IQ4, _nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    low = torch.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], 2).reshape(-1, 8)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device)
    high = ((b[:, 2:4, None] >> shifts) & 3).reshape(-1, 8)
    return _scaled(_halves(b, 0), (low | high << 4).float() - 32, _table(_IQ4, _nibbles(b[:, 8:])))


def _mxfp4(b: Tensor) -> Tensor:
    exponent = b[:, :1].int()  # 2 ** (exponent - 128), by the bits of a float32; below 2 it is subnormal
    scale = torch.where(exponent >= 2, exponent - 1 << 23, exponent + 1 << 21).view(torch.float32)
    return scale * _table(_E2M1, _nibbles(b[:, 1:]))


_PLAIN = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}

_DECODERS: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}
