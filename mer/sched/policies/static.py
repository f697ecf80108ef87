"""A set of hot experts that stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks
from mer.sched.heat import HeatProfile
from mer.sched.policies.ranking import Ranking


class StaticHotSet:
    """Keeps the experts that a heat profile has counted most, whatever is used now.

    Until they have all been used once, colder ones fill the slots, the hottest of them first.

    Args:
        profile: what is hot.
        kinds: [L, E], the class of slots that each expert fits; by default all fit the same.
    """

    name = "static"

    def __init__(self, profile: HeatProfile, *, kinds: npt.ArrayLike | None = None) -> None:
        # [L, E], uses per visit: profiles of several runs may have counted layers unequally often
        self._heat = profile.counts / np.maximum(profile.visits, 1)[:, None]
        self._ranking = Ranking(self._heat, kinds=kinds)

    @property
    def ranks(self) -> Ranks:
        """See `Policy`."""
        return self._ranking.ranks

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`: nothing changes, but whose turn it is."""
        self._ranking.visited(layer)

    def likelihood(self, key: ExpertKey) -> float:
        """See `Policy`: the share of the layer's visits that used it when the profile was made."""
        return float(self._heat[key])

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.insert(key)

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.remove(key)

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        """See `Policy`."""
        lowest = self._ranking.lowest(evictable, kind)
        if lowest is None or newcomer is None or self._heat[layer, newcomer] > self._heat[lowest]:
            return lowest
        return layer, newcomer
