"""Weights as the types with code books, which the `gguf` package reads but cannot write; no search for better scales.

Of each code book only 256 entries are used, spread over all of it, so that the nearest one is found soon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Type = gguf.GGMLQuantizationType
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@functools.cache
def _book(name: str) -> tuple[Ints, F32]:
    """Return the numbers of 256 entries of a code book, and these entries [256, 4 or 8]."""
    quant: Any = getattr(gguf.quants, name)
    quant.init_grid()
    grid = quant.grid.reshape(quant.grid_shape)
    numbers = np.sort(np.random.default_rng(0).permutation(len(grid))[:256])
    return numbers, grid[numbers].astype(np.float32)


def _nearest(name: str, groups: F32) -> Ints:
    """Return for each of [..., 4 or 8] numbers which entry of a code book is nearest."""
    numbers, entries = _book(name)
    flat = groups.reshape(-1, entries.shape[1])
    half_squares = (entries**2).sum(1) / 2
    found = [(half_squares - part @ entries.T).argmin(1) for part in _parts(flat)]
    return np.asarray(numbers[np.concatenate(found)].reshape(groups.shape[:-1]), np.int64)


def _parts(flat: F32) -> Iterator[F32]:
    for first in range(0, len(flat), 4096):
        yield flat[first : first + 4096]


def _scales(steps: F32, most: int) -> tuple[F32, Ints, F32]:
    """Return `(scale, s, step)` with each run's `steps` [blocks, runs] about step = scale * (2 * s + 1)."""
    scale = (steps.max(1, keepdims=True) / np.float32(2 * most + 1)).astype(np.float16).astype(np.float32)
    safe = np.where(scale == 0, np.float32(1), scale)
    s = np.rint((steps / safe - 1) / 2).clip(0, most).astype(np.int64)
    return scale, s, safe * (2 * s + 1).astype(np.float32)


def _half_bytes(numbers: F32) -> U8:
    return numbers.astype(np.float16).view(np.uint8)


def _packed(fields: Ints, width: int, dtype: type[np.unsignedinteger[Any]]) -> U8:
    """Return fields [blocks, words, fields of a word] of `width` bits, the lowest first, as the bytes of words."""
    words = (fields << width * np.arange(fields.shape[2])).sum(2)
    return words.astype(dtype).view(np.uint8)


def _bytes(*parts: Any) -> U8:
    return np.concatenate([np.asarray(part).reshape(len(part), -1).astype(np.uint8) for part in parts], axis=1)


def _signed(name: str, blocks: F32, per_entry: int, runs: int, unit: float, *, even: bool) -> tuple[Any, ...]:
    """Return `(scale, s, numbers, signs)` of types whose entries are magnitudes; scale is that of the block.

    With `even` the negative ones of 8 weights are even: the smallest changes its sign if need be.
    """
    largest = np.float32(_book(name)[1].max())
    groups = blocks.reshape(len(blocks), runs, -1)
    scale, s, step = _scales(np.abs(groups).max(2) / (largest * np.float32(unit)), 15)
    sizes = np.abs(groups) / (step * np.float32(unit))[..., None]
    numbers = _nearest(name, sizes.reshape(len(blocks), -1, per_entry))
    negative = blocks.reshape(len(blocks), 32, 8) < 0
    if even:
        odd = negative.sum(2) % 2 == 1
        smallest = np.abs(blocks).reshape(negative.shape).argmin(2)
        at = np.nonzero(odd)
        negative[(*at, smallest[at])] ^= True
    signs = (negative.astype(np.int64) << np.arange(8)).sum(2)
    return _half_bytes(scale), s, numbers, signs


def iq2_xxs(blocks: F32) -> U8:
    """Return IQ2_XXS: 8 runs, 7 signs of 8 in a word with the sub-scale."""
    scale, s, numbers, signs = _signed("IQ2_XXS", blocks, 8, 8, 1 / 8, even=True)
    low = _packed(numbers.reshape(-1, 8, 4), 8, np.uint32).reshape(-1, 8, 4)
    high = (((signs & 127).reshape(-1, 8, 4) << 7 * np.arange(4)).sum(2) | s << 28).astype(np.uint32)
    return _bytes(scale, np.concatenate([low, high[..., None].view(np.uint8)], axis=2))


