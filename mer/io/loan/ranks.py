"""Ranks of residents, as numbers for code that knows no policy and chooses the expert to evict."""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt


@attrs.frozen(eq=False)
class Ranks:
    """Values of residents: of those that may be evicted, the least valuable expert is.

    A resident is worth `values[layer, expert] * weights[layer] * patience[place]`, where the place of the layer that
    needs the room is 0, that of the layer visited before it 1, and so on; among equals the one of the lowest place
    is evicted, and of these the lowest number.
    """

    values: npt.NDArray[np.float64]  # [L, E]
    weights: npt.NDArray[np.float64]  # [L]
    patience: npt.NDArray[np.float64]  # [L]
