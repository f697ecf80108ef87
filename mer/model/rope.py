"""Angles of rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor, log, pi

import numpy as np
import numpy.typing as npt

from mer.model.operators import Rope, Yarn

F64 = npt.NDArray[np.float64]


class Rotation:
    """Cosines and sines of a RoPE; every form of the arithmetic takes them from here.

    The angle of pair i of position p is p times `turns[i]`, worked out in float64: float32 would lose a thousandth of a
    turn at position 100,000.

    Args:
        rope: what is rotated how.
        vector: returns a dense vector of the model by its tensor's name; asked for `Rope.factors` alone.
    """

    def __init__(self, rope: Rope, vector: Callable[[str], npt.ArrayLike]) -> None:
        turns = rope.base ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / max(rope.dim, 1)) * rope.scale
        if rope.factors is not None:
            turns = turns / np.asarray(vector(rope.factors.name), np.float64)
        if rope.yarn is not None:
            turns = _interpolated(turns, rope, rope.yarn)
        self.turns: F64 = turns  # radians per position, [dim / 2]
        self._magnitude = 1.0 if rope.yarn is None else rope.yarn.magnitude

    def angles(self, positions: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the cosines and sines [2, T, dim / 2] of positions [T]."""
        angle = positions[:, None] * self.turns
        return (np.stack([np.cos(angle), np.sin(angle)]) * self._magnitude).astype(np.float32)


def _interpolated(turns: F64, rope: Rope, yarn: Yarn) -> F64:
    """Return turns as YaRN has them (Peng et al. 2023, section 3.2).

    Pairs that turn often within the original context stay as they are, those that turn less than once are slowed down
    by the factor, and between the two the share of each falls linearly.
    """

    def pair(rotations: float) -> float:
        """Return the pair that makes so many rotations within the original context."""
        return rope.dim * log(yarn.original / (2 * pi * rotations)) / (2 * log(rope.base))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.whole_pairs:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    kept = 1 - np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0, 1)
    out: F64 = turns * kept + turns / yarn.factor * (1 - kept)
    return out
