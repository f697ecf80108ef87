"""Sending tokens to experts without leaving the compute threads: the router's choice becomes a table of entries."""

from __future__ import annotations

import numpy as np

from mer.compute.kernels.entry import COUNT, ENTRY_WORDS, FRESH, PAIR, ROW, ZERO
from mer.compute.kernels.ir import load_i32, load_i64, store_i32, store_i64
from mer.compute.kernels.step import ARG0, step


@step
def dispatch(row: int, thread: int, _n_threads: int) -> None:
    """Sort the (token, choice) pairs by expert, each expert's in their order, and write an entry for each expert used.

    Entries that are left over get no rows. The first thread does it all.

    Arguments: ids (int32 [n_pairs]), n_pairs, k, n_experts, addresses (int64 [n_experts, 3] of gate, up and down, none
    fresh), ends (int32 [n_experts], for its own use), table, n_entries (at least the experts used), places (int32
    [n_pairs], of each pair among the sorted ones), order (int32 [n_pairs], the token of each sorted pair), log (int32
    [n_pairs], a copy of the ids), stop (int64, set to the layer's number plus 1 if an expert's first address is 0: not
    there), layer.
    """
    if thread != 0:
        return
    ids, n_pairs = load_i64(row, ARG0), load_i64(row, ARG0 + 1)
    k, n_experts = load_i64(row, ARG0 + 2), load_i64(row, ARG0 + 3)
    addresses, ends, table = load_i64(row, ARG0 + 4), load_i64(row, ARG0 + 5), load_i64(row, ARG0 + 6)
    n_entries, places, order = load_i64(row, ARG0 + 7), load_i64(row, ARG0 + 8), load_i64(row, ARG0 + 9)
    log = load_i64(row, ARG0 + 10)
    for expert in range(n_experts):
        store_i32(ends, expert, np.int32(0))
    for pair in range(n_pairs):
        expert = load_i32(ids, pair)
        store_i32(log, pair, expert)
        store_i32(ends, expert, np.int32(load_i32(ends, expert) + 1))
    used, place = 0, 0
    for expert in range(n_experts):
        count = load_i32(ends, expert)
        store_i32(ends, expert, np.int32(place))
        if count > 0:
            entry = table + 8 * ENTRY_WORDS * used
            for matrix in range(3):
                store_i64(entry + 8 * matrix, load_i64(addresses, 3 * expert + matrix))
            store_i64(entry + 8 * COUNT, count)
            store_i64(entry + 8 * ROW, place)
            store_i64(entry + 8 * PAIR, place)
            store_i64(entry + 8 * FRESH, 0)
            store_i64(entry + 8 * ZERO, 0)
            if load_i64(addresses, 3 * expert) == 0:
                store_i64(load_i64(row, ARG0 + 11), load_i64(row, ARG0 + 12) + 1)
            used += 1
            place += count
    for entry in range(used, n_entries):
        for word in range(ENTRY_WORDS):
            store_i64(table + 8 * (ENTRY_WORDS * entry + word), 0)
    for pair in range(n_pairs):
        expert = load_i32(ids, pair)
        place = load_i32(ends, expert)
        store_i32(ends, expert, np.int32(place + 1))
        store_i32(places, pair, np.int32(place))
        store_i32(order, place, np.int32(pair // k))
