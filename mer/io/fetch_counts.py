"""Counters of a Fetcher."""

from __future__ import annotations

from operator import attrgetter

import attrs

from mer.io.breaker import BreakerStatistics


@attrs.frozen(kw_only=True)
class FetchCounts:
    """Fetches of one priority; `started + promoted_in == promoted_out + landed + failed + abandoned + in_flight`."""

    started: int
    promoted_in: int  # started with a lower priority
    promoted_out: int  # raised to a higher one
    landed: int
    failed: int
    abandoned: int
    in_flight: int


@attrs.frozen(kw_only=True)
class FetcherStatistics:
    """A snapshot of a Fetcher.

    `started == landed + failed + abandoned + in_flight`, and
    `reads_started == reads_landed + reads_failed + reads_cancelled + reads_in_flight`.
    """

    started: int  # fetches
    by_jobs: int  # of them: begun by jobs that read by themselves
    handed_over: int  # of these: that jobs have not waited for, or of which a read has failed
    landed: int
    failed: int
    abandoned: int
    in_flight: int
    promoted: int
    refused: int  # starts of fetches from files that were left alone
    by_priority: tuple[FetchCounts, ...]  # indexed by Priority
    reads_started: int  # retries included
    reads_landed: int
    reads_failed: int
    reads_cancelled: int  # ended half-way, as their fetch was over
    reads_in_flight: int  # those of failed and abandoned fetches included
    bytes_read: int  # sum of the aligned hulls of the reads that landed, those of failed and abandoned fetches too
    retried: int  # reads tried again after a transient error
    deadline_failures: int  # fetches that failed because a read gave no answer
    breaker_openings: int
    files: tuple[BreakerStatistics, ...]  # whether each file is in use or left alone


@attrs.define(kw_only=True)
class ClassCounts:
    """Counters of one priority; named as in FetchCounts."""

    started: int = 0
    promoted_in: int = 0
    promoted_out: int = 0
    landed: int = 0
    failed: int = 0
    abandoned: int = 0

    def frozen(self) -> FetchCounts:
        """Return a snapshot."""
        ended = self.promoted_out + self.landed + self.failed + self.abandoned
        return FetchCounts(
            started=self.started,
            promoted_in=self.promoted_in,
            promoted_out=self.promoted_out,
            landed=self.landed,
            failed=self.failed,
            abandoned=self.abandoned,
            in_flight=self.started + self.promoted_in - ended,
        )


@attrs.define(kw_only=True)
class ReadCounts:
    """Counters of reads; named as in FetcherStatistics."""

    reads_started: int = 0
    reads_landed: int = 0
    reads_failed: int = 0
    reads_cancelled: int = 0
    bytes_read: int = 0
    retried: int = 0
    deadline_failures: int = 0
    refused: int = 0
    by_jobs: int = 0
    handed_over: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return dict(zip(_READ_COUNTS, _read_counts(self), strict=True))


_READ_COUNTS = tuple(field.name for field in attrs.fields(ReadCounts))
_read_counts = attrgetter(*_READ_COUNTS)
