"""Accounting of the slots that reads land in: who holds which slot, and who is next in line for one."""

from __future__ import annotations

import enum
from collections import deque

import attrs
import trio

from mer.errors import ConfigError


class SlotState(enum.Enum):
    """What a slot is doing; every slot is in exactly one of these states."""

    FREE = "free"
    FILLING = "filling"  # leased: reads into it are about to start or under way
    READY = "ready"  # holds its bytes, used by nobody right now
    PINNED = "pinned"  # holds its bytes, used by at least one job
    QUARANTINED = "quarantined"  # nobody wants the bytes, but the kernel may still write into it


@attrs.frozen(kw_only=True)
class PoolStatistics:
    """A snapshot of a BufferPool; `free + filling + ready + pinned + quarantined == n_slots`."""

    n_slots: int
    free: int
    filling: int
    ready: int
    pinned: int
    quarantined: int
    tasks_waiting: int  # leases that wait for slots
    slots_wanted: int  # by them together


@attrs.define(eq=False)
class _Request:
    """A lease that waits in line."""

    n: int
    slots: list[int] = attrs.Factory(list)  # all n of them once granted, empty before
    granted: trio.Event = attrs.Factory(trio.Event)


class BufferPool:
    """Leases slots to whoever reads into them, first come, first served.

    A lease is granted whole or not at all, so nobody waits for a slot while holding part of the same request.
    Whoever gives a slot back hands it to the request at the head of the line as soon as that fits whole; a request
    that comes later never overtakes it, even if it is smaller. The pool knows numbers of slots only; the memory is
    the Arena's.

    Every transition is synchronous, and one that does not fit the slot's state raises RuntimeError and changes
    nothing. To be used from the trio thread alone.

    Args:
        n_slots: number of slots, at least 1.

    Raises:
        ConfigError: there is no slot.
    """

    def __init__(self, n_slots: int) -> None:
        if n_slots < 1:
            raise ConfigError(f"a buffer pool needs at least 1 slot, not {n_slots}")
        self.n_slots = n_slots
        self._states = [SlotState.FREE] * n_slots
        self._pins = [0] * n_slots
        self._free = list(reversed(range(n_slots)))  # a stack: the slot freed last is the warmest
        self._counts = dict.fromkeys(SlotState, 0) | {SlotState.FREE: n_slots}
        self._line: deque[_Request] = deque()

    def state(self, slot: int) -> SlotState:
        """Return what a slot is doing.

        Raises:
            RuntimeError: there is no such slot.
        """
        if not 0 <= slot < self.n_slots:
            raise RuntimeError(f"slot {slot} is not one of the pool's {self.n_slots} slots")
        return self._states[slot]

    def lease_nowait(self, n: int) -> list[int]:
        """Take `n` free slots, which become FILLING.

        Raises:
            ConfigError: `n` is not between 1 and the number of slots.
            trio.WouldBlock: too few slots are free, or others wait in line for them.
        """
        self._check_request(n)
        if self._line or n > len(self._free):
            raise trio.WouldBlock
        return self._take(n)

    async def lease(self, n: int) -> list[int]:
        """Take `n` slots, which become FILLING, waiting in line until all of them are free.

        If cancelled while waiting, the request leaves the line, nothing else changes, and whoever is next is served
        if it fits. Once it returns, the caller owns the slots and must see each of them through `landed`, `release`
        or `quarantine`.

        Raises:
            ConfigError: `n` is not between 1 and the number of slots.
        """
        self._check_request(n)
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            slots = self.lease_nowait(n)
        except trio.WouldBlock:
            request = _Request(n)
            self._line.append(request)
            try:
                await request.granted.wait()
            except BaseException:
                if request.slots:  # granted between the cancellation and this task's turn to run
                    for slot in request.slots:
                        self.release(slot)
                else:
                    self._line.remove(request)
                    self._serve_line()
                raise
            return request.slots
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return slots

    def landed(self, slot: int) -> None:
        """Note that all of a slot's bytes have arrived: FILLING becomes READY."""
        self._move(slot, SlotState.READY, SlotState.FILLING)

    def pin(self, slot: int) -> None:
        """Keep a slot from being released while it is used: READY becomes PINNED; pins are counted."""
        self._move(slot, SlotState.PINNED, SlotState.READY, SlotState.PINNED)
        self._pins[slot] += 1

    def unpin(self, slot: int) -> None:
        """Take back one `pin`; with the last one PINNED becomes READY."""
        self._move(slot, SlotState.PINNED, SlotState.PINNED)
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            self._move(slot, SlotState.READY, SlotState.PINNED)

    def release(self, slot: int) -> None:
        """Give back a slot that nobody uses and no read writes into: READY or FILLING becomes FREE."""
        self._move(slot, SlotState.FREE, SlotState.READY, SlotState.FILLING)
        self._free.append(slot)
        self._serve_line()

    def quarantine(self, slot: int) -> None:
        """Set aside a slot whose bytes nobody wants while reads into it are under way: FILLING becomes QUARANTINED."""
        self._move(slot, SlotState.QUARANTINED, SlotState.FILLING)

    def reclaim(self, slot: int) -> None:
        """Give back a quarantined slot after its last read landed: QUARANTINED becomes FREE."""
        self._move(slot, SlotState.FREE, SlotState.QUARANTINED)
        self._free.append(slot)
        self._serve_line()

    def statistics(self) -> PoolStatistics:
        """Return a snapshot of the pool."""
        return PoolStatistics(
            n_slots=self.n_slots,
            free=self._counts[SlotState.FREE],
            filling=self._counts[SlotState.FILLING],
            ready=self._counts[SlotState.READY],
            pinned=self._counts[SlotState.PINNED],
            quarantined=self._counts[SlotState.QUARANTINED],
            tasks_waiting=len(self._line),
            slots_wanted=sum(request.n for request in self._line),
        )

    def _check_request(self, n: int) -> None:
        if not 1 <= n <= self.n_slots:
            raise ConfigError(f"cannot lease {n} slots of a pool of {self.n_slots}; ask for 1 to {self.n_slots}")

    def _take(self, n: int) -> list[int]:
        slots = [self._free.pop() for _ in range(n)]
        for slot in slots:
            self._move(slot, SlotState.FILLING, SlotState.FREE)
        return slots

    def _serve_line(self) -> None:
        """Hand free slots to the head of the line for as long as its whole request fits."""
        while self._line and self._line[0].n <= len(self._free):
            request = self._line.popleft()
            request.slots = self._take(request.n)
            request.granted.set()

    def _move(self, slot: int, to: SlotState, *allowed: SlotState) -> None:
        current = self.state(slot)
        if current not in allowed:
            expected = " or ".join(state.name for state in allowed)
            raise RuntimeError(f"slot {slot} is {current.name}; only a slot that is {expected} can become {to.name}")
        self._states[slot] = to
        self._counts[current] -= 1
        self._counts[to] += 1
