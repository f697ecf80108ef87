"""Guard pages: every area that kernels work in ends at a page that nobody may touch, so that an overrun is a SIGSEGV.

`install` does that for engines that are opened afterwards: scratch areas, dense weights, KV memory and slots. Only for
processes of their own, as they die of an overrun.
"""

from __future__ import annotations

import bisect
import ctypes
import itertools
import mmap
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.program import Memory
from mer.io.arena import PAGE_BYTES, Arena
from mer.io.extents import round_up
from tests._lib.steps import CANARY, Areas

U8 = npt.NDArray[np.uint8]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def forbid(address: int) -> None:
    """Let any touch of a page be a SIGSEGV."""
    if _libc.mprotect(address, PAGE_BYTES, 0):
        raise OSError(ctypes.get_errno(), "mprotect")


def fenced(n_bytes: int) -> U8:
    """Return zeroed bytes between two pages that nobody may touch; the second one begins where they end."""
    body = round_up(max(n_bytes, 1), PAGE_BYTES)
    memory = np.frombuffer(mmap.mmap(-1, body + 2 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    base, end = int(memory.ctypes.data), PAGE_BYTES + body
    forbid(base)
    forbid(base + end)
    return memory[end - n_bytes : end]


class FencedAreas(Areas):
    """Areas of steps that end at a fence, to the byte, whatever their alignment."""

    shortened = 0  # bytes that every area lacks which a step writes to, to seed an overrun

    def __init__(self) -> None:
        self._kept: list[U8] = []

    def room(self, n_bytes: int, shift: int = 0) -> U8:
        """See `Areas.room`."""
        area = fenced(n_bytes - self.shortened)
        area[:] = CANARY
        self._kept.append(area)
        return area

    def put(self, array: npt.NDArray[Any], shift: int = 0) -> int:
        """See `Areas.put`."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        area = fenced(len(raw))
        area[:] = raw
        self._kept.append(area)
        return int(area.ctypes.data)

    def check(self) -> None:
        """Do nothing: what touches a fence has not come so far."""


class FencedMemory(Memory):
    """A Memory in which each area, or the whole if none is cut, has pages of its own and ends at a fence."""

    shortened = 0  # bytes that a memory lacks which is not cut, as that of keys and values, to seed an overrun

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = round_up(max(n_bytes, 1), 64)
        self.bytes = np.broadcast_to(np.uint8(0), round_up(self._n_bytes, PAGE_BYTES))  # for its length
        self._used = 0
        self._areas: list[tuple[int, U8]] = []
        self._whole: int | None = None

    @property
    def address(self) -> int:  # type: ignore[override]
        """The address of the whole."""
        if self._whole is None:
            assert not self._areas, "it was cut already"
            self._whole = self._map(max(self._n_bytes - self.shortened, 64))
        return self._whole

    def cut(self, n_bytes: int) -> int:
        """See `Memory.cut`."""
        self._used += round_up(n_bytes, 64)
        assert self._used <= self._n_bytes
        return self._map(round_up(n_bytes, 64))

    def view(self, address: int, n_bytes: int) -> U8:
        """See `Memory.view`; the bytes must lie in one area."""
        if not self._areas:
            assert self.address
        at, area = self._areas[bisect.bisect_right(self._areas, address, key=lambda area: area[0]) - 1]
        found = area[address - at :][:n_bytes]
        assert len(found) == n_bytes, f"{n_bytes} bytes asked for, {len(found)} are there"
        return found

    def _map(self, n_bytes: int) -> int:
        area = fenced(n_bytes)
        bisect.insort(self._areas, (int(area.ctypes.data), area), key=lambda area: area[0])
        return int(area.ctypes.data)


class FencedArena(Arena):
    """An Arena with a fence before, between and behind its slots."""

    def __init__(self, slot_counts: Sequence[int], slot_bytes: Sequence[int]) -> None:
        self.n_slots = sum(slot_counts)
        self.slot_counts = tuple(slot_counts)
        self._kinds = [kind for kind, count in enumerate(slot_counts) for _ in range(count)]
        self.class_bytes = tuple(round_up(n_bytes, PAGE_BYTES) for n_bytes in slot_bytes)
        strides = [self.class_bytes[kind] + PAGE_BYTES for kind in self._kinds]
        self._starts = list(itertools.accumulate(strides, initial=PAGE_BYTES))
        memory = mmap.mmap(-1, self._starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.huge_pages = False
        self._bytes = np.frombuffer(memory, np.uint8)
        self._base = int(self._bytes.ctypes.data)
        for start in self._starts:
            forbid(self._base + start - PAGE_BYTES)

    def view(self, slot: int) -> U8:
        """See `Arena.view`."""
        start = self._start(slot)
        return self._open_bytes()[start : start + self.slot_bytes(slot)]


def install() -> None:
    """Fence the memory of all engines that are opened from now on in this process."""
    for module in list(sys.modules.values()):
        names: dict[str, Any] = vars(module)
        if module.__name__.startswith("mer."):
            if names.get("Memory") is Memory:
                names["Memory"] = FencedMemory
            if names.get("Arena") is Arena:
                names["Arena"] = FencedArena
