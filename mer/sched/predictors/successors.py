"""Counts of the experts that followed each context, in a table of bounded size."""

from __future__ import annotations

from typing import Final

import attrs
import numpy as np
import numpy.typing as npt

WINDOW: Final = 8192
"""Visits after which a context's counts are halved: it forgets, and they fit into 16 bits."""
_PRIOR: Final = 4.0  # visits that the base rate weighs in the estimate of a row
_DOUBT: Final = 4.0  # variances of chance at which a lift counts half
_TINY: Final = 1e-12
_CREDIT: Final = 127  # of the owner of a row that is contended for
_CHECK: Final = 1024  # visits of the table between searches for rows that are full
MAX_VISITS: Final = WINDOW + _CHECK
"""No row counts more."""

Integers = npt.NDArray[np.int64]


@attrs.define(eq=False)
class Visit:
    """A table's counts for some contexts, and the rows to count their successors in."""

    contexts: Integers  # [n], different ones
    n_first: int  # how many of them are of the first order; they come first
    rows: Integers  # [n]
    counts: npt.NDArray[np.uint16]  # [n, E + 1], a copy; the last column counts visits; 0 where others own the row


class SuccessorTable:
    """Counts of the experts that followed contexts of two orders, each kept in a separate region.

    Contexts of an order are numbers from 0. Where a region has fewer rows than there are contexts, they share them, and
    a row belongs to one context at a time. A visit of its owner renews the row's credit; a visit of another context
    reduces it. The first context that finds no credit left takes the row over, empty. So contexts that recur stay
    (Misra and Gries, Finding repeated elements, 1982).

    Args:
        n_experts: E.
        n_contexts: of each order.
        max_bytes: bound of each region; one row is kept whatever it takes.

    Attributes:
        counts: [rows, E + 1] uint16, uses of each expert after the row's context, and visits of that context; no count
            exceeds those.
        owners: [rows], the context whose row it is, numbered on from order to order; -1 for none.
    """

    def __init__(self, n_experts: int, n_contexts: tuple[int, int], max_bytes: tuple[int, int]) -> None:
        self.n_experts, self.n_contexts = n_experts, n_contexts
        first, second = (_rows_within(n, n_experts, limit) for n, limit in zip(n_contexts, max_bytes, strict=True))
        self.n_rows = first, second
        self.counts = np.zeros((first + second, n_experts + 1), dtype=np.uint16)
        self.shared = self.n_rows != n_contexts
        n_owned = first + second if self.shared else 0
        self.owners = np.full(n_owned, -1, dtype=np.int64)
        self.credits = np.zeros(n_owned, dtype=np.int16)
        self._visits = 0

    @property
    def n_bytes(self) -> int:
        """Memory taken."""
        return self.counts.nbytes + self.owners.nbytes + self.credits.nbytes

    def look_up(self, contexts: Integers, n_first: int) -> Visit:
        """Return what is known of different contexts.

        Args:
            contexts: [n], numbered on from order to order; those of the first order first.
            n_first: how many these are.
        """
        if not self.shared:
            return Visit(contexts, n_first, contexts, self.counts.take(contexts, 0))
        rows = contexts % self.n_rows[0]
        rows[n_first:] = (contexts[n_first:] - self.n_contexts[0]) % self.n_rows[1] + self.n_rows[0]
        counts = self.counts.take(rows, 0)
        counts[self.owners.take(rows) != contexts] = 0
        return Visit(contexts, n_first, rows, counts)

    def lift(
        self, visit: Visit, base: npt.NDArray[np.float32], weights: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return by how much the contexts of each order together raise what follows, a row for each order, [1 or 2, E].

        Each context adds its smoothed frequency less the base rate, (count - visits * base) / (visits + 4). A sum that
        may be chance is drawn to zero: by half where its square is four times its variance under the base rate.

        Args:
            visit: the contexts.
            base: [E], probabilities without a context.
            weights: [n], probability of each context, 1 if not given.
        """
        counts = visit.counts.astype(np.float32)
        visits = counts[:, -1]
        per_visit = np.reciprocal(visits + _PRIOR)
        if weights is not None:
            per_visit *= weights
        n = visit.n_first
        by_order = np.zeros((1 if n == len(counts) else 2, len(counts)), dtype=np.float32)
        by_order[0, :n] = per_visit[:n]
        by_order[-1, n:] = per_visit[n:]
        sums = by_order.dot(counts)  # [orders, E + 1]
        lift: npt.NDArray[np.float32] = sums[:, :-1] - sums[:, -1:] * base
        per_visit *= visits
        chance = by_order.dot(per_visit)[:, None] * (base - base * base)
        chance *= _DOUBT
        square = lift * lift
        chance += square
        chance += _TINY
        square /= chance
        lift *= square
        return lift

    def add(self, visit: Visit, successors: npt.NDArray[np.uint16]) -> None:
        """Count the visit of contexts, looked up since the last `add`, that was followed by some experts.

        Args:
            visit: the contexts; used up.
            successors: [E + 1], 1 for those experts and at the end.
        """
        rows, counts = visit.rows, visit.counts
        if self.shared:
            mine = self.owners.take(rows) == visit.contexts
            if not mine.all():
                self._contend(rows[~mine], visit.contexts[~mine])
                mine = self.owners.take(rows) == visit.contexts
                rows, counts = rows[mine], counts[mine]
            self.credits[rows] = np.minimum(self.credits.take(rows) + 1, _CREDIT)
        counts += successors
        self.counts[rows] = counts
        self._visits += 1
        if self._visits % _CHECK == 0:
            self._forget()

    def rows(self, limit: int) -> tuple[Integers, npt.NDArray[np.uint16]]:
        """Return the contexts that are known, numbered on from order to order, ascending, and their counts, [n, E + 1].

        Args:
            limit: the most that are returned; those that were visited most often.
        """
        filled = self.counts[:, -1].nonzero()[0]
        if len(filled) > limit:
            filled = np.sort(filled[np.argsort(-self.counts[filled, -1].astype(np.int64), kind="stable")[:limit]])
        contexts = self.owners[filled] if self.shared else filled.astype(np.int64)
        order = contexts.argsort()
        return contexts[order], self.counts[filled[order]]

    def fill(self, contexts: Integers, counts: npt.NDArray[np.uint16]) -> None:
        """Take over what `rows` has returned, of a table for the same model; the commonest of
        contexts that share a row.

        The table is empty before.
        """
        order = counts[:, -1].argsort(kind="stable")
        contexts, counts = contexts[order], counts[order]
        rows = contexts
        if self.shared:
            n_first = self.n_contexts[0]
            second = (contexts - n_first) % self.n_rows[1] + self.n_rows[0]
            rows = np.where(contexts < n_first, contexts % self.n_rows[0], second)
            self.owners[rows] = contexts
            self.credits[rows] = np.minimum(counts[:, -1], _CREDIT)
        self.counts[rows] = counts
        self._forget()

    def _forget(self) -> None:
        """Halve the rows that are full."""
        full = (self.counts[:, -1] >= WINDOW).nonzero()[0]
        self.counts[full] >>= 1

    def _contend(self, rows: Integers, contexts: Integers) -> None:
        """Let contexts claim rows that are others'; of several that claim the same, the last gets it."""
        self.credits[rows] -= 1
        spent = self.credits[rows] < 0
        rows, contexts = rows[spent], contexts[spent]
        self.credits[rows] = 0
        self.owners[rows] = contexts


def _rows_within(n_contexts: int, n_experts: int, max_bytes: int) -> int:
    """Return how many rows a region has: one for each context, or as many as fit, an odd number.

    Contexts share a row modulo that number, and an odd one spreads those that differ by powers of two.
    """
    n_rows = max(1, max_bytes // (2 * (n_experts + 1) + 10))
    return n_contexts if n_rows >= n_contexts else (n_rows - 1) | 1
