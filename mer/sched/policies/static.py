"""A set of hot experts that stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mer.sched.heat import HeatProfile
from mer.sched.keys import ExpertKey
from mer.sched.policies.ranking import Ranking


class StaticHotSet:
    """Keeps the experts that a heat profile has counted most, whatever is used now.

    Until they have all been used once, colder ones fill the slots, the hottest of them first.
    """

    name = "static"

    def __init__(self, profile: HeatProfile) -> None:
        self._heat = profile.counts.astype(float)  # [L, E]
        self._ranking = Ranking(*self._heat.shape)

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """See `Policy`: nothing changes."""

    def insert(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.insert(key)

    def remove(self, key: ExpertKey) -> None:
        """See `Policy`."""
        self._ranking.remove(key)

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None
    ) -> ExpertKey | None:
        """See `Policy`."""
        lowest = self._ranking.lowest(self._heat, layer, evictable)
        if lowest is None or newcomer is None or self._heat[layer, newcomer] > self._heat[lowest]:
            return lowest
        return layer, newcomer
