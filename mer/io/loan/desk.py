"""Lending: what a job gets before it runs, and what is left of its reads afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from mer.io.extents import ExpertKey
from mer.io.fetch import Fetch, FetchListener
from mer.io.fetcher import Fetcher
from mer.io.loan.loan import JobRead, Loan
from mer.io.pool import BufferPool

_LOANS_TO_SKIP: Final = 64  # after reads that a job has not waited for: the disk is slow, and the way to it no matter


class LoanDesk:
    """Lends jobs the reader and residents' slots, and hands the fetcher the reads that they leave in flight.

    Synchronous; to be used from the trio thread alone.

    Args:
        loan: what is lent.
        fetcher: reads for everybody else.
        pool: the accounting of the slots.
    """

    def __init__(self, loan: Loan, fetcher: Fetcher, pool: BufferPool) -> None:
        self._loan, self._fetcher, self._pool = loan, fetcher, pool
        self._to_skip = 0

    def lend(self, kept: Sequence[ExpertKey]) -> Loan | None:
        """Lend a job what it needs to read into slots of residents, until `take_back`.

        Args:
            kept: residents whose slots it must not take.

        Returns:
            What the job needs; None if the reader or a file does not allow it just now.
        """
        if not self._fetcher.quiet:
            return None
        if self._to_skip:
            self._to_skip -= 1
            return None
        free = [self._pool.has_free(kind) for kind in range(self._pool.n_kinds)]
        return self._loan if self._loan.lend(free, kept) else None

    def take_back(self, on_evicted: Callable[[ExpertKey], None], listener: FetchListener) -> list[JobRead]:
        """End the loan after the job; return the experts that it has begun to read, in order.

        Slots of experts that have landed are READY. The others are fetches in flight now, as if the fetcher had started
        them.

        Args:
            on_evicted: called for every resident whose slot the job has taken; the slot must be FILLING afterwards.
            listener: told of these fetches.
        """
        begun = self._loan.take_back()
        for read in begun:
            on_evicted(read.victim)
        landed = (read for read in begun if read.landed)
        for begun_s, together in itertools.groupby(landed, lambda read: read.begun_s):
            self._account(begun_s, list(together))
        open_reads = [read for read in begun if not read.landed]
        if any(read.late for read in open_reads):
            self._to_skip = _LOANS_TO_SKIP
        # what the kernel has is adopted before anything else is started: it takes its share of the ring's room first
        fetches = [self._adopt(read, listener) for read in open_reads]
        for fetch in fetches:
            self._fetcher.start_rest(fetch)
        return begun

    def _adopt(self, read: JobRead, listener: FetchListener) -> Fetch:
        """Let the fetcher go on with an expert that a job has not waited for."""
        lender = self._loan.lender
        given = {
            part: partial(lender.adopt, token=token, result=read.results[part], begun_s=read.begun_s)
            for part, token in enumerate(read.tokens)
            if token is not None
        }
        return self._fetcher.adopt(read.layer, read.expert, read.slot, listener, given)

    def _account(self, begun_s: float, landed: Sequence[JobRead]) -> None:
        """Count what a job has read together."""
        lengths: list[int] = []
        ended_s: list[float] = []
        for read in sorted(landed, key=lambda read: read.ended_s):
            ended_s += [read.ended_s] * len(read.lengths)
            lengths += read.lengths
            self._fetcher.landed_elsewhere(read.layer, read.expert, read.slot, read.lengths)
        self._loan.lender.account(lengths, begun_s, ended_s)
