"""Batches: whose rows are in one, and the fair division of its rows."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import attrs
import numpy as np

from mer.compute.messages import Batch, Int32Array
from mer.sched.sequence import Sequence, Status


@attrs.frozen(eq=False)
class Member:
    """A sequence's share of a batch."""

    sequence: Sequence
    rows: slice

    @property
    def n_rows(self) -> int:
        """How many rows it has, the next ones of its sequence."""
        n_rows: int = self.rows.stop - self.rows.start
        return n_rows

    @property
    def alive(self) -> bool:
        """Whether its results are still wanted."""
        return not self.sequence.cancelled and self.sequence.status is not Status.ENDED


def compose(active: Seq[Sequence], batch_tokens: int) -> tuple[list[Member], Batch | None]:
    """Build a batch of at most so many rows: a row of each sequence or more, shared fairly; None if there is none."""
    members: list[Member] = []
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    shares = share_rows(batch_tokens, [sequence.rows_left for sequence in active])
    for sequence, share in zip(active, shares, strict=True):
        if not share:
            continue
        rows, first = sequence.next_rows(share)
        owners += [len(members)] * len(rows)
        members.append(Member(sequence, slice(len(tokens), len(tokens) + len(rows))))
        tokens += rows
        positions += range(first, first + len(rows))
    if not members:
        return [], None
    width = max(len(m.sequence.blocks) for m in members)
    tables = np.zeros((len(members), width), np.int32)
    for row, member in enumerate(members):
        tables[row, : len(member.sequence.blocks)] = member.sequence.blocks
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        positions=np.array(positions, np.int32),
        sequences=np.array(owners, np.int32),
        tables=tables,
        outputs=np.array([m.rows.stop - 1 for m in members], np.int32),
    )
    return members, batch


def union_of(ids: Int32Array, members: list[Member]) -> list[int]:
    """Return the numbers of the experts that the living members' rows of ids [T, K] name, ascending, each once."""
    if len(ids) == 1:
        return sorted(ids[0].tolist())
    return sorted({expert for m in members if m.alive for expert in ids[m.rows].ravel().tolist()})


def share_rows(budget: int, needs: Seq[int]) -> list[int]:
    """Divide a batch's rows: none gets more than it needs, and one that gets less gets no less than any other.

    If there are fewer rows than sequences, the smallest needs come first, those that decode among them.
    """
    shares = [0] * len(needs)
    left = budget
    by_need = sorted(range(len(needs)), key=needs.__getitem__)
    for position, i in enumerate(by_need):
        fair = max(1, left // (len(needs) - position))
        shares[i] = min(needs[i], fair, left)
        left -= shares[i]
    return shares
