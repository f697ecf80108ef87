"""The numbers by which residents are ranked, where code that knows no policy chooses who leaves."""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt


@attrs.frozen(eq=False)
class Ranks:
    """What residents are worth: of those that may leave, the one that is worth least does.

    A resident is worth `values[layer, expert] * weights[layer] * patience[place]`, where the place of the layer that
    needs the room is 0, that of the layer visited before it 1, and so on; among equals the one of the lowest place
    leaves, and of these the lowest number.
    """

    values: npt.NDArray[np.float64]  # [L, E]
    weights: npt.NDArray[np.float64]  # [L]
    patience: npt.NDArray[np.float64]  # [L]
