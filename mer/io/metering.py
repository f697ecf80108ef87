"""Counters of a reader: operations, bytes, time with work to do, and latencies of operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs

from mer.io.files import IoMode
from mer.io.pool import Priority

_BUCKETS_PER_OCTAVE: Final = 8
_SHORTEST_S: Final = 1e-6
_N_BUCKETS: Final = 30 * _BUCKETS_PER_OCTAVE  # up to about 18 minutes


class LatencyHistogram:
    """Durations in buckets of equal ratio, 8 to a factor of two, so that a quantile is at most 9 % above the true one.

    Durations below 1 us count as 1 us; those beyond the last bucket count as its upper edge, about 18 minutes.
    """

    def __init__(self) -> None:
        self._counts = [0] * (_N_BUCKETS + 1)
        self._total = 0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        octaves = math.log2(max(seconds, _SHORTEST_S) / _SHORTEST_S)
        self._counts[min(math.ceil(octaves * _BUCKETS_PER_OCTAVE), _N_BUCKETS)] += 1
        self._total += 1

    def quantile(self, q: float) -> float | None:
        """Return the upper edge in seconds of the q-quantile's bucket, 0 < q <= 1; None before the first duration."""
        rank = max(1, math.ceil(q * self._total))
        seen = 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return float(_SHORTEST_S * 2 ** (bucket / _BUCKETS_PER_OCTAVE))
        return None


@attrs.frozen(kw_only=True)
class PriorityStatistics:
    """Reads of one priority, ended and queued."""

    landed: int  # operations whose bytes arrived
    queued_bytes: int  # of operations started, not yet begun to be read
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None


@attrs.frozen(kw_only=True)
class CopyStatistics:
    """Reads from one copy of the model: the original, or a mirror."""

    paths: tuple[str, ...]
    modes: tuple[IoMode, ...]  # per file
    bytes_read: int  # in chunks, those of operations that failed in the end included
    reads: int  # chunks read or failed
    failures: int  # chunks that could not be read
    bytes_per_s: float | None  # while at least one read was in flight; None before the first
    in_force: bool  # or left out after failures
    next_try_s: float  # seconds until a copy that is left out is tried again
    threads: int  # alive
    threads_written_off: int  # of them, those that hang in a read that was written off


@attrs.frozen(kw_only=True)
class ReaderStatistics:
    """A snapshot of a reader; `started == landed + failed + cancelled + in_flight`.

    The latencies run from an operation's start to its `on_landed`, waiting in the queue included, those by priority
    from the last promotion if there was one; None before the first.
    """

    engine: str  # what reads: "io_uring", "threads", or a simulated disk
    started: int  # operations
    landed: int  # operations whose bytes arrived
    failed: int  # operations that ended with an error
    cancelled: int  # operations that ended half-way, cancelled or written off
    written_off: int  # operations whose reads hung
    in_flight: int  # operations started and not yet ended: the queue's depth, those being read included
    bytes_read: int  # sum of the lengths of landed operations, alignment padding included
    busy_s: float  # time during which at least one operation was in flight
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None
    by_priority: tuple[PriorityStatistics, ...]  # indexed by Priority
    copies: tuple[CopyStatistics, ...]  # the original first


class ReadMeter:
    """Counts a reader's operations; to be used from the trio thread alone."""

    def __init__(self) -> None:
        self._started = 0
        self._failed = 0
        self._cancelled = 0
        self._bytes_read = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._latency = LatencyHistogram()
        self._landed = [0 for _ in Priority]
        self._latency_of = [LatencyHistogram() for _ in Priority]

    def start(self, now_s: float) -> None:
        """Count an operation that starts now."""
        if not self._in_flight():
            self._busy_since_s = now_s
        self._started += 1

    def land(self, n_bytes: int, priority: Priority, started_s: float, wanted_s: float, now_s: float) -> None:
        """Count an operation whose bytes have arrived.

        Args:
            n_bytes: its length.
            priority: what it was when it landed.
            started_s: when it was started.
            wanted_s: when it got its priority.
            now_s: now.
        """
        self._landed[priority] += 1
        self._bytes_read += n_bytes
        self._latency.add(now_s - started_s)
        self._latency_of[priority].add(now_s - wanted_s)
        self._end(now_s)

    def fail(self, started_s: float, now_s: float, *, cancelled: bool) -> None:
        """Count an operation that ends without its bytes."""
        if cancelled:
            self._cancelled += 1
        else:
            self._failed += 1
            self._latency.add(now_s - started_s)
        self._end(now_s)

    def statistics(
        self,
        now_s: float,
        *,
        engine: str,
        queued_bytes: Sequence[int],
        written_off: int,
        copies: tuple[CopyStatistics, ...],
    ) -> ReaderStatistics:
        """Return a snapshot, completed with what the queue knows: see the fields of the statistics."""
        in_flight = self._in_flight()
        return ReaderStatistics(
            engine=engine,
            started=self._started,
            landed=sum(self._landed),
            failed=self._failed,
            cancelled=self._cancelled,
            written_off=written_off,
            in_flight=in_flight,
            bytes_read=self._bytes_read,
            busy_s=self._busy_s + (now_s - self._busy_since_s if in_flight else 0.0),
            latency_p50_s=self._latency.quantile(0.50),
            latency_p95_s=self._latency.quantile(0.95),
            latency_p99_s=self._latency.quantile(0.99),
            by_priority=tuple(
                PriorityStatistics(
                    landed=self._landed[priority],
                    queued_bytes=queued_bytes[priority],
                    latency_p50_s=self._latency_of[priority].quantile(0.50),
                    latency_p95_s=self._latency_of[priority].quantile(0.95),
                    latency_p99_s=self._latency_of[priority].quantile(0.99),
                )
                for priority in Priority
            ),
            copies=copies,
        )

    def _end(self, now_s: float) -> None:
        if not self._in_flight():
            self._busy_s += now_s - self._busy_since_s

    def _in_flight(self) -> int:
        return self._started - sum(self._landed) - self._failed - self._cancelled
