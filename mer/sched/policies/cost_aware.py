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

    Args:
        costs: of a miss, by layer, [L], in any unit.
        n_experts: of a layer, E.
        kinds: [L, E], the class of slots that each expert fits; by default all fit the same.

    Raises:
        ConfigError: a cost is not a positive finite number.
    """

    name = "cost"

    def __init__(self, costs: npt.ArrayLike, n_experts: int, *, kinds: npt.ArrayLike | None = None) -> None:
        weights = np.asarray(costs, dtype=np.float64)
        if weights.ndim != 1 or not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ConfigError("the cost of a miss must be a positive finite number for each layer")
        super().__init__(len(weights), n_experts, costs=weights, kinds=kinds)
