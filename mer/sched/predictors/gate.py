"""The next layer's router, asked before its turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

from mer.errors import ConfigError
from mer.sched.predict import Prediction, bar, distance

MIN_OFFERS: Final = 8
"""Experts of a rank that were offered and came up, or not, before that rank predicts anything."""
_WINDOW: Final = 1024  # offers of a rank after which its counts are halved
_PRIOR: Final = 2.0  # offers that the uniform share weighs in the precision of a rank
_SPAN: Final = 64  # events over which the share of experts that a layer uses is averaged
_SIZES: Final = 4  # classes of batches: 1, 2 and 3, 4 to 7, more tokens


@attrs.frozen(eq=False)
class _Offer:
    """Experts that a router has offered in advance."""

    ranks: dict[int, int]  # {expert: best rank that a token gives it}
    size: int  # class of the batch


class GatePredictor:
    """Weighs the offers of a layer's router by their precision so far.

    A router that is applied to the residual stream before its layer's turn ranks the experts for each token; `offer`
    takes that. The probability of an expert is the measured precision of its best rank: how often, in this layer and
    for batches of about this many tokens, an expert offered at that rank was then used. The router knows what it
    offers, so that an expert may be predicted that was never used before.

    Args:
        n_layers: L.
        n_experts: E, of a layer.
        top_k: experts that a token uses.
        n_ranks: the most ranks that are offered; `top_k` if not given.

    Raises:
        ConfigError: `n_ranks` is not 1 to E.
    """

    name = "gate"

    def __init__(self, n_layers: int, n_experts: int, top_k: int, *, n_ranks: int | None = None) -> None:
        self.n_layers, self.n_experts = n_layers, n_experts
        self.n_ranks = top_k if n_ranks is None else n_ranks
        if not 1 <= self.n_ranks <= n_experts:
            raise ConfigError(f"a router of {n_experts} experts ranks 1 to {n_experts} of them, not {self.n_ranks}")
        shape = n_layers, _SIZES, self.n_ranks
        self._offered = np.zeros(shape)  # experts whose best rank this was
        self._right = np.zeros(shape)  # those of them that were used
        self._shares = [top_k / n_experts] * n_layers  # of a layer's experts that an event uses
        self._visits = [0] * n_layers
        self._offers: dict[int, _Offer] = {}  # {layer: the latest}
        self._last: int | None = None

    def offer(self, layer: int, ids: npt.NDArray[np.int32 | np.int64]) -> None:
        """Take what a layer's router says in advance; a later offer for the same visit replaces an earlier one.

        To be called after the event of the layer that runs. It holds until the layer's own event, or to the end of the
        pass if that ends early.

        Args:
            layer: the target.
            ids: [T, R], the experts of each token, the likeliest first; R up to `n_ranks`.

        Raises:
            ValueError: the layer, an expert or a rank does not exist.
        """
        if ids.ndim != 2 or ids.shape[1] > self.n_ranks or not 0 <= layer < self.n_layers:
            raise ValueError(f"no offer of up to {self.n_ranks} ranks for one of {self.n_layers} layers: {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_experts:
            raise ValueError(f"experts must be numbers below {self.n_experts}: {ids.min()} to {ids.max()}")
        ranks: dict[int, int] = {}
        for rank, column in enumerate(ids.T.tolist()):
            for expert in column:
                ranks.setdefault(expert, rank)
        size = min(_SIZES, max(1, len(ids)).bit_length()) - 1
        self._offers[layer] = _Offer(ranks, size)

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """See `Predictor`."""
        if self._last is not None and layer != (self._last + 1) % self.n_layers:
            self._offers.clear()
        offer = self._offers.pop(layer, None)
        if offer is not None:
            self._learn(layer, offer, set(experts))
        self._visits[layer] += 1
        self._shares[layer] += (len(experts) / self.n_experts - self._shares[layer]) / min(_SPAN, self._visits[layer])
        self._last = layer

    def _learn(self, layer: int, offer: _Offer, used: set[int]) -> None:
        offered, right = self._offered[layer, offer.size], self._right[layer, offer.size]
        for expert, rank in offer.ranks.items():
            offered[rank] += 1.0
            right[rank] += expert in used
        if offered.max() >= _WINDOW:
            offered *= 0.5
            right *= 0.5

    def predict(self, layer: int) -> list[Prediction]:
        """See `Predictor`; nothing without an offer for the layer."""
        offer = self._offers.get(layer)
        if offer is None or not distance(layer, self._last, self.n_layers):
            return []
        share = self._shares[layer]
        offered = self._offered[layer, offer.size]
        precision = (self._right[layer, offer.size] + _PRIOR * share) / (offered + _PRIOR)
        precision[offered < MIN_OFFERS] = 0.0
        lowest, of_rank = bar(share, self._visits[layer]), precision.tolist()
        found = [
            Prediction((layer, expert), of_rank[rank])
            for expert, rank in offer.ranks.items()
            if of_rank[rank] >= lowest
        ]
        found.sort(key=lambda prediction: -prediction.probability)
        return found