def iq2_xs(blocks: F32) -> U8:
    """Return IQ2_XS: 16 runs, numbers of 9 bits with 7 signs."""
    scale, s, numbers, signs = _signed("IQ2_XS", blocks, 8, 16, 1 / 8, even=True)
    shorts = (numbers | (signs & 127) << 9).astype(np.uint16)
    return _bytes(scale, shorts.view(np.uint8), _packed(s.reshape(-1, 8, 2), 4, np.uint8))


def iq2_s(blocks: F32) -> U8:
    """Return IQ2_S: 16 runs, numbers of 10 bits, all signs."""
    scale, s, numbers, signs = _signed("IQ2_S", blocks, 8, 16, 1 / 8, even=False)
    high = _packed((numbers >> 8).reshape(-1, 8, 4), 2, np.uint8)
    return _bytes(scale, numbers & 255, signs, high, _packed(s.reshape(-1, 8, 2), 4, np.uint8))


def iq3_xxs(blocks: F32) -> U8:
    """Return IQ3_XXS: IQ2_XXS with 4 weights to an entry."""
    scale, s, numbers, signs = _signed("IQ3_XXS", blocks, 4, 8, 1 / 4, even=True)
    words = (((signs & 127).reshape(-1, 8, 4) << 7 * np.arange(4)).sum(2) | s << 28).astype(np.uint32)
    return _bytes(scale, numbers, words.view(np.uint8))


def iq3_s(blocks: F32) -> U8:
    """Return IQ3_S: 8 runs, numbers of 9 bits for 4 weights, all signs."""
    scale, s, numbers, signs = _signed("IQ3_S", blocks, 4, 8, 1, even=False)
    high = _packed((numbers >> 8).reshape(-1, 8, 8), 1, np.uint8)
    return _bytes(scale, numbers & 255, high, signs, _packed(s.reshape(-1, 4, 2), 4, np.uint8))


def _ternary(blocks: F32, runs: int, per_shift: int) -> tuple[F32, Ints, Ints, Ints]:
    """Return `(scale, s, numbers, falls)` of the types of -1, 0 and 1; `falls` says which shifts are negative."""
    groups = blocks.reshape(len(blocks), runs, -1)
    scale, s, step = _scales(1.4 * np.abs(groups).mean(2), 7)
    units = (groups / step[..., None]).reshape(len(blocks), -1, per_shift)
    falls = (units.mean(2) < 0).astype(np.int64)
    rest = units - (1 - 2 * falls.astype(np.float32))[..., None] / 8
    return scale, s, _nearest("IQ1_S", rest.reshape(len(blocks), 32, 8)), falls


def iq1_s(blocks: F32) -> U8:
    """Return IQ1_S: 8 runs with a shift each, numbers of 11 bits."""
    scale, s, numbers, falls = _ternary(blocks, 8, 32)
    high = ((numbers >> 8).reshape(-1, 8, 4) << 3 * np.arange(4)).sum(2) | s << 12 | falls << 15
    return _bytes(_half_bytes(scale), numbers & 255, high.astype(np.uint16).view(np.uint8))


def iq1_m(blocks: F32) -> U8:
    """Return IQ1_M: 16 runs, a shift for each entry, the scale in four quarters."""
    scale, s, numbers, falls = _ternary(blocks, 16, 8)
    high = _packed((numbers >> 8 | falls << 3).reshape(-1, 16, 2), 4, np.uint8)
    bits = scale.astype(np.float16).view(np.uint16).astype(np.int64)
    scales = (s.reshape(-1, 4, 4) << 3 * np.arange(4)).sum(2) | (bits >> np.arange(0, 16, 4) & 15) << 12
    return _bytes(numbers & 255, high, scales.astype(np.uint16).view(np.uint8))


ENCODERS: dict[Type, Callable[[F32], U8]] = {
    Type.IQ1_S: iq1_s,
    Type.IQ1_M: iq1_m,
    Type.IQ2_XXS: iq2_xxs,
    Type.IQ2_XS: iq2_xs,
    Type.IQ2_S: iq2_s,
    Type.IQ3_XXS: iq3_xxs,
    Type.IQ3_S: iq3_s,
}
