"""Vectors with one lane for each row of a tile, and the pieces of a tile's block that they are loaded from.

A tile has 16 rows. A form whose registers have 16 lanes of 32 bits takes them all at once; one whose registers have 8
takes a block in two pieces of 8 rows, one after the other, so that each piece's weights stay in registers while all
columns of activations meet them. The types' decoders are written for a piece and do not know its size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from mer.compute.kernels.interleave import ROWS
from mer.compute.kernels.ir import F32, I8, I16, I32, call, const, i64, load, prefetch, widen_half
from mer.compute.kernels.target import FORM, Form

ROW_LANES = 8 if FORM in (Form.AVX2, Form.AVX_VNNI) else ROWS
PIECES = ROWS // ROW_LANES

# One float32, int32, int16 or int8 of each row, and 4 int8 or 2 int16
FLOATS, WORDS, SHORTS, BYTES = (ir.VectorType(t, ROW_LANES) for t in (F32, I32, I16, I8))
QUADS, PAIRS = ir.VectorType(I8, 4 * ROW_LANES), ir.VectorType(I16, 2 * ROW_LANES)

_PREFETCH_BYTES = 8192  # weights are asked for so far ahead, across tiles: the hardware itself stops at pages
_PREFETCH_COLUMNS = 4  # with more columns the arithmetic takes longer than the weights
_L2 = 2  # locality of a prefetch that goes past the first cache, which is too small to hold so much until it is used


class TilePiece:
    """A tile's block at an address, as the rows of piece `number` see it; offsets are those in the block."""

    def __init__(self, b: Any, address: Any, number: int) -> None:
        self._b, self._address, self._number = b, address, number

    def load(self, offset: int, vector: ir.VectorType) -> Any:
        """Load this piece's part of the vector with something of all 16 rows that begins at `offset`."""
        return load(self._b, self._address, offset + vector.count * vector.element.width // 8 * self._number, vector)

    def moved(self, n_bytes: Any) -> TilePiece:
        """Return the same piece seen from `n_bytes` (an IR value) on."""
        later = copy.copy(self)
        later._address = self._b.add(self._address, n_bytes)
        return later

    def row(self, number: Any) -> Any:
        """Return the address of the word of row `number`, an IR value, in a vector of words at offset 0."""
        return self._b.add(self._address, self._b.add(self._b.mul(number, i64(4)), i64(4 * ROW_LANES * self._number)))

    def ask_ahead_of_row(self, number: Any, n_bytes: int, columns: int) -> None:
        """Ask for the part that row `number`, an IR value, has in what lies ahead; `n_bytes` are those of its block."""
        if columns <= _PREFETCH_COLUMNS:
            b = self._b
            part = b.mul(b.add(number, i64(ROW_LANES * self._number)), i64(n_bytes))
            for line in range(0, n_bytes, 64):
                prefetch(b, b.add(self._address, part), _PREFETCH_BYTES + line, _L2)

    def ask_ahead(self, n_bytes: int, columns: int) -> None:
        """Ask for as many bytes as far ahead as is useful with so many columns; the pieces share this evenly."""
        if columns <= _PREFETCH_COLUMNS:
            for line in range(64 * self._number, n_bytes, 64 * PIECES):
                prefetch(self._b, self._address, _PREFETCH_BYTES + line, _L2)


def half_pair(b: Any, weights: TilePiece, offset: int) -> tuple[Any, Any]:
    """Return the first and the second half float of each row's word as float32."""
    words = weights.load(offset, WORDS)
    first, second = b.trunc(words, SHORTS), b.trunc(b.lshr(words, const(WORDS, 16)), SHORTS)
    return widen_half(b, first), widen_half(b, second)


def lookup16(b: Any, table: Sequence[int], index: Any) -> Any:
    """Return entry `index` (0 to 15) of a table of 16 unsigned bytes for each byte of QUADS."""
    name = {Form.AVX512_VNNI: "avx512.pshuf.b.512", Form.AVX_VNNI: "avx2.pshuf.b", Form.AVX2: "avx2.pshuf.b"}.get(FORM)
    if name is not None:
        return call(b, f"llvm.x86.{name}", QUADS, ir.Constant(QUADS, [*table] * (QUADS.count // 16)), index)
    entries = [const(QUADS, value) for value in table]
    for bit in range(4):  # halve the choice with each
        is_set = b.icmp_unsigned("!=", b.and_(index, const(QUADS, 1 << bit)), const(QUADS, 0))
        entries = [b.select(is_set, odd, even) for even, odd in zip(entries[::2], entries[1::2], strict=True)]
    return entries[0]
