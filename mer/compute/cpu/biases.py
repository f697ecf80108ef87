"""Biases of routed experts in memory of their own, where the dense weights are not the processor's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.matrix import FLOAT_BYTES
from mer.compute.cpu.program import Memory
from mer.io.extents import round_up
from mer.model.operators import ExpertWeights


class ExpertBiases:
    """The biases of all layers' experts by the names of their tensors, float32 [E, n].

    Args:
        weights: of each layer's experts.
    """

    def __init__(self, weights: Sequence[ExpertWeights]) -> None:
        self._shapes = _shapes(weights)
        self._memory = Memory(bias_bytes(weights))
        self._address = {name: self._memory.cut(FLOAT_BYTES * e * n) for name, (e, n) in self._shapes.items()}

    def address(self, name: str) -> int:
        """Return where the biases of a tensor lie."""
        return self._address[name]

    def load(self, floats: Callable[[str], npt.ArrayLike]) -> None:
        """Take over all of them, of the E * n or [E, n] floats that each name has."""
        for name, shape in self._shapes.items():
            self._memory.floats(self._address[name], *shape)[:] = np.asarray(floats(name)).reshape(shape)


def bias_bytes(weights: Sequence[ExpertWeights]) -> int:
    """Return the bytes of all layers' biases."""
    return sum(round_up(FLOAT_BYTES * e * n, 64) for e, n in _shapes(weights).values())


def _shapes(weights: Sequence[ExpertWeights]) -> Mapping[str, tuple[int, int]]:
    shapes = {}
    for record in weights:
        for tensor in record.biases:
            experts, n = tensor.shape
            shapes[tensor.name] = experts, n
    return shapes
