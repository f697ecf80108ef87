"""Circuit breaker: a file or drive that fails again and again is not used for a while. Pure, on the caller's clock."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class BreakerStatistics:
    """A snapshot of a CircuitBreaker."""

    closed: bool  # in use; else suspended, or tried by one probe
    failures_in_a_row: int
    openings: int
    next_try_s: float  # seconds until a probe is allowed; 0 if it is closed, or if one is allowed or in flight


class CircuitBreaker:
    """Lets uses through until several in a row have failed, then none for a cool-down, then one probe at a time.

    A probe that succeeds closes it; one that fails starts a cool-down twice as long as the last, up to a limit. Any
    success closes it, also one of a use that began before it opened.

    Args:
        failures: in a row that open it, at least 1.
        cool_down_s: the first cool-down.
        longest_s: the longest one.
    """

    def __init__(self, *, failures: int = 5, cool_down_s: float = 1.0, longest_s: float = 60.0) -> None:
        self._threshold = failures
        self._first_s = cool_down_s
        self._longest_s = longest_s
        self._cool_down_s = cool_down_s
        self._in_a_row = 0
        self._opened_until_s: float | None = None  # None: closed
        self._probing = False
        self.openings = 0

    @property
    def closed(self) -> bool:
        """Whether everything is let through."""
        return self._opened_until_s is None

    @property
    def failures_in_a_row(self) -> int:
        """Failures since the last success."""
        return self._in_a_row

    def next_try_s(self, now_s: float) -> float:
        """Return in how many seconds a use may be let through; 0 if one may now, or may as soon as the probe ends."""
        return 0.0 if self._opened_until_s is None else max(0.0, self._opened_until_s - now_s)

    def allows(self, now_s: float) -> bool:
        """Return whether a use would be let through now; changes nothing."""
        return self._opened_until_s is None or (now_s >= self._opened_until_s and not self._probing)

    def begin(self) -> bool:
        """Note that a use begins that `allows` has let through, and return whether it is the probe."""
        if self._opened_until_s is None or self._probing:
            return False
        self._probing = True
        return True

    def drop_probe(self) -> None:
        """Note that the probe has ended with neither success nor failure; the next use is a probe again."""
        self._probing = False

    def succeeded(self) -> None:
        """Note that a use has succeeded."""
        self._in_a_row = 0
        self._opened_until_s = None
        self._probing = False
        self._cool_down_s = self._first_s

    def failed(self, now_s: float, *, probe: bool = False) -> None:
        """Note that a use has failed; a failure of one that began before it opened does not prolong the cool-down."""
        self._in_a_row += 1
        if probe:
            self._probing = False
        elif self._opened_until_s is not None or self._in_a_row < self._threshold:
            return
        self.trip(now_s)

    def trip(self, now_s: float) -> None:
        """Open it now, whatever was counted; a cool-down that has not ended goes on."""
        self._probing = False
        if self._opened_until_s is not None and now_s < self._opened_until_s:
            return
        self._opened_until_s = now_s + self._cool_down_s
        self._cool_down_s = min(2 * self._cool_down_s, self._longest_s)
        self.openings += 1

    def statistics(self, now_s: float) -> BreakerStatistics:
        """Return a snapshot."""
        return BreakerStatistics(
            closed=self.closed,
            failures_in_a_row=self._in_a_row,
            openings=self.openings,
            next_try_s=self.next_try_s(now_s),
        )
