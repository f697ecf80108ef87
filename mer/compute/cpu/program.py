"""Building programs: rows of kernel steps, and the memory that they work on."""

from __future__ import annotations

import struct
from array import array

import numpy as np
import numpy.typing as npt

from mer.compute.kernels.entry import ENTRY_WORDS
from mer.compute.kernels.step import Row, Step
from mer.compute.kernels.words import ARG0, BARRIER, ENTRY, ROW_WORDS
from mer.io.arena import PAGE_BYTES, map_anonymous
from mer.io.extents import round_up


class Memory:
    """One zeroed anonymous mapping from which aligned areas are cut; freed when nothing refers to it any more."""

    def __init__(self, n_bytes: int) -> None:
        self.bytes = np.frombuffer(map_anonymous(round_up(max(n_bytes, 1), PAGE_BYTES)), np.uint8)
        self.address = int(self.bytes.ctypes.data)
        self._used = 0

    def cut(self, n_bytes: int) -> int:
        """Return the address of the next area of `n_bytes`, aligned to 64 bytes."""
        start = self._used
        self._used = round_up(start + n_bytes, 64)
        if self._used > len(self.bytes):
            raise RuntimeError(f"area of {n_bytes} bytes at {start} does not fit {len(self.bytes)}")
        return self.address + start

    def view(self, address: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the bytes at an address inside the mapping."""
        start = address - self.address
        return self.bytes[start : start + n_bytes]

    def floats(self, address: int, *shape: int) -> npt.NDArray[np.float32]:
        """Return float32 at an address inside the mapping, shaped."""
        return self.view(address, 4 * int(np.prod(shape))).view(np.float32).reshape(shape)

    def ints(self, address: int, *shape: int) -> npt.NDArray[np.int32]:
        """Return int32 at an address inside the mapping, shaped."""
        return self.view(address, 4 * int(np.prod(shape))).view(np.int32).reshape(shape)


_PACKERS = [struct.Struct(f"={n}q") for n in range(ENTRY + 1)]
_ENTRY_PACKER = struct.Struct(f"={ENTRY_WORDS}q")
_ROW_BYTES = 8 * ROW_WORDS


class Program:
    """A list of steps that grows as needed and is used again from job to job."""

    def __init__(self) -> None:
        self.rows = np.zeros((64, ROW_WORDS), np.int64)
        self.length = 0
        self.address = int(self.rows.ctypes.data)  # of the first row
        self._bytes = self.rows.data.cast("B")
        self._tables: list[array[int]] = []

    def clear(self) -> None:
        """Forget all steps and tables."""
        self.length = 0
        self._tables.clear()

    def add(self, row: Row) -> None:
        """Append a step; threads may run it while others are still in the step before, back to the last barrier."""
        self._pack(*row)

    def add_alone(self, row: Row, entry: tuple[int, ...]) -> None:
        """Append a step that takes a table, with the one entry given in the table's place."""
        self._pack(*row)
        _ENTRY_PACKER.pack_into(self._bytes, (self.length - 1) * _ROW_BYTES + 8 * ENTRY, *entry)

    def add_on(self, row: Row, table: int, n_entries: int) -> None:
        """Append a step that takes a table, on this one."""
        self._pack(row[0], table, n_entries, *row[3:])  # type: ignore[misc]  # no starred target, which makes a list

    def _pack(self, step: Step, *words: int) -> None:
        if self.length == len(self.rows):
            self._grow(1)
        packer = _PACKERS[ARG0 + len(words)]
        packer.pack_into(self._bytes, self.length * _ROW_BYTES, step.address, 0, 0, *words)
        self.length += 1

    def table(self, words: list[int]) -> int:
        """Return the address of a table of entries that is kept until the program is cleared."""
        table = array("q", words)
        self._tables.append(table)
        return table.buffer_info()[0]

    def extend(self, rows: npt.NDArray[np.int64]) -> None:
        """Append steps that another program has built and not run."""
        self._grow(len(rows))
        self.rows[self.length : self.length + len(rows)] = rows
        self.length += len(rows)

    def barrier(self, skip: int = 1) -> None:
        """Let every thread finish all steps so far before any goes on; the end of a program is a barrier anyway.

        Args:
            skip: address of an int64 that these steps set to the number of steps that are left out then, or run again
                if it is negative; by default there is none.
        """
        if self.length:
            self.rows[self.length - 1, BARRIER] = max(skip, int(self.rows[self.length - 1, BARRIER]))

    def _grow(self, n_rows: int) -> None:
        """Make room for more rows."""
        if self.length + n_rows > len(self.rows):
            more = np.zeros((self.length + n_rows, ROW_WORDS), np.int64)
            self.rows = np.concatenate([self.rows, more])
            self.address = int(self.rows.ctypes.data)
            self._bytes = self.rows.data.cast("B")
