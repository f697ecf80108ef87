"""Integer dot products of the largest weights and activations, where the lanes of a form might overflow."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from tests._lib import quantize
from tests._lib.quantize import decode, put_half
from tests._lib.steps import F32, U8, product

BLOCKS = [kind for kind in sorted(MATRIX_TYPES) if kind.block_size > 1]
LARGEST = 127


def extreme_weights(kind: GGMLType, factors: tuple[float, ...]) -> U8:
    """Return blocks [rows, bytes]: of every byte throughout, then with such bytes mixed as are the ends of a range."""
    rng = np.random.default_rng(0)
    ends = np.array([0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF], np.uint8)
    constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.block_bytes, axis=1)
    raw = np.concatenate([constant, rng.choice(ends, (64, kind.block_bytes))])
    for at, factor in zip(quantize.HALVES.get(quantize.Type(int(kind)), ()), factors, strict=False):
        put_half(raw, quantize.Type(int(kind)), at, factor)
    if kind is GGMLType.MXFP4:
        raw[:, 0] = 128  # 2**0
    if kind is GGMLType.NVFP4:
        raw[:, :4] = 0x40  # 2, of which weights have half
    return raw


def extreme_activations(cols: int) -> F32:
    """Return columns of plus and minus 127: throughout, by turns of 1, 2, 4, 16 and 32, and mixed."""
    turns = [(-1.0) ** (np.arange(cols) // width) for width in (cols, 1, 2, 4, 16, 32)]
    mixed = np.random.default_rng(1).choice([-1.0, 1.0], (4, cols))
    signs = np.concatenate([turns, mixed])
    return (LARGEST * np.concatenate([signs, -signs])).astype(np.float32)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("factors", [(1.0, 0.0), (0.0, 1.0)], ids=["scale", "minimum"])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_the_largest_numbers_do_not_saturate(kind: GGMLType, factors: tuple[float, float], planes: int) -> None:
    """A block whose scale is 1 gives the very integer, rounded once to float32, or twice where each plane is added."""
    raw, x = extreme_weights(kind, factors), extreme_activations(kind.block_size)
    weights = decode(raw, gguf.GGMLQuantizationType(int(kind))).astype(np.float64)
    want = x.astype(np.float64) @ weights.T
    got = product(kind, raw, len(raw), x, planes=planes)
    if planes == 1:
        assert np.array_equal(got, want.astype(np.float32))
    else:
        assert np.allclose(got, want, rtol=2.0**-22, atol=0)
    if kind in (GGMLType.MXFP4, GGMLType.NVFP4) or factors[len(quantize.HALVES[quantize.Type(int(kind))]) - 1] == 1:
        assert np.abs(want).max() >= 127 * kind.block_size  # there was something to add
