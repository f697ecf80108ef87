"""Quantized bytes to weights in plain torch, for every type; and the CPU kernels' tiles back to the file's order.

Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h). All arithmetic is float32 in ggml's own order, so
that the weights are ggml's to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gguf.quants
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


def _nvfp4(b: Tensor) -> Tensor:
    bits = b[:, :4].int()  # 4 bits exponent, 3 bits fraction, and by 2 ** 119 the half of that in float32
    scale = ((bits & 0x7F) << 20).view(torch.float32) * 2.0**119
    scale = torch.where(bits == 0x7F, torch.zeros_like(scale), scale)
    return (scale[:, :, None] * _table(_E2M1, _nibbles(b[:, 4:], 8)).reshape(-1, 4, 16)).reshape(len(b), -1)


def book(name: str) -> Tensor:
    """Return a type's code book as the `gguf` package has it, in memory: float32 [entries, 4 or 8]."""
    quant: Any = getattr(gguf.quants, name)
    quant.init_grid()
    return torch.tensor(quant.grid.reshape(quant.grid_shape), dtype=torch.float32)


@functools.cache
def _book(name: str, device: torch.device) -> Tensor:
    return book(name).to(device)


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """Return 1 or -1 for each bit of every byte, the lowest first: float32 [256, 8]."""
    return 1 - 2 * _fields(torch.arange(256, device=device)[:, None], 1, 8).float()


@functools.cache
def _even(device: torch.device) -> Tensor:
    """Return 7 signs with the eighth one, which makes the negative ones even, for each number of 7 bits."""
    sevens = torch.arange(128, device=device)
    return sevens | (_fields(sevens[:, None], 1, 7).sum(1) & 1) << 7


def _integers(packed: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return bytes, or little-endian words of a type with a sign, as int64 without one."""
    words = packed.contiguous().view(dtype).long()
    return words & (1 << 8 * dtype.itemsize) - 1


def _fields(words: Tensor, width: int, count: int) -> Tensor:
    """Return the lowest `count` fields of `width` bits of words [blocks, n], the lowest first [blocks, n * count]."""
    shifts = torch.arange(0, width * count, width, device=words.device)
    return ((words[:, :, None] >> shifts) & (1 << width) - 1).reshape(len(words), -1)


def _entries(name: str, numbers: Tensor, signs: Tensor | None = None) -> Tensor:
    """Return the weights [blocks, 256] of entries of a code book, with a sign for each bit of bytes [blocks, 32]."""
    weights = _book(name, numbers.device)[numbers].reshape(len(numbers), -1)
    return weights if signs is None else weights * _signs(signs.device)[signs].reshape(weights.shape)


def _iq1_s(b: Tensor) -> Tensor:
    high = _integers(b[:, 34:], torch.int16)
    q = 8 * _entries("IQ1_S", _integers(b[:, 2:34]) | _fields(high, 3, 4) << 8).reshape(-1, 8, 32)
    q = q + (1 - 2 * (high >> 15))[:, :, None]
    return _scaled(_halves(b, 0) / 8, 2 * (high >> 12 & 7) + 1, q.reshape(len(b), -1))


def _iq1_m(b: Tensor) -> Tensor:
    scales, four = _integers(b[:, 48:], torch.int16), _fields(_integers(b[:, 32:48]), 4, 2)
    q = 8 * _entries("IQ1_S", _integers(b[:, :32]) | (four & 7) << 8).reshape(-1, 32, 8)
    q = q + (1 - 2 * (four >> 3))[:, :, None]
    high = scales >> 12
    bits = high[:, :1] | high[:, 1:2] << 4 | high[:, 2:3] << 8 | high[:, 3:] << 12
    scale = (bits - (bits >> 15 << 16)).to(torch.int16).view(torch.float16).float()
    return _scaled(scale / 8, 2 * _fields(scales, 3, 4) + 1, q.reshape(len(b), -1))


def _iq2_xxs(b: Tensor) -> Tensor:
    words = _integers(b[:, 2:], torch.int32)
    numbers, other = _fields(words[:, ::2], 8, 4), words[:, 1::2]
    q = _entries("IQ2_XXS", numbers, _even(b.device)[_fields(other, 7, 4)])
    return _scaled(_halves(b, 0) / 8, 2 * (other >> 28) + 1, q)


def _iq2_xs(b: Tensor) -> Tensor:
    words = _integers(b[:, 2:66], torch.int16)
    q = _entries("IQ2_XS", words & 511, _even(b.device)[words >> 9])
    return _scaled(_halves(b, 0) / 8, 2 * _fields(_integers(b[:, 66:]), 4, 2) + 1, q)


def _iq2_s(b: Tensor) -> Tensor:
    numbers = _integers(b[:, 2:34]) | _fields(_integers(b[:, 66:74]), 2, 4) << 8
    q = _entries("IQ2_S", numbers, _integers(b[:, 34:66]))
    return _scaled(_halves(b, 0) / 8, 2 * _fields(_integers(b[:, 74:]), 4, 2) + 1, q)


def _iq3_xxs(b: Tensor) -> Tensor:
    words = _integers(b[:, 66:], torch.int32)
    q = _entries("IQ3_XXS", _integers(b[:, 2:66]), _even(b.device)[_fields(words, 7, 4)])
    return _scaled(_halves(b, 0) / 4, 2 * (words >> 28) + 1, q)


def _iq3_s(b: Tensor) -> Tensor:
    numbers = _integers(b[:, 2:66]) | _fields(_integers(b[:, 66:74]), 1, 8) << 8
    q = _entries("IQ3_S", numbers, _integers(b[:, 74:106]))
    return _scaled(_halves(b, 0), 2 * _fields(_integers(b[:, 106:]), 4, 2) + 1, q)


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
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ3_S: _iq3_s,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
}
