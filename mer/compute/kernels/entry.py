"""Tables of entries: the matrices, and the rows of the batch, that one step works through.

An entry is 8 int64: up to three addresses of matrices (an expert's gate, up and down), how many rows of the batch they
concern, the first of these among the inner activations and among the (token, choice) pairs, and in one word which
matrices are raw, as read from the file, and above that the expert's number. A step names its table; where the table is
0, the one entry lies in the step's own row.

A product step gives out the pieces of all matrices of all its entries by its work counter.
"""

from __future__ import annotations

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.ir import load_i64
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.words import ENTRY, Words, columns

ENTRY_WORDS = 8
COUNT, ROW, PAIR, RAW, ZERO = range(3, 8)  # words of an entry behind its addresses
RAW_INNER, RAW_OUTER = 1, 2  # bits of RAW: gate and up; down
EXPERT_BIT = 8  # of RAW: from here on it is the number of the expert


class TableWords(Words):
    """First words of a row whose step works through a table.

    table (address of its first entry; 0: the one entry lies in the row itself), n_entries (entries in the table).
    """

    table: int = 0
    n_entries: int = 1


class ProductWords(TableWords):
    """First words of a product step's row.

    table, n_entries (see `TableWords`), flags (see `flags`), chunk (units in a piece: tiles or rows of the matrix).
    """

    flags: int
    chunk: int


TABLE, PRODUCT = columns(TableWords), columns(ProductWords)


def flags(first: int = 0, matrices: int = 1, *, x: int = ROW, out: int = ROW, add: bool = False) -> int:
    """Return a product step's flags.

    Args:
        first: number of the first matrix (0 to 2) that each entry gives.
        matrices: how many of them.
        x: word of the entry that gives the first row of the activations: ROW, or ZERO.
        out: word of the entry that gives the first row of the results: ROW or PAIR.
        add: whether to add to what is there.
    """
    return first | matrices << 8 | x << 16 | out << 24 | int(add) << 32


@njit
def entry_of(row, table, number):  # type: ignore[no-untyped-def]
    """Return the address of an entry."""
    return (table if table != 0 else row + 8 * ENTRY) + 8 * ENTRY_WORDS * number


@njit
def claim(row, n_units):  # type: ignore[no-untyped-def]
    """Return the next piece of a product step: entry address (0: none is left), matrix from 0, first and last unit."""
    n_entries, matrices = load_i64(row, PRODUCT.n_entries), load_i64(row, PRODUCT.flags) >> 8 & 0xFF
    chunk = load_i64(row, PRODUCT.chunk)
    pieces = (n_units + chunk - 1) // chunk
    item = claim_unit(row)
    if item >= n_entries * matrices * pieces:
        return 0, 0, 0, 0
    product, first = item // pieces, item % pieces * chunk
    entry = entry_of(row, load_i64(row, PRODUCT.table), product // matrices)
    return entry, product % matrices, first, min(first + chunk, n_units)


@njit
def rows_of_piece(row, entry, matrix):  # type: ignore[no-untyped-def]
    """Return a piece's matrix, whether it is raw, the number of rows, and the first of activations and of results."""
    settings = load_i64(row, PRODUCT.flags)
    number = (settings & 0xFF) + matrix
    raw = load_i64(entry, RAW) >> (number // 2) & 1
    x_row, out_row = load_i64(entry, settings >> 16 & 0xFF), load_i64(entry, settings >> 24 & 0xFF)
    return load_i64(entry, number), raw, load_i64(entry, COUNT), x_row, out_row
