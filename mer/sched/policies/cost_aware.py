"""LFRU for experts whose misses cost differently."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mer.errors import ConfigError
from mer.sched.policies.lfru import LFRU


class CostAware(LFRU):
    """LFRU that keeps what is likely to cost most at its layer's next visit: likelihood of use times cost of a miss.

    For models that mix weight types, so that experts of one layer are larger than those of another: with bytes as the
    cost it reads the fewest bytes, where LFRU has the fewest misses. With equal costs it does what LFRU does.
    """

    name = "cost"

    def __init__(self, costs: npt.ArrayLike, n_experts: int) -> None:
        """Make one for layers whose misses cost `costs`, [L], in any unit.

        Raises:
            ConfigError: a cost is not a positive finite number.
        """
        self._costs: npt.NDArray[np.float64] = np.asarray(costs, dtype=np.float64)
        if self._costs.ndim != 1 or not (np.isfinite(self._costs).all() and (self._costs > 0).all()):
            raise ConfigError("the cost of a miss must be a positive finite number for each layer")
        super().__init__(len(self._costs), n_experts)

    def _value(self, layer: int, likelihoods: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return likelihoods * float(self._costs[layer])
