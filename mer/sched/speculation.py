"""What becomes of experts that are read before a layer asks for them."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class SpeculationStatistics:
    """A snapshot of one class of reads before demand.

    `issued == used + promoted + evicted_unused + cancelled + failed + in_flight + resident_unused`.
    """

    issued: int  # fetches started
    used: int  # landed before the layer asked for the expert
    promoted: int  # under way when the layer asked for it
    evicted_unused: int
    cancelled: int  # given up while under way
    failed: int
    in_flight: int
    resident_unused: int


@attrs.define
class SpeculationCounts:
    """What the store counts; named as in SpeculationStatistics."""

    issued: int = 0
    used: int = 0
    promoted: int = 0
    evicted_unused: int = 0
    cancelled: int = 0
    failed: int = 0

    def snapshot(self, *, in_flight: int, resident_unused: int) -> SpeculationStatistics:
        """Return the counts with what is there now."""
        return SpeculationStatistics(
            issued=self.issued,
            used=self.used,
            promoted=self.promoted,
            evicted_unused=self.evicted_unused,
            cancelled=self.cancelled,
            failed=self.failed,
            in_flight=in_flight,
            resident_unused=resident_unused,
        )
