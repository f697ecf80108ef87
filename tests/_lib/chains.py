"""Routing whose probabilities are known, to hold predictors against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from mer.sched.simulate import Event


@attrs.frozen
class Chain:
    """An expert of each layer that depends on that of the layer before; each of `width` tokens goes its own way.

    Each token has experts of its own, n_experts / width of them, so that what a union will be is known exactly.
    """

    matrices: npt.NDArray[np.float64]  # [L, n, n], from the layer before: that of the last one for layer 0
    width: int

    @classmethod
    def draw(cls, n_layers: int, n_experts: int, *, seed: int, width: int = 1, sharpness: float = 2.0) -> Chain:
        rng = np.random.default_rng(seed)
        n = n_experts // width
        weights = np.exp(sharpness * rng.normal(size=(n_layers, n, n)))
        return cls(weights / weights.sum(axis=2, keepdims=True), width)

    def events(self, n_passes: int, *, seed: int) -> Iterator[tuple[Event, npt.NDArray[np.float64]]]:
        """Yield events, and the true probability of each expert given the event before, [E]."""
        rng = np.random.default_rng(seed)
        n_layers, n, _ = self.matrices.shape
        state = rng.integers(0, n, self.width)
        for _ in range(n_passes):
            for layer in range(n_layers):
                truth = self.matrices[layer, state]
                state = np.array([rng.choice(n, p=row) for row in truth])
                yield (layer, tuple((state + n * np.arange(self.width)).tolist())), truth.ravel()


def uniform(n_layers: int, n_experts: int, top_k: int, n_passes: int, *, seed: int) -> Iterator[Event]:
    """Yield events that nothing foretells."""
    rng = np.random.default_rng(seed)
    for _ in range(n_passes):
        for layer in range(n_layers):
            yield layer, tuple(rng.choice(n_experts, top_k, replace=False).tolist())


def cyclic(n_layers: int, n_experts: int, top_k: int, n_passes: int) -> Iterator[Event]:
    """Yield events that take the experts of each layer in turns, a few at a time."""
    for at in range(n_passes):
        for layer in range(n_layers):
            yield layer, tuple((at * top_k + layer + i) % n_experts for i in range(top_k))


def of_layer(events: Sequence[Event], layer: int) -> list[tuple[int, ...]]:
    """Return what one layer uses."""
    return [tuple(experts) for where, experts in events if where == layer]
