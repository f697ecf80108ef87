"""Weighing features against each other by least squares, as the data come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

_FORGETTING: Final = 0.998  # per event
_EVENTS_PER_FIT: Final = 8
_SWEEPS: Final = 3  # of coordinate descent, from the weights of the fit before
_SMALLEST: Final = 1e-12  # divisor, for a feature that has been 0 for so long that nothing is left of it
_DOUBT: Final = 4.0  # squared standard errors at which a weight counts half


@attrs.frozen(eq=False)
class _Fit:
    """Weights of the features that are known."""

    weights: list[float]  # of least squared error
    drawn: npt.NDArray[np.float32]  # the same, drawn to 0


class OnlineRegression:
    """The weights, none negative, with which a sum of features would have predicted what was seen with least error.

    A feature that is itself an estimate from few counts gets a small weight while it is noisy, and a larger one as it
    firms up. A weight that may be chance is drawn to 0: by half where it is twice its standard error. So on noise the
    sum stays 0.

    Attributes:
        moments: [F + 1, F + 1], decayed sums of products of the features and, last, the truth.
        n: decayed number of values of each.
    """

    def __init__(self, n_features: int) -> None:
        self.moments = np.zeros((n_features + 1, n_features + 1))
        self.n = 0.0
        self._events = 0
        self._fits = {0: _Fit([0.0] * n_features, np.zeros(n_features, dtype=np.float32))}  # {features left out: fit}

    @property
    def least(self) -> list[float]:
        """The weights of least squared error, [F], not drawn to 0."""
        return self._fits[0].weights

    def resume(self, least: Sequence[float], moments: npt.NDArray[np.float64], n: float) -> None:
        """Go on from what another regression had in `least`, `moments` and `n`."""
        self.moments[...] = moments
        self.n = n
        self._fits = {0: self._drawn(list(least))}

    def learn(self, sample: npt.NDArray[np.float32]) -> None:
        """Add what features were followed by, [F + 1, E], the truth last."""
        self.moments *= _FORGETTING
        self.moments += sample.dot(sample.T)
        self.n = self.n * _FORGETTING + sample.shape[1]
        self._events += 1
        if self._events % _EVENTS_PER_FIT == 0:
            for n_missing, fit in self._fits.items():
                self._fits[n_missing] = self._fit(n_missing, fit.weights)

    def weights(self, n_missing: int = 0) -> npt.NDArray[np.float32]:
        """Return the weights, [F - n_missing], for when the last `n_missing` features are not known."""
        fit = self._fits.get(n_missing)
        if fit is None:
            n = len(self.moments) - 1 - n_missing
            fit = self._fits[n_missing] = self._fit(n_missing, self._fits[0].weights[:n])
        return fit.drawn

    def _fit(self, n_missing: int, weights: list[float]) -> _Fit:
        rows = self.moments.tolist()
        truth = rows[-1]
        n = len(truth) - 1 - n_missing
        weights = weights[:]
        for _ in range(_SWEEPS):
            for i in range(n):
                row = rows[i]
                slack = truth[i]
                for j in range(n):
                    slack -= row[j] * weights[j]
                weights[i] = min(1.0, max(0.0, weights[i] + slack / max(row[i], _SMALLEST)))
        return self._drawn(weights)

    def _drawn(self, weights: list[float]) -> _Fit:
        """Draw weights to 0 by how uncertain they are."""
        chance = _DOUBT * float(self.moments[-1, -1]) / max(self.n, _SMALLEST)
        squares = self.moments.diagonal()[: len(weights)].tolist()
        surprise = [weight * weight * square for weight, square in zip(weights, squares, strict=True)]
        drawn = [w * s / (s + chance + _SMALLEST) for w, s in zip(weights, surprise, strict=True)]
        return _Fit(weights, np.array(drawn, dtype=np.float32))
