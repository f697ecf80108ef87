"""Interface of cache policies: the choice of the expert to evict, and whether the newcomer is worth a slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mer.io.extents import ExpertKey
from mer.io.loan.ranks import Ranks


class Policy(Protocol):
    """Ranks the experts that are kept; pure bookkeeping, it knows neither slots nor bytes in memory.

    Its owner reports every event, a layer's union of experts over a batch, with `use`, before it asks anything about
    that event.
    """

    name: str

    @property
    def ranks(self) -> Ranks | None:
        """The numbers by which `victim` chooses, changed in place; None if it chooses otherwise."""

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """Note that a batch uses these experts of a layer, each named once, kept or not."""

    def insert(self, key: ExpertKey) -> None:
        """Note that an expert is kept from now on."""

    def remove(self, key: ExpertKey) -> None:
        """Note that an expert is no longer kept."""

    def likelihood(self, key: ExpertKey) -> float:
        """Return an estimate, from 0 to 1, of the probability that its layer's next visit uses an expert, kept or not.

        Cheap, and the same until the next `use`.
        """

    def victim(
        self, layer: int, evictable: Callable[[ExpertKey], bool], newcomer: int | None = None, *, kind: int = 0
    ) -> ExpertKey | None:
        """Return the kept expert that should make room for one of `layer`, or None if none is evictable.

        With `newcomer`, the number of the expert that needs the room, the answer may be that expert itself,
        `(layer, newcomer)`: it is worth less than all that could be evicted. An owner that has a buffer besides the
        slots uses the expert there once and drops it, without inserting it. One that has not asks without `newcomer`
        and inserts it; it is then ranked by what it is worth, so that it is among the first to be evicted.

        Args:
            layer: of the expert that needs the room: the one that `use` was told last, or one that is read ahead.
            evictable: whether a kept expert may be evicted; asked about none of another class of slots.
            newcomer: see above.
            kind: the class of slots that the room is needed in.
        """
