"""The scheduler's wait for experts that are being read."""

from __future__ import annotations

from collections.abc import Callable

import trio

from mer.errors import ReadError
from mer.io.fetch import Fetch
from mer.sched.traffic import Traffic


class Waiting:
    """Wakes the scheduler when enough experts have landed, or none is left to wait for.

    Attributes:
        stalled_s: time spent waiting so far: the worker had nothing to do.
        last_error: of the fetch that failed last.

    Args:
        traffic: what is on its way.
        expert_bytes: returns the bytes of an expert's matrices.
        on_fetched: called for every fetch that has landed or failed, before any listener; it may not raise.
    """

    def __init__(
        self,
        traffic: Traffic,
        expert_bytes: Callable[[int, int], int],
        on_fetched: Callable[[Fetch], None] | None = None,
    ) -> None:
        self.stalled_s = 0.0
        self.last_error: ReadError | None = None
        self._traffic = traffic
        self._expert_bytes = expert_bytes
        self._on_fetched = on_fetched
        self._changed = trio.Event()
        self._awaited_bytes = 0  # experts whose landing is worth a wake-up while others load
        self._landed_bytes = 0  # since the wait began

    def wake(self) -> None:
        """End `wait_for_change`, so that its caller looks again."""
        self._changed.set()
        self._changed = trio.Event()

    async def wait_for_change(self, n_bytes: int = 0) -> None:
        """Wait until there is something to do, or for the next `wake`; changes nothing if cancelled.

        That is when experts of so many bytes have landed, all that are being read have, one has failed, or gate and up
        of one that is `staged` have landed.
        """
        self._awaited_bytes, self._landed_bytes = n_bytes, 0
        began_s = trio.current_time()
        try:
            await self._changed.wait()
        finally:
            self.stalled_s += trio.current_time() - began_s

    def ended(self, fetch: Fetch) -> None:
        """Note that a fetch has landed or failed; to be called before it is accounted for."""
        if fetch.error is not None:
            self.last_error = fetch.error
        if self._on_fetched is not None:
            self._on_fetched(fetch)

    def wake_for(self, fetch: Fetch) -> None:
        """Wake the scheduler if a fetch that has ended is worth it; to be called after it is accounted for."""
        self._landed_bytes += self._expert_bytes(*fetch.key)
        enough = self._landed_bytes >= self._awaited_bytes
        if fetch.error is not None or enough or not self._traffic.reads_for_claims:
            self.wake()
