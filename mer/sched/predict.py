"""Predictions of the experts that a layer to come needs, and the bar that a guess must pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mer.io.extents import ExpertKey

MIN_VISITS: Final = 16
"""Visits of a layer before anything is predicted for it."""
MIN_USES: Final = 2
"""Uses of an expert before it is predicted."""
_FEW: Final = 32  # experts that are looked through faster in Python
_DEVIATIONS: Final = 4.0  # standard deviations above uniform that hardly any expert has by chance


class Prediction(NamedTuple):
    """An expert that a layer to come may need."""

    key: ExpertKey
    probability: float  # that the layer uses it at its next visit


class Predictor(Protocol):
    """Says what layers that are still ahead are likely to use; pure bookkeeping.

    Its owner reports every event, a layer's union of experts over a batch, with `observe`, in the order of the layers.
    A pass may end early: the next one then begins at layer 0 all the same.
    """

    name: str

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """Note that the running pass uses these experts of a layer, at least one, each named once."""

    def predict(self, layer: int) -> list[Prediction]:
        """Return the experts that a layer is likely to use at its next visit, likeliest first.

        All of them pass `bar`. The list is empty where `distance` is 0.
        """


def distance(layer: int, last: int | None, n_layers: int) -> int:
    """Return how many layers ahead of the one observed last a layer is in the running pass; 0 if it is not ahead.

    When the last layer runs, the layers of the next pass are ahead. Before the first event nothing is.
    """
    if last is None or not 0 <= layer < n_layers:
        return 0
    if last == n_layers - 1:
        return layer + 1
    return max(0, layer - last)


def threshold(share: float) -> float:
    """Return the probability from which on an expert is worth a guess: halfway from uniform to twice uniform.

    Args:
        share: the probability of an expert under uniform routing, 0 to 1: experts used by experts of the target
            layer, which are all that can be reached.

    For any number of experts this is below what a successor with twice its uniform share has, and for shares above one
    half below certainty, by as much as it is above uniform; so an estimate that is drawn to the uniform share by
    smoothing, by less than half, reaches it.
    """
    return (share + min(1.0, 2.0 * share)) / 2.0


def bar(share: float, n_visits: int) -> float:
    """Return the probability that a prediction must reach after so many visits of its layer.

    `threshold`, and as long as there are few observations so much above the share that uniform routing would rarely
    look like that: four standard deviations of a frequency over these visits, and what Bernstein's inequality adds for
    rare events.
    """
    if n_visits < MIN_VISITS:
        return math.inf
    chance = _DEVIATIONS * math.sqrt(share * (1.0 - share) / n_visits) + _DEVIATIONS**2 / (3.0 * n_visits)
    return max(threshold(share), share + chance)


def passing(
    layer: int, probabilities: npt.NDArray[np.floating], lowest: float, uses: Sequence[int]
) -> list[Prediction]:
    """Return the experts of a layer whose probability is at least `lowest` and whose use was seen, likeliest first.

    Args:
        layer: the target.
        probabilities: [E].
        lowest: see `bar`.
        uses: [E], how often each has been used so far.
    """
    if len(probabilities) > _FEW:
        experts = (probabilities >= lowest).nonzero()[0]
        pairs = zip(experts.tolist(), probabilities[experts].tolist(), strict=True)
    else:
        pairs = zip(range(len(probabilities)), probabilities.tolist(), strict=True)
    found = [
        Prediction((layer, expert), value) for expert, value in pairs if value >= lowest and uses[expert] >= MIN_USES
    ]
    found.sort(key=_unlikely)
    return found


def _unlikely(prediction: Prediction) -> float:
    return -prediction.probability
