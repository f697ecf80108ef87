"""The speed of a place that computes experts, measured while it does."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

_STALE = 256
_WEIGHT = 0.2  # of a new measurement in the running average


@attrs.define
class Rate:
    """Seconds per byte: a running average of what work has taken.

    It is not known before the first measurement, and not after 256 questions in a row without one: a place may only
    have been slow once, and who is never asked again cannot show it.
    """

    s_per_byte: float = 0.0  # 0: not known
    _questions: int = 0  # since the last measurement

    def seconds(self, n_bytes: Sequence[float]) -> list[float] | None:
        """Return what so many bytes are expected to take, each; None if the rate is not known."""
        if self._questions >= _STALE:
            self.s_per_byte = 0.0
        self._questions += 1
        return [self.s_per_byte * n for n in n_bytes] if self.s_per_byte else None

    def measured(self, n_bytes: float, seconds: float) -> None:
        """Take in what bytes, more than none, have taken."""
        new = max(seconds, 1e-9) / n_bytes
        self.s_per_byte = new if not self.s_per_byte else self.s_per_byte + _WEIGHT * (new - self.s_per_byte)
        self._questions = 0
