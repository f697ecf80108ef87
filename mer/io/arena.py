"""One anonymous, page-aligned mapping that is cut into equal slots, and numpy views of them."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer.errors import ConfigError, NotEnoughMemory
from mer.units import format_bytes

PAGE_BYTES: Final = 4096

_THP_SWITCH: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Arena:
    """The memory of every slot: `n_slots` x `slot_bytes` of private anonymous memory that reads land in.

    Pages count against memory only once they are written. Slots are recycled and never unmapped one by one. The
    mapping is kept out of forked children: a fork during a direct read would let the copy-on-write give the bytes
    to the wrong process (open(2), NOTES on O_DIRECT).

    Attributes:
        n_slots: number of slots.
        slot_bytes: bytes of one slot, rounded up to whole pages.
        huge_pages: whether the kernel agreed to back the mapping with transparent huge pages.

    Args:
        n_slots: number of slots, at least 1.
        slot_bytes: bytes of one slot, at least 1.

    Raises:
        ConfigError: a size is below 1.
        NotEnoughMemory: the operating system refuses the mapping.
    """

    def __init__(self, n_slots: int, slot_bytes: int) -> None:
        if n_slots < 1 or slot_bytes < 1:
            raise ConfigError(f"an arena needs at least 1 slot of at least 1 byte, not {n_slots} of {slot_bytes}")
        self.n_slots = n_slots
        self.slot_bytes = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
        memory = map_anonymous(n_slots * self.slot_bytes)
        self.huge_pages = _ask_for_huge_pages(memory)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(memory, dtype=np.uint8)
        self._base = int(self._bytes.ctypes.data)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole mapping."""
        return self.n_slots * self.slot_bytes

    def view(self, slot: int) -> NDArray[np.uint8]:
        """Return the writable bytes of a slot, shape (slot_bytes,).

        Raises:
            IndexError: there is no such slot.
            RuntimeError: the arena is closed.
        """
        start = self._start(slot)
        return self._open_bytes()[start : start + self.slot_bytes]

    def address(self, slot: int) -> int:
        """Return the memory address of a slot's first byte, a multiple of PAGE_BYTES.

        Raises:
            IndexError: there is no such slot.
            RuntimeError: the arena is closed.
        """
        self._open_bytes()
        return self._base + self._start(slot)

    def close(self) -> None:
        """Let go of the memory; it returns to the system with the last view of it.

        A view held elsewhere, above all by a read that the kernel has not finished, keeps the whole mapping alive;
        a bare address does not. Closing twice is allowed.
        """
        self._bytes = None

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.n_slots:
            raise IndexError(f"slot {slot} is not one of the {self.n_slots} slots")
        return slot * self.slot_bytes

    def _open_bytes(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise RuntimeError("the arena is closed")
        return self._bytes


def map_anonymous(n_bytes: int) -> mmap.mmap:
    """Return private anonymous memory, page-aligned, zeroed, and kept out of forked children.

    Raises:
        NotEnoughMemory: the operating system refuses it.
    """
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise NotEnoughMemory(
            f"the system refuses a mapping of {format_bytes(n_bytes)} ({error}); lower the memory budget, or raise "
            "the limit on address space (ulimit -v) or on overcommitted memory",
            budget_bytes=n_bytes,
            needed_bytes=n_bytes,
        ) from error
    memory.madvise(mmap.MADV_DONTFORK)
    return memory


def _ask_for_huge_pages(memory: mmap.mmap) -> bool:
    """Ask for transparent huge pages and return whether the kernel can give them."""
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        return "[never]" not in _THP_SWITCH.read_text()
    except OSError:
        return False
