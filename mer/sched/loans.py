"""Reads within a job, as the scheduler sees them: a loan before the job, a log after it."""

from __future__ import annotations

from collections.abc import Iterable

from mer.compute.messages import LoadedExpert
from mer.io.fetch import FetchListener
from mer.io.fetcher import Fetcher
from mer.io.job_reads import JobRead, JobReads
from mer.sched.cache import Resident
from mer.sched.residents import Residents
from mer.sched.traffic import Traffic
from mer.sched.waiting import Waiting


class Loans:
    """Lends jobs the ring and the slots of residents, and takes the experts that they have read into the cache.

    Synchronous; to be used from the trio thread alone.

    Args:
        residents: what is in memory.
        fetcher: reads, and lends.
        traffic: what is on its way.
        waiting: of the scheduler.
        listener: called for the fetches that take over reads which a job has left in flight.
    """

    def __init__(
        self, residents: Residents, fetcher: Fetcher, traffic: Traffic, waiting: Waiting, listener: FetchListener
    ) -> None:
        self._residents, self._fetcher, self._traffic, self._waiting = residents, fetcher, traffic, waiting
        self._pool, self._cache = residents.pool, residents.cache
        self._listener = listener
        self._lent: JobReads | None = None  # while a job has it

    def lend(self, layer: int, pinned: Iterable[LoadedExpert]) -> JobReads | None:
        """Lend the next job what it needs to read, until `take_back`; None if that cannot be.

        Meanwhile no expert is read ahead or on a guess.

        Args:
            layer: of the experts that the job begins with.
            pinned: these experts.
        """
        if self._traffic.ahead:
            return None
        self._lent = self._fetcher.lend([(layer, loaded.expert) for loaded in pinned])
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

    def take_back(self) -> list[JobRead]:
        """End the loan, if there is one, after the job; return the experts it has read, each for `keep` or `drop`."""
        if self._lent is None:
            return []
        self._waiting.stalled_s += self._lent.waited_s
        self._lent, self._traffic.lent = None, False
        return self._fetcher.take_back(self._residents.replace, self._listener)

    def drop(self, reads: Iterable[JobRead]) -> None:
        """Drop the experts that a failed job has read."""
        reads = list(reads)
        self._cache.missed((read.layer, read.expert) for read in reads)
        self._cache.missed(())
        for read in reads:
            if read.landed:
                self._pool.release(read.slot)

    def keep(self, read: JobRead) -> None:
        """Take an expert that a job has read into the cache, if it has landed."""
        if read.landed:
            key = read.layer, read.expert
            self._cache.insert(key, Resident(read.slot, read.addresses, (True, True), None))
            if read.arranged:
                self._cache.arranged(key)
