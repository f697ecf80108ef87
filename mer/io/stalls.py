"""Reads that give no answer: when to look for them, and for how long the disk is not to blame."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

from mer.io.fetch import Fetch
from mer.io.reader import Reader, ReadOperation

_ROUNDING_S: Final = 1e-6  # sums of times are not exact: without it a look may come too early, and again at once
_LOOK_EVERY_S: Final = 1.0
_LATE_S: Final = 1.0  # a look that comes so late: the process was stopped, or the event loop held up


class StallWatch:
    """Finds the reads that the reader has been at one chunk of for a deadline or longer.

    Waiting behind other reads does not count, nor does time in which the whole process was stopped. Synchronous; it
    keeps no timer: `look` is to be called at `next_look_s`.

    Attributes:
        next_look_s: when to call `look`; infinite while no read needs it.

    Args:
        reader: reads, and writes off what is stuck.
        deadline_s: see above.
    """

    def __init__(self, reader: Reader, deadline_s: float) -> None:
        self.next_look_s = inf
        self._reader = reader
        self._deadline_s = deadline_s
        self._reads: dict[ReadOperation, Fetch] = {}  # started and not ended
        self._written_off: set[ReadOperation] = set()  # of them
        self._excused_s: dict[ReadOperation, float] = {}  # of them: time in which the process did not run

    @property
    def n_reads(self) -> int:
        """Number of reads that have begun and not ended, those that are stuck included."""
        return len(self._reads)

    def begin(self, read: ReadOperation, fetch: Fetch) -> None:
        """Watch a read that the reader has."""
        self._reads[read] = fetch

    def end(self, read: ReadOperation) -> None:
        """Watch a read no more, as it has landed, failed or been cancelled."""
        del self._reads[read]
        self._written_off.discard(read)
        self._excused_s.pop(read, None)

    def wind(self, now_s: float) -> bool:
        """Set the time of the next look if there is none, and return whether that was so."""
        if self.next_look_s < inf:
            return False
        self.next_look_s = now_s + min(self._deadline_s, _LOOK_EVERY_S)
        return True

    def look(self, now_s: float, on_stuck: Callable[[Fetch, ReadOperation, float], None]) -> None:
        """Write off the reads that are stuck, and set the time of the next look so that none is missed.

        A look that comes late says that the process did not run, which is no fault of the disk. One look at the end
        would not do: the process may have been stopped until shortly before it.

        Args:
            now_s: the time.
            on_stuck: told of each such read, its fetch and for how many seconds it stalls; it may end other reads.
        """
        late_s = now_s - self.next_look_s
        if late_s > _LATE_S:
            for read in self._reads:
                self._excused_s[read] = self._excused_s.get(read, 0.0) + late_s
        oldest_s = 0.0
        for read, fetch in list(self._reads.items()):
            if read in self._written_off or read not in self._reads:
                continue
            stalled_s = self._reader.stalled_s(read) - self._excused_s.get(read, 0.0)
            if stalled_s < self._deadline_s - _ROUNDING_S:
                oldest_s = max(oldest_s, stalled_s)
                continue
            self._written_off.add(read)
            self._reader.write_off(read)
            on_stuck(fetch, read, stalled_s)
        waiting = len(self._reads) > len(self._written_off)
        self.next_look_s = now_s + min(self._deadline_s - oldest_s, _LOOK_EVERY_S) if waiting else inf
