"""Places that compute experts, whatever they are: what a worker asks of each, and the pairs that it gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import attrs
import numpy as np

from mer.compute.messages import Int32Array, Int64Array, LoadedExpert

Rows = TypeVar("Rows")
"""Float32 [n, D] in the form that a dense part has them in: a NumPy array, or a tensor of its device."""


class Pairs:
    """The (token, choice) pairs of a batch in one layer, sorted by expert.

    Args:
        ids: [T, K], the router's choice.

    Attributes:
        ids: the same.
        order: int64 [T * K], the pairs: number // K is the token's row.
        spans: of each expert that was chosen: the first of its pairs in `order`, and how many they are.
    """

    def __init__(self, ids: Int32Array) -> None:
        self.ids = ids
        flat = ids.ravel()
        self.order: Int64Array = np.argsort(flat, kind="stable")
        numbers, firsts, counts = np.unique(flat[self.order], return_index=True, return_counts=True)
        spans = zip(firsts.tolist(), counts.tolist(), strict=True)
        self.spans: Mapping[int, tuple[int, int]] = dict(zip(numbers.tolist(), spans, strict=True))

    def count(self, expert: int) -> int:
        """Return how many rows were routed to an expert."""
        return self.spans.get(expert, (0, 0))[1]

    def of(self, experts: Sequence[int]) -> Int64Array:
        """Return the pairs [n] of experts, one expert after the other."""
        spans = (self.spans.get(expert, (0, 0)) for expert in experts)
        parts = [self.order[first : first + n] for first, n in spans]
        return np.concatenate(parts) if parts else self.order[:0]


@attrs.frozen
class Cost:
    """The time that experts are expected to take in one place, in seconds."""

    expert_s: Sequence[float]  # of each
    start_s: float = 0.0  # whatever they are, such as the way there and back; nothing, if there is none


class ExpertPlace(Protocol[Rows]):
    """Computes experts of a layer beside other places, for a dense part whose rows are `Rows`.

    `start` and `finish` are called in turns and from one thread; `cost` while neither runs. What `start` is given stays
    as it is until `finish` has returned.
    """

    def cost(self, layer: int, experts: Sequence[LoadedExpert], rows: Sequence[int]) -> Cost | None:
        """Return what experts would take for so many rows each; None if it has not been measured, or long ago."""

    def start(self, layer: int, experts: Sequence[LoadedExpert], h: Rows, pairs: Pairs) -> None:
        """Start to compute at least one expert, for the rows of h [T, D] that were routed to it.

        If it raises, no thread of the place looks at the experts any more.
        """

    def finish(self, *, timed: bool) -> Rows | None:
        """Return what `start` began, once it is there: y [n, D] of the pairs `Pairs.of` its experts, not weighted.

        They are not summed, so that the dense part adds the experts of a token in one order, whoever computed them.

        Args:
            timed: whether other places worked meanwhile, so that the time that this one took is worth waiting for. A
                place whose rows are put in order behind its work need not wait otherwise.

        Returns:
            The rows; None if they are where the dense part reads them already, as both share memory.
        """
