"""State of one copy of the model in a reader: its rate, its circuit breaker, and its threads."""

from __future__ import annotations

from typing import Final

from mer.io.breaker import CircuitBreaker
from mer.io.files import IoMode
from mer.io.metering import CopyStatistics

FAILURES_TO_LEAVE_OUT: Final = 3
COOL_DOWN_S: Final = 2.0
RATE_VALID_S: Final = 10.0  # a copy not read for so long is measured anew
_RATE_WEIGHT: Final = 0.25  # of the newest read in the running mean


class Copy:
    """The reader's book-keeping of one copy; pure, on a clock that is passed in.

    Attributes:
        n_threads: reads that the drive is to see at once.
        threads: alive, those written off included.
        stuck: threads that were written off and whose read has not returned.
        reads: chunks that were read or failed.
        bytes_read: in chunks.
        failures: chunks that could not be read.
        breaker: leaves the copy out after several failures in a row.

    Args:
        n_threads: at least 1.
        alone: there is no other copy, so that this one is never left out.
    """

    def __init__(self, n_threads: int, *, alone: bool) -> None:
        self.n_threads = n_threads
        self._alone = alone
        self.threads = n_threads
        self.stuck = 0
        self.reads = 0
        self.bytes_read = 0
        self.failures = 0
        self.breaker = CircuitBreaker(failures=FAILURES_TO_LEAVE_OUT, cool_down_s=COOL_DOWN_S)
        self._reading = 0
        self._busy_s = 0.0
        self._busy_since_s = 0.0
        self._s_per_byte: float | None = None  # of one thread
        self._measured_s = 0.0

    @property
    def working(self) -> int:
        """Threads that read or could."""
        return self.threads - self.stuck

    @property
    def in_force(self) -> bool:
        """Whether ordinary chunks are read from this copy."""
        return self.breaker.closed and self.working > 0

    def s_per_byte(self, now_s: float) -> float | None:
        """Return the seconds per byte that one thread lately took; None if that is not known, or too long ago."""
        return self._s_per_byte if now_s - self._measured_s <= RATE_VALID_S else None

    def bytes_per_s(self, now_s: float) -> float | None:
        """Return the rate over all the time in which at least one read was in flight; None before the first."""
        busy_s = self._busy_s + (now_s - self._busy_since_s if self._reading else 0.0)
        return self.bytes_read / busy_s if self.reads and busy_s > 0 else None

    def begin(self, now_s: float) -> None:
        """Note that a read begins."""
        if not self._reading:
            self._busy_since_s = now_s
        self._reading += 1

    def leave_alone(self, now_s: float) -> None:
        """Note that a read that was begun hangs, and its thread with it."""
        self._end(now_s)
        self.stuck += 1
        self.failures += 1
        if not self._alone:
            self.breaker.trip(now_s)

    def come_back(self) -> None:
        """Note that a thread that was written off is alive."""
        self.stuck -= 1

    def fail(self, now_s: float, *, probe: bool) -> None:
        """Note that a read has failed."""
        self._end(now_s)
        self.reads += 1
        self.failures += 1
        if not self._alone:
            self.breaker.failed(now_s, probe=probe)

    def succeed(self, n_bytes: int, begun_s: float, now_s: float) -> None:
        """Note that a read has ended well."""
        self._end(now_s)
        self.reads += 1
        self.bytes_read += n_bytes
        self.breaker.succeeded()
        newest = (now_s - begun_s) / n_bytes
        known = self.s_per_byte(now_s)
        self._s_per_byte = newest if known is None else known + _RATE_WEIGHT * (newest - known)
        self._measured_s = now_s

    def statistics(self, paths: tuple[str, ...], modes: tuple[IoMode, ...], now_s: float) -> CopyStatistics:
        """Return a snapshot, completed with the files and how they are read."""
        return CopyStatistics(
            paths=paths,
            modes=modes,
            bytes_read=self.bytes_read,
            reads=self.reads,
            failures=self.failures,
            bytes_per_s=self.bytes_per_s(now_s),
            in_force=self.in_force,
            next_try_s=self.breaker.next_try_s(now_s),
            threads=self.threads,
            threads_written_off=self.stuck,
        )

    def _end(self, now_s: float) -> None:
        self._reading -= 1
        if not self._reading:
            self._busy_s += now_s - self._busy_since_s
