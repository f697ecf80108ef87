"""What becomes of prefetches, expert by expert."""

from __future__ import annotations

import enum
from collections import Counter

import attrs

from mer.sched.keys import ExpertKey


@attrs.frozen(kw_only=True)
class PrefetchScore:
    """A snapshot of what has become of the prefetches of one predictor.

    `issued == used + promoted + evicted_unused + cancelled + failed + in_flight + resident_unused`.
    """

    issued: int
    used: int  # in memory when the layer asked for the expert
    promoted: int  # under way when the layer asked for it: late but useful
    evicted_unused: int
    cancelled: int  # given up while under way
    failed: int  # the read failed
    in_flight: int
    resident_unused: int  # landed, not asked for so far
    missed: int  # experts that the layers asked for, that were not in memory, and that no prefetch was under way for

    @property
    def precision(self) -> float:
        """Share of the prefetches with a known end that were useful; 0 without any."""
        ended = self.issued - self.in_flight - self.resident_unused
        return (self.used + self.promoted) / ended if ended else 0.0

    @property
    def recall(self) -> float:
        """Share of the reads that demand would have needed that were prefetched; 0 without any."""
        useful = self.used + self.promoted
        return useful / (useful + self.missed) if useful + self.missed else 0.0


class _End(enum.Enum):
    USED = "used"
    PROMOTED = "promoted"
    EVICTED = "evicted_unused"
    CANCELLED = "cancelled"
    FAILED = "failed"


class PrefetchAccounts:
    """Follows every prefetch from its start to its end; each is in exactly one state, so that none is lost.

    Keys that were not prefetched are passed over by `used`, `evicted`, `landed` and `failed`, so that an owner can
    report every expert. A transition that cannot be is a RuntimeError and changes nothing.
    """

    def __init__(self) -> None:
        self._landed: dict[ExpertKey, bool] = {}  # {prefetch without an end: whether it has landed}
        self._ends: Counter[_End] = Counter()
        self._issued = self._missed = 0

    def __contains__(self, key: ExpertKey) -> bool:
        """Return whether a prefetch of an expert is under way or resident and unused."""
        return key in self._landed

    def issue(self, key: ExpertKey) -> None:
        """Note that the reads of a prefetch have started."""
        if key in self._landed:
            raise RuntimeError(f"expert {key} is being prefetched, or has been and is unused")
        self._landed[key] = False
        self._issued += 1

    def landed(self, key: ExpertKey) -> None:
        """Note that an expert is in memory."""
        if self._landed.get(key):
            raise RuntimeError(f"the prefetch of expert {key} has landed already")
        if key in self._landed:
            self._landed[key] = True

    def demand(self, key: ExpertKey, *, resident: bool) -> None:
        """Note that a layer asks for an expert, which is in memory or not."""
        landed = self._landed.get(key)
        if landed is not None and landed is not resident:
            raise RuntimeError(f"the prefetch of expert {key} has {'landed' if landed else 'not landed'}")
        if landed is None:
            self._missed += not resident
        else:
            self._end(key, _End.USED if landed else _End.PROMOTED)

    def evicted(self, key: ExpertKey) -> None:
        """Note that an expert leaves memory."""
        if key in self._landed:
            if not self._landed[key]:
                raise RuntimeError(f"the prefetch of expert {key} cannot be evicted before it has landed")
            self._end(key, _End.EVICTED)

    def cancelled(self, key: ExpertKey) -> None:
        """Note that a prefetch under way is given up."""
        if self._landed.get(key, True):
            raise RuntimeError(f"no prefetch of expert {key} is under way")
        self._end(key, _End.CANCELLED)

    def failed(self, key: ExpertKey) -> None:
        """Note that the reads of an expert have failed."""
        if self._landed.get(key):
            raise RuntimeError(f"the prefetch of expert {key} has landed; it cannot fail")
        if key in self._landed:
            self._end(key, _End.FAILED)

    def _end(self, key: ExpertKey, end: _End) -> None:
        del self._landed[key]
        self._ends[end] += 1

    def score(self) -> PrefetchScore:
        """Return a snapshot."""
        resident = sum(self._landed.values())
        return PrefetchScore(
            issued=self._issued,
            in_flight=len(self._landed) - resident,
            resident_unused=resident,
            missed=self._missed,
            **{end.value: self._ends[end] for end in _End},
        )
