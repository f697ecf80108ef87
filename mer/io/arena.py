"""One anonymous, page-aligned mapping that is cut into slots of a few sizes, and numpy views of them."""

from __future__ import annotations

import bisect
import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mer.errors import ConfigError, NotEnoughMemory
from mer.units import format_bytes

PAGE_BYTES: Final = 4096

_THP_SWITCH: Final = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Arena:
    """The memory of every slot: private anonymous memory that reads land in.

    Slots are numbered from 0, class after class, and lie side by side in this order, each on whole pages; huge pages
    may hold the end of one slot and the beginning of the next. Pages count against memory only once they are written.
    Slots are recycled and never unmapped one by one. The mapping is kept out of forked children: a fork during a
    direct read would let the copy-on-write give the bytes to the wrong process (open(2), NOTES on O_DIRECT).

    Attributes:
        n_slots: number of slots.
        slot_counts: number of slots of each class.
        class_bytes: bytes of one slot of each class, in whole pages.
        huge_pages: whether the kernel agreed to back the mapping with transparent huge pages.

    Args:
        slot_counts: number of slots of each class, at least 1.
        slot_bytes: bytes of one slot of each class, at least 1; rounded up to whole pages.

    Raises:
        ConfigError: a size is below 1, or there are not as many counts as sizes.
        NotEnoughMemory: the operating system refuses the mapping.
    """

    def __init__(self, slot_counts: Sequence[int], slot_bytes: Sequence[int]) -> None:
        if len(slot_counts) != len(slot_bytes) or min([*slot_counts, *slot_bytes], default=1) < 1:
            raise ConfigError(
                "an arena needs at least 1 slot of at least 1 byte in each class, "
                f"not {list(slot_counts)} slots of {list(slot_bytes)} bytes"
            )
        self.n_slots = sum(slot_counts)
        self.slot_counts = tuple(slot_counts)
        self._kinds = [kind for kind, count in enumerate(slot_counts) for _ in range(count)]
        self.class_bytes = tuple(-(-n_bytes // PAGE_BYTES) * PAGE_BYTES for n_bytes in slot_bytes)
        self._starts = [0, *itertools.accumulate(self.class_bytes[kind] for kind in self._kinds)]
        memory = map_anonymous(max(self.n_bytes, PAGE_BYTES))
        self.huge_pages = ask_for_huge_pages(memory)
        self._bytes: NDArray[np.uint8] | None = np.frombuffer(memory, dtype=np.uint8)
        self._base = int(self._bytes.ctypes.data)

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole mapping."""
        return self._starts[-1]

    def kind(self, slot: int) -> int:
        """Return the number of a slot's class.

        Raises:
            IndexError: there is no such slot.
        """
        self._start(slot)
        return self._kinds[slot]

    def slot_bytes(self, slot: int) -> int:
        """Return the bytes of a slot, a multiple of PAGE_BYTES.

        Raises:
            IndexError: there is no such slot.
        """
        return self.class_bytes[self.kind(slot)]

    def view(self, slot: int) -> NDArray[np.uint8]:
        """Return the writable bytes of a slot, shape (slot_bytes(slot),).

        Raises:
            IndexError: there is no such slot.
            RuntimeError: the arena is closed.
        """
        start = self._start(slot)
        return self._open_bytes()[start : self._starts[slot + 1]]

    def address(self, slot: int) -> int:
        """Return the memory address of a slot's first byte, a multiple of PAGE_BYTES.

        Raises:
            IndexError: there is no such slot.
            RuntimeError: the arena is closed.
        """
        self._open_bytes()
        return self._base + self._start(slot)

    def slot_at(self, address: int) -> int:
        """Return the slot that an address lies in.

        Raises:
            IndexError: it lies in none.
            RuntimeError: the arena is closed.
        """
        self._open_bytes()
        slot = bisect.bisect_right(self._starts, address - self._base) - 1
        self._start(slot)
        return slot

    def close(self) -> None:
        """Release the memory; it returns to the system with the last view of it.

        A view held elsewhere, above all by a read that the kernel has not finished, keeps the whole mapping alive;
        a bare address does not. Closing twice is allowed.
        """
        self._bytes = None

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.n_slots:
            raise IndexError(f"slot {slot} is not one of the {self.n_slots} slots")
        return self._starts[slot]

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
            "the limit on address space (ulimit -v), on data (ulimit -d) or on overcommitted memory",
            budget_bytes=n_bytes,
            needed_bytes=n_bytes,
        ) from error
    memory.madvise(mmap.MADV_DONTFORK)
    return memory


def ask_for_huge_pages(memory: mmap.mmap) -> bool:
    """Ask for transparent huge pages and return whether the kernel can give them.

    They matter to direct reads too: a large one into scattered small pages is cut into many requests, and takes longer
    (measured: 0.95 instead of 2.5 GB/s).
    """
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
        return "[never]" not in _THP_SWITCH.read_text()
    except OSError:
        return False
