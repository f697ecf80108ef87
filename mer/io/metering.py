"""What a reader counts: operations, bytes, time with work to do, and how long operations take."""

from __future__ import annotations

import math
from typing import Final

import attrs

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
class ReaderStatistics:
    """A snapshot of a reader; `started == landed + failed + in_flight`.

    The latencies run from an operation's start to its `on_landed`, waiting in the queue included; None before the
    first.
    """

    started: int  # operations
    landed: int  # operations whose bytes arrived
    failed: int  # operations that ended with an error
    in_flight: int  # operations started and not yet ended: the queue's depth, those being read included
    bytes_read: int  # sum of the lengths of landed operations, alignment padding included
    busy_s: float  # time during which at least one operation was in flight
    latency_p50_s: float | None
    latency_p95_s: float | None
    latency_p99_s: float | None


class ReadMeter:
    """Counts a reader's operations; to be used from the trio thread alone."""

    def __init__(self) -> None:
        self._started = 0
        self._landed = 0
        self._failed = 0
        self._bytes_read = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._latency = LatencyHistogram()

    def start(self, now_s: float) -> None:
        """Count an operation that starts now."""
        if not self._in_flight():
            self._busy_since_s = now_s
        self._started += 1

    def end(self, n_bytes: int, started_s: float, now_s: float, *, failed: bool) -> None:
        """Count an operation that ends now: its length in bytes, when it started, and whether it failed."""
        if failed:
            self._failed += 1
        else:
            self._landed += 1
            self._bytes_read += n_bytes
        self._latency.add(now_s - started_s)
        if not self._in_flight():
            self._busy_s += now_s - self._busy_since_s

    def statistics(self, now_s: float) -> ReaderStatistics:
        """Return a snapshot."""
        in_flight = self._in_flight()
        return ReaderStatistics(
            started=self._started,
            landed=self._landed,
            failed=self._failed,
            in_flight=in_flight,
            bytes_read=self._bytes_read,
            busy_s=self._busy_s + (now_s - self._busy_since_s if in_flight else 0.0),
            latency_p50_s=self._latency.quantile(0.50),
            latency_p95_s=self._latency.quantile(0.95),
            latency_p99_s=self._latency.quantile(0.99),
        )

    def _in_flight(self) -> int:
        return self._started - self._landed - self._failed
