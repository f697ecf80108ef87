"""The quantized weight types taken apart in NumPy, in the order in which the file has their bits.

Block layouts are those of ggml (ggml-org/ggml, src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import attrs
import gguf.quants
import numpy as np
import numpy.typing as npt

from mer.io.ggml import GGMLType

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
Ints: TypeAlias = npt.NDArray[np.int64]
Raw: TypeAlias = bytes | U8

# What the nibbles of IQ4_NL and IQ4_XS stand for, and those of MXFP4 and NVFP4 (doubled).
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])


@attrs.frozen
class Blocks:
    """Quantized weights taken apart: weight j is `scale * factor[j // run] * q[j] + minimum * lift[j // run]`."""

    q: Ints  # [blocks, block_size]
    scale: F32  # [blocks, 1]
    factor: Ints  # [blocks, runs]: integer scales within a block
    minimum: F32 | None  # [blocks, 1]; None for types without
    lift: Ints  # [blocks, runs]: integer minima within a block


def unpack(type: GGMLType, raw: Raw) -> Blocks:
    """Return the blocks that raw bytes of a quantized type hold."""
    return UNPACK[type](np.frombuffer(raw, np.uint8).reshape(-1, type.block_bytes))


def _halves(blocks: U8, first: int) -> F32:
    """Return the float16 number that starts at byte `first` of every block, as float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: U8, run: int = 16) -> Ints:
    """Return the low halves of each `run` bytes, then their high halves."""
    runs = packed.reshape(len(packed), -1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1).astype(np.int64)


def _plain(q: Ints, scale: F32, minimum: F32 | None = None) -> Blocks:
    ones = np.ones((len(q), 1), np.int64)
    return Blocks(q, scale, ones, minimum, ones)


def _scaled(q: Ints, scale: F32, factor: Ints) -> Blocks:
    return Blocks(q, scale, factor, None, np.zeros_like(factor))


def _q4_0(blocks: U8) -> Blocks:
    return _plain(_nibbles(blocks[:, 2:]) - 8, _halves(blocks, 0))


def _q4_1(blocks: U8) -> Blocks:
    return _plain(_nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _five_bits(high: U8, packed: U8) -> Ints:
    """Return the nibbles with bit i of the high bits on top of weight i."""
    return _nibbles(packed) | np.unpackbits(high, axis=1, bitorder="little").astype(np.int64) << 4


def _q5_0(blocks: U8) -> Blocks:
    return _plain(_five_bits(blocks[:, 2:6], blocks[:, 6:]) - 16, _halves(blocks, 0))


def _q5_1(blocks: U8) -> Blocks:
    return _plain(_five_bits(blocks[:, 4:8], blocks[:, 8:]), _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: U8) -> Blocks:
    return _plain(np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.int64), _halves(blocks, 0))


def _bit_pairs(packed: U8) -> Ints:
    """Return 256 weights of 2 bits: of each half's 32 bytes the lowest pairs, then the next ones, and so on."""
    halves = packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return halves.reshape(-1, 256).astype(np.int64)


