"""Reads within a job, as the scheduler sees them: a loan before the job, an account after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mer.compute.messages import LoadedExpert
from mer.io.fetch import FetchListener
from mer.io.loan.desk import LoanDesk
from mer.io.loan.loan import JobRead, Loan
from mer.sched.cache import Resident
from mer.sched.residents import Residents
from mer.sched.traffic import Traffic
from mer.sched.waiting import Waiting


class Loans:
    """Lends jobs the reader and the slots of residents, and takes the experts that they have read into the cache.

    After a job come `take_back`, and then either `passed` for each layer that it has passed, in order, and `ended`, or
    `failed`.

    Synchronous; to be used from the trio thread alone.

    Args:
        residents: what is in memory.
        desk: where there is something to be lent; None if there is nothing.
        traffic: what is on its way.
        waiting: of the scheduler.
        listener: called for the fetches that take over reads which a job has left in flight.
    """

    def __init__(
        self,
        residents: Residents,
        desk: LoanDesk | None,
        traffic: Traffic,
        waiting: Waiting,
        listener: FetchListener,
    ) -> None:
        self._residents, self._desk, self._traffic, self._waiting = residents, desk, traffic, waiting
        self._pool, self._cache = residents.pool, residents.cache
        self._listener = listener
        self._lent: Loan | None = None  # while a job has it
        self._read: list[JobRead] = []  # by the last job, and not accounted for

    def lend(self, layer: int, pinned: Iterable[LoadedExpert]) -> Loan | None:
        """Lend the next job what it needs to read, until `take_back`; None if that cannot be.

        Meanwhile no expert is read ahead or on a guess.

        Args:
            layer: of the experts that the job begins with.
            pinned: these experts.
        """
        if self._desk is None or self._traffic.ahead:
            return None
        self._lent = self._desk.lend([(layer, loaded.expert) for loaded in pinned])
        self._traffic.lent = self._lent is not None
        return self._lent

    @property
    def lent(self) -> bool:
        """Whether a job has the loan just now."""
        return self._traffic.lent

    def stop(self) -> None:
        """Keep the job that runs from beginning more reads: it ends where it misses an expert."""
        if self._lent is not None:
            self._lent.stop()

    def take_back(self) -> None:
        """End the loan, if there is one, after the job."""
        if self._lent is not None:
            assert self._desk is not None
            self._waiting.stalled_s += self._lent.waited_s
            self._lent, self._traffic.lent = None, False
            self._read = self._desk.take_back(self._residents.replace, self._listener)

    def passed(self, layer: int, experts: Sequence[int]) -> None:
        """Count the experts of a layer that the job has passed, and keep those that it has read."""
        read = [read for read in self._read if read.layer == layer]
        self._cache.passed(layer, experts, len(read))
        for each in read:
            self._keep(each)

    def ended(self, layer: int) -> None:
        """Count and keep what the job has read for a layer that it has not passed: its last one, if there is any."""
        unused = [read for read in self._read if read.layer == layer]
        self._cache.missed((read.layer, read.expert) for read in unused)
        for read in unused:
            self._keep(read)
        self._read = []

    def failed(self) -> None:
        """Drop all that a failed job has read."""
        read, self._read = self._read, []
        self._cache.missed((each.layer, each.expert) for each in read)
        self._cache.missed(())
        for each in read:
            if each.landed:
                self._pool.release(each.slot)

    def _keep(self, read: JobRead) -> None:
        """Take an expert into the cache, if it has landed."""
        if read.landed:
            key = read.layer, read.expert
            self._cache.insert(key, Resident(read.slot, read.addresses, (True, True), None))
            if read.arranged:
                self._cache.arranged(key)
