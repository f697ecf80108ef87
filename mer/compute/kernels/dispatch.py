"""Sending tokens to experts without leaving the compute threads: the router's choice becomes tables of entries."""

from __future__ import annotations

import numpy as np

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.entry import COUNT, ENTRY_WORDS, EXPERT_BIT, PAIR, RAW, RAW_INNER, RAW_OUTER, ROW, ZERO
from mer.compute.kernels.ir import load_i32, load_i64, store_i32, store_i64
from mer.compute.kernels.job_reads import (
    AWAIT,
    END,
    expert_words,
    hand_table,
    keep,
    log_read,
    now_ns,
)
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import step
from mer.compute.kernels.words import ROW_WORDS, Words, columns
from mer.io.loan.words import BEGIN, LEAD, N_LOGGED, N_PARTS, PART, PART_WORDS, STOP
from mer.limits import MAX_MATRICES

_WORD = 8
_ENTRY_BYTES = _WORD * ENTRY_WORDS


@njit
def _write_entry(entry, expert, count, place, raw):  # type: ignore[no-untyped-def]
    store_i64(entry + _WORD * COUNT, count)
    store_i64(entry + _WORD * ROW, place)
    store_i64(entry + _WORD * PAIR, place)
    store_i64(entry + _WORD * RAW, raw | expert << EXPERT_BIT)
    store_i64(entry + _WORD * ZERO, 0)


@njit
def _read_missing(reads, layer, table, n):  # type: ignore[no-untyped-def]
    """Find slots for a table's experts, whose numbers are where addresses belong; return whether all got one."""
    if load_i64(reads, STOP) != 0:
        return False
    begun_ns = now_ns(reads)
    for number in range(n):
        entry = table + _ENTRY_BYTES * number
        expert = load_i64(entry, 0)
        slot = log_read(reads, layer, expert, begun_ns)
        if slot == 0:
            return False
        for matrix in range(load_i64(reads, N_PARTS)):
            part = expert_words(reads, layer, expert) + _WORD * (PART + PART_WORDS * matrix)
            store_i64(entry + _WORD * matrix, slot + load_i64(part, BEGIN) + load_i64(part, LEAD))
    return True


class DispatchWords(Words):
    """Words of a row of `dispatch`.

    ids (int32 [n_pairs]), n_pairs, k, n_experts, addresses (int64 [n_experts, MAX_MATRICES], see `RunResident`), ends
    (int32 [n_experts], for its own use), table, missing (table of missing experts), steps (for a table), places (int32
    [n_pairs], of each pair among the sorted ones), order (int32 [n_pairs], the token of each sorted pair), log (int32
    [n_pairs], a copy of the ids), stop (int64, set to the layer's number plus 1 if an expert is missing and cannot be
    read), layer, end (int64, set to `END` then), skip (int64, set to the number of steps behind those for the first
    table that are needed only if an expert is missing, or to 0 if one is), reads (control block, or 0).
    """

    ids: int
    n_pairs: int
    k: int
    n_experts: int
    addresses: int
    ends: int
    table: int
    missing: int
    steps: int
    places: int
    order: int
    log: int
    stop: int
    layer: int
    end: int
    skip: int
    reads: int


DISPATCH = columns(DispatchWords)


@step(DispatchWords)
def dispatch(row: int, _thread: int, _n_threads: int) -> None:
    """Sort the (token, choice) pairs by expert, each expert's in their order, and write an entry for each expert used.

    Experts that are in memory have theirs in one table, missing ones, which are to be read by the job, in another. The
    steps that work on them follow: `begin_reads`, so many for the first table, `await_reads`, `next_turn`, and as many
    for the second table. Whoever comes first does it all.
    """
    if claim_unit(row) != 0:
        return
    ids, n_pairs = load_i64(row, DISPATCH.ids), load_i64(row, DISPATCH.n_pairs)
    k, n_experts = load_i64(row, DISPATCH.k), load_i64(row, DISPATCH.n_experts)
    addresses, ends = load_i64(row, DISPATCH.addresses), load_i64(row, DISPATCH.ends)
    table, missing = load_i64(row, DISPATCH.table), load_i64(row, DISPATCH.missing)
    steps = load_i64(row, DISPATCH.steps)
    places, order, log = load_i64(row, DISPATCH.places), load_i64(row, DISPATCH.order), load_i64(row, DISPATCH.log)
    layer, reads = load_i64(row, DISPATCH.layer), load_i64(row, DISPATCH.reads)
    # One thread counts and sorts: the pairs are so few that sharing them out takes longer, for the barrier it needs.
    for expert in range(n_experts):
        store_i32(ends, expert, np.int32(0))
    for pair in range(n_pairs):
        expert = load_i32(ids, pair)
        store_i32(log, pair, expert)
        store_i32(ends, expert, np.int32(load_i32(ends, expert) + 1))
    n_there, n_missing, place = 0, 0, 0
    readable = reads != 0
    for expert in range(n_experts):
        count = load_i32(ends, expert)
        store_i32(ends, expert, np.int32(place))
        if count > 0:
            if reads != 0:
                keep(reads, layer, expert)
            first = load_i64(addresses, MAX_MATRICES * expert)
            if first > 0:
                entry = table + _ENTRY_BYTES * n_there
                for matrix in range(MAX_MATRICES):
                    store_i64(entry + _WORD * matrix, load_i64(addresses, MAX_MATRICES * expert + matrix))
                _write_entry(entry, expert, count, place, 0)
                n_there += 1
            else:
                entry = missing + _ENTRY_BYTES * n_missing
                store_i64(entry, expert)
                _write_entry(entry, expert, count, place, RAW_INNER | RAW_OUTER)
                n_missing += 1
                readable = readable and first == 0
            place += count
    if n_missing > 0 and not (readable and _read_missing(reads, layer, missing, n_missing)):
        store_i64(load_i64(row, DISPATCH.stop), layer + 1)
        store_i64(load_i64(row, DISPATCH.end), END)
        return
    store_i64(load_i64(row, DISPATCH.skip), 0 if n_missing > 0 else steps + 2)
    hand_table(row, 2, steps, table, n_there)
    if n_missing > 0:
        wait = row + _WORD * ROW_WORDS * (2 + steps)
        store_i64(wait + _WORD * AWAIT.first, load_i64(reads, N_LOGGED) - n_missing)
        store_i64(wait + _WORD * AWAIT.n_missing, n_missing)
        store_i64(wait + _WORD * AWAIT.n_handed, 0)
    for pair in range(n_pairs):
        expert = load_i32(ids, pair)
        place = load_i32(ends, expert)
        store_i32(ends, expert, np.int32(place + 1))
        store_i32(places, pair, np.int32(place))
        store_i32(order, place, np.int32(pair // k))