def _bit_planes(packed: U8) -> Ints:
    """Return the lowest bits of 32 bytes, then the next ones, and so on."""
    return (packed[:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(-1, 256).astype(np.int64)


def _q2_k(blocks: U8) -> Blocks:
    factor, lift = (part.astype(np.int64) for part in (blocks[:, :16] & 15, blocks[:, :16] >> 4))
    return Blocks(_bit_pairs(blocks[:, 16:80]), _halves(blocks, 80), factor, -_halves(blocks, 82), lift)


def _q3_k(blocks: U8) -> Blocks:
    q = _bit_pairs(blocks[:, 32:96]) | _bit_planes(blocks[:, :32]) << 2
    low = np.concatenate([blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4], axis=1).astype(np.int64)
    high = np.concatenate([blocks[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).astype(np.int64)
    return _scaled(q - 4, _halves(blocks, 108), (low | high << 4) - 32)


def _six_bits(packed: U8) -> tuple[Ints, Ints]:
    """Return the 8 scales and 8 minima of the 12 bytes that Q4_K and Q5_K have for them."""
    scale, minimum, both = (packed[:, i : i + 4].astype(np.int64) for i in (0, 4, 8))
    scales = [scale & 63, (both & 15) | (scale >> 6 << 4)]
    minima = [minimum & 63, (both >> 4) | (minimum >> 6 << 4)]
    return np.concatenate(scales, axis=1), np.concatenate(minima, axis=1)


def _q4_k(blocks: U8) -> Blocks:
    factor, lift = _six_bits(blocks[:, 4:16])
    return Blocks(_nibbles(blocks[:, 16:], 32), _halves(blocks, 0), factor, -_halves(blocks, 2), lift)


def _q5_k(blocks: U8) -> Blocks:
    factor, lift = _six_bits(blocks[:, 4:16])
    q = _nibbles(blocks[:, 48:], 32) | _bit_planes(blocks[:, 16:48]) << 4
    return Blocks(q, _halves(blocks, 0), factor, -_halves(blocks, 2), lift)


def _q6_k(blocks: U8) -> Blocks:
    low = blocks[:, :128].reshape(-1, 2, 2, 32).astype(np.int64)  # two halves of the block, two runs of bytes each
    high = blocks[:, 128:192].reshape(-1, 2, 32).astype(np.int64)
    runs = [
        ((low[:, :, run % 2] >> (4 * (run // 2))) & 15) | (((high >> (2 * run)) & 3) << 4)  # [blocks, 2, 32]
        for run in range(4)
    ]
    q = np.stack(runs, axis=2).reshape(-1, 256) - 32
    factor = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.int64)
    return _scaled(q, _halves(blocks, 208), factor)


def _iq4_nl(blocks: U8) -> Blocks:
    return _plain(_IQ4[_nibbles(blocks[:, 2:])], _halves(blocks, 0))


def _iq4_xs(blocks: U8) -> Blocks:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    factor = (low.astype(np.int64) | high.astype(np.int64) << 4) - 32
    return _scaled(_IQ4[_nibbles(blocks[:, 8:])], _halves(blocks, 0), factor)


def _mxfp4(blocks: U8) -> Blocks:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return _plain(_E2M1[_nibbles(blocks[:, 1:])], scale)


def _nvfp4(blocks: U8) -> Blocks:
    exponent, fraction = (blocks[:, :4] >> 3 & 15).astype(np.int64), (blocks[:, :4] & 7).astype(np.int64)
    factor = np.where(exponent > 0, 8 + fraction << (exponent - 1).clip(0), fraction)  # times 2**-10, of half the scale
    factor[blocks[:, :4] == 0x7F] = 0
    return _scaled(_E2M1[_nibbles(blocks[:, 4:], 8)], np.full((len(blocks), 1), 2.0**-10, np.float32), factor)


def _book(name: str) -> Ints:
    """Return a type's code book as the `gguf` package has it: integers [entries, 4 or 8]."""
    quant: Any = getattr(gguf.quants, name)
    quant.init_grid()
    book: Ints = quant.grid.reshape(quant.grid_shape).astype(np.int64)
    return book


def _entries(name: str, numbers: Ints) -> Ints:
    """Return the weights [blocks, 256] of the entries with these numbers [blocks, n] of a code book."""
    found: Ints = _book(name)[numbers].reshape(len(numbers), -1)
    return found


def _words(packed: U8) -> Ints:
    """Return little-endian words of 32 bits."""
    return np.ascontiguousarray(packed).view(np.uint32).astype(np.int64)


def _shorts(packed: U8) -> Ints:
    """Return little-endian words of 16 bits."""
    return np.ascontiguousarray(packed).view(np.uint16).astype(np.int64)


def _fields(words: Ints, width: int, count: int, step: int | None = None) -> Ints:
    """Return `count` fields of `width` bits of each word, `step` (or `width`) bits apart, the lowest first."""
    shifts = np.arange(count) * (width if step is None else step)
    return (words[..., None] >> shifts & (1 << width) - 1).reshape(len(words), -1)


def _negated(q: Ints, signs: Ints) -> Ints:
    """Return weights with a sign for each bit of bytes [blocks, 32] that is set."""
    return np.where(_fields(signs, 1, 8) == 1, -q, q)


def _even(sevens: Ints) -> Ints:
    """Return 7 signs with the eighth one, which makes the negative ones even."""
    parity: Ints = _fields(sevens, 1, 7).reshape(*sevens.shape, 7).sum(-1) & 1
    return sevens | parity << 7


def _iq2_xxs(blocks: U8) -> Blocks:
    words = _words(blocks[:, 2:]).reshape(-1, 8, 2)
    q = _entries("IQ2_XXS", _fields(words[..., 0], 8, 4))
    signs = _even(_fields(words[..., 1], 7, 4))
    return _scaled(_negated(q, signs), _halves(blocks, 0) / np.float32(8), 2 * (words[..., 1] >> 28) + 1)


def _iq2_xs(blocks: U8) -> Blocks:
    shorts = _shorts(blocks[:, 2:66])
    q = _negated(_entries("IQ2_XS", shorts & 511), _even(shorts >> 9))
    return _scaled(q, _halves(blocks, 0) / np.float32(8), 2 * _fields(blocks[:, 66:].astype(np.int64), 4, 2) + 1)


def _iq2_s(blocks: U8) -> Blocks:
    low, signs, high, scales = (blocks[:, a:b].astype(np.int64) for a, b in ((2, 34), (34, 66), (66, 74), (74, 82)))
    q = _negated(_entries("IQ2_S", low | _fields(high, 2, 4) << 8), signs)
    return _scaled(q, _halves(blocks, 0) / np.float32(8), 2 * _fields(scales, 4, 2) + 1)


def _iq3_xxs(blocks: U8) -> Blocks:
    words = _words(blocks[:, 66:])
    q = _negated(_entries("IQ3_XXS", blocks[:, 2:66].astype(np.int64)), _even(_fields(words, 7, 4)))
    return _scaled(q, _halves(blocks, 0) / np.float32(4), 2 * (words >> 28) + 1)


def _iq3_s(blocks: U8) -> Blocks:
    low, high, signs, scales = (blocks[:, a:b].astype(np.int64) for a, b in ((2, 66), (66, 74), (74, 106), (106, 110)))
    q = _negated(_entries("IQ3_S", low | _fields(high, 1, 8) << 8), signs)
    return _scaled(q, _halves(blocks, 0), 2 * _fields(scales, 4, 2) + 1)


def _iq1_s(blocks: U8) -> Blocks:
    low, high = blocks[:, 2:34].astype(np.int64), _shorts(blocks[:, 34:])
    shift = np.repeat(1 - 2 * (high >> 15), 32, axis=1)
    q = 8 * _entries("IQ1_S", low | _fields(high, 3, 4) << 8) + shift
    return _scaled(q, _halves(blocks, 0) / np.float32(8), 2 * (high >> 12 & 7) + 1)


def _iq1_m(blocks: U8) -> Blocks:
    low, high, scales = blocks[:, :32].astype(np.int64), blocks[:, 32:48].astype(np.int64), _shorts(blocks[:, 48:])
    four = _fields(high, 4, 2)
    q = 8 * _entries("IQ1_S", low | (four & 7) << 8) + np.repeat(1 - 2 * (four >> 3), 8, axis=1)
    scale = ((scales >> 12) << np.arange(0, 16, 4)).sum(1, keepdims=True).astype(np.uint16)
    return _scaled(q, scale.view(np.float16).astype(np.float32) / np.float32(8), 2 * _fields(scales, 3, 4) + 1)


UNPACK: Final[dict[GGMLType, Callable[[U8], Blocks]]] = {
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
