"""Weighing features against each other by least squares, as the data come."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_FORGETTING: Final = 0.998  # per event
_EVENTS_PER_FIT: Final = 8
_SWEEPS: Final = 3  # of coordinate descent, from the weights of the fit before
_SMALLEST: Final = 1e-12  # divisor, for a feature that has been 0 for so long that nothing is left of it
_START: Final = 0.3  # weight of each feature before anything is known, as sure as one observation of size 1 makes it


class OnlineRegression:
    """The weights, none negative, with which a sum of features would have predicted what was seen with least error.

    Features that say nothing get the weight 0: on noise the sum stays 0. A feature that is itself an estimate from few
    counts gets a small weight while it is noisy, and a larger one as it firms up.

    Attributes:
        moments: [F + 1, F + 1], decayed sums of products of the features and, last, the truth.
    """

    def __init__(self, n_features: int) -> None:
        self.moments = np.eye(n_features + 1)
        self.moments[-1] = _START
        self._events = 0
        self._weights = {0: np.full(n_features, _START)}  # {features left out: weights}

    def resume(self, weights: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64]) -> None:
        """Go on from weights, [F], learnt from features whose decayed sums of squares were `sizes`, [F]."""
        self.moments[...] = 0.0
        self.moments[range(len(sizes)), range(len(sizes))] = sizes
        self.moments[-1, :-1] = weights * sizes
        self._weights = {0: weights.copy()}

    def learn(self, sample: npt.NDArray[np.float64]) -> None:
        """Add what features were followed by, [F + 1, E], the truth last."""
        self.moments *= _FORGETTING
        self.moments += sample @ sample.T
        self._events += 1
        if self._events % _EVENTS_PER_FIT == 0:
            for n_missing, weights in self._weights.items():
                self._weights[n_missing] = self._fit(n_missing, weights.tolist())

    def weights(self, n_missing: int = 0) -> npt.NDArray[np.float64]:
        """Return the weights, [F - n_missing], for when the last `n_missing` features are not known."""
        known = self._weights.get(n_missing)
        if known is None:
            n = len(self.moments) - 1 - n_missing
            known = self._weights[n_missing] = self._fit(n_missing, self._weights[0].tolist()[:n])
        return known

    def _fit(self, n_missing: int, weights: list[float]) -> npt.NDArray[np.float64]:
        rows = self.moments.tolist()
        truth = rows[-1]
        n = len(truth) - 1 - n_missing
        for _ in range(_SWEEPS):
            for i in range(n):
                row = rows[i]
                slack = truth[i]
                for j in range(n):
                    slack -= row[j] * weights[j]
                weights[i] = max(0.0, weights[i] + slack / max(row[i], _SMALLEST))
        return np.array(weights)
