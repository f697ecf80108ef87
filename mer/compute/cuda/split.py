"""The number of experts that the processor computes beside the device, so that it ends when the copies do."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

_STALE_JOBS = 256
_WEIGHT = 0.2  # of a new measurement in the running average
_ROWS_PER_READ = 4  # rows for which an expert takes the processor no longer than reading its weights does


def work_bytes(n_bytes: int, rows: int) -> float:
    """Return what an expert costs the processor, in bytes of weights read: more rows are more arithmetic."""
    return n_bytes * max(1.0, rows / _ROWS_PER_READ)


@attrs.define
class Split:
    """Divides experts between copying them to the device and computing them where they are.

    Both take time in proportion to bytes; the rates are running averages of what jobs have taken. Until both have been
    measured, the experts of a job are divided in halves, and a lone one goes to the side that lacks a measurement.
    A side that had nothing to do for 256 jobs is measured again: it may only have been slow once.
    """

    host_s_per_byte: float = 0.0  # 0: not measured
    copy_s_per_byte: float = 0.0
    _idle: list[int] = attrs.field(factory=lambda: [0, 0])  # jobs since the processor, and the copies, were measured

    def choose(self, host: Sequence[float], copies: Sequence[float], already: float = 0.0) -> int:
        """Return how many of the experts, the last ones, the processor computes.

        Args:
            host: what each costs the processor, see `work_bytes`.
            copies: the bytes of each.
            already: bytes that are copied in any case.
        """
        n = len(host)
        if not self.host_s_per_byte or not self.copy_s_per_byte:
            return (n + 1) // 2 if not self.host_s_per_byte else n // 2

        def slower_s(k: int) -> float:
            host_s = self.host_s_per_byte * sum(host[n - k :])
            return max(host_s, self.copy_s_per_byte * (already + sum(copies[: n - k])))

        return min(range(n + 1), key=slower_s)

    def measured(self, *, host: tuple[float, float] | None, copy: tuple[float, float] | None) -> None:
        """Take in what a job has taken: (bytes, seconds) of each side, or None if it had nothing to do."""
        for side, (name, taken) in enumerate((("host_s_per_byte", host), ("copy_s_per_byte", copy))):
            self._idle[side] += 1
            if taken is not None:
                self._idle[side] = 0
                setattr(self, name, _average(getattr(self, name), *taken))
            elif self._idle[side] >= _STALE_JOBS:
                setattr(self, name, 0.0)


def _average(before: float, n_bytes: float, seconds: float) -> float:
    new = max(seconds, 1e-9) / n_bytes
    return new if not before else before + _WEIGHT * (new - before)
