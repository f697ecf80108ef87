"""Experts on their way into slots: claims, reads ahead, guesses, and the loan of a job."""

from __future__ import annotations

import attrs

from mer.errors import MerError
from mer.io.extents import ExpertKey
from mer.io.fetch import Fetch
from mer.io.pool import Ticket


@attrs.define(eq=False)
class Claim:
    """A missing expert that the running layer needs.

    Attributes:
        key: (layer, expert).
        ticket: its place in line for a slot, unless it was on its way already.
        fetch: of the expert, once there is a slot.
        landed: it is resident now, and pinned.
        error: why it cannot be had.
        inner_done: its gate and up matrices have done their work in the running batch.
        staged: they may do so before its down matrix has landed.
    """

    key: ExpertKey
    ticket: Ticket | None = None
    fetch: Fetch | None = None
    landed: bool = False
    error: MerError | None = None
    inner_done: bool = False
    staged: bool = False


@attrs.define(eq=False)
class Traffic:
    """The record that claims, speculation, loans and waiting share, so that none of them needs to know the others.

    Attributes:
        claims: experts that the running layer waits for.
        loading: number of claims that have neither landed nor failed: with 0, no layer waits for the disk.
        ahead: tickets of experts that wait for a slot to be read ahead.
        guesses: fetches in flight, started before a layer asked for the expert.
        lent: whether a job has the loan just now, and may read missing experts itself.
    """

    claims: dict[ExpertKey, Claim] = attrs.field(factory=dict, init=False)
    loading: int = attrs.field(default=0, init=False)
    ahead: dict[ExpertKey, Ticket] = attrs.field(factory=dict, init=False)
    guesses: set[Fetch] = attrs.field(factory=set, init=False)
    lent: bool = attrs.field(default=False, init=False)

    @property
    def reads_for_claims(self) -> bool:
        """Whether anything that is claimed is being read; the rest waits for slots, which the layer may hold."""
        claims = self.claims.values()
        return any(claim.fetch is not None and not claim.landed and claim.error is None for claim in claims)
