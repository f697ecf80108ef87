"""Reads of experts from within a job, by the ring that it is lent; see `mer.io.loan.words`.

The layouts of the ring are those of <linux/io_uring.h>.
"""

from __future__ import annotations

import numpy as np

from mer.compute.kernels.claim import claim_unit
from mer.compute.kernels.entry import ENTRY_WORDS, TABLE
from mer.compute.kernels.ir import (
    atomic_load,
    atomic_store,
    load_f64,
    load_i32,
    load_i64,
    pause,
    store_i32,
    store_i64,
    syscall6,
)
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import step
from mer.compute.kernels.system_calls import CLOCK_GETTIME, IO_URING_ENTER, PPOLL, SCHED_YIELD
from mer.compute.kernels.words import ROW_WORDS, Words, columns
from mer.io.loan.words import (
    ADDRESSES,
    ARRANGED,
    BASE,
    BEGIN,
    BEGUN_NS,
    CQ_HEAD,
    CQ_MASK,
    CQ_TAIL,
    CQES,
    DEPTH,
    ENDED_NS,
    EXPERT,
    EXPERT_WORDS,
    EXPERTS,
    FILE,
    FREE,
    GIVE_UP_NS,
    IN_FLIGHT,
    KIND,
    LAYER,
    LEAD,
    LENGTH,
    LOG,
    LOG_WORDS,
    MAX_LOGGED,
    N_EXPERTS,
    N_LAYERS,
    N_LOGGED,
    N_PARTS,
    NEEDED,
    NEXT,
    PART,
    PART_WORDS,
    PATIENCE,
    PENDING,
    RESULT,
    RING,
    SCRATCH,
    SERIAL,
    SQ_MASK,
    SQ_TAIL,
    SQES,
    START,
    TOKEN_BIT,
    USED,
    VALUES,
    VICTIM,
    WAITED_NS,
    WEIGHTS,
)
from mer.limits import MAX_MATRICES

END = 1 << 40  # for a barrier's word: the program's rows are left out, all that are left

_MONOTONIC = 1
_POLLIN = 1
_OP_READ = 22
_SQE_BYTES, _CQE_BYTES = 64, 16
_POLLS = 20  # between two yields
_YIELD_NS = 3_000_000  # for so long a wait polls; then it sleeps
_NAP_NS = 1_000_000


@njit
def now_ns(control):  # type: ignore[no-untyped-def]
    """Return CLOCK_MONOTONIC in nanoseconds."""
    time = control + 8 * SCRATCH
    syscall6(CLOCK_GETTIME, _MONOTONIC, time, 0, 0, 0, 0)
    return load_i64(time, 0) * 1_000_000_000 + load_i64(time, 1)


@njit
def expert_words(control, layer, expert):  # type: ignore[no-untyped-def]
    """Return the address of an expert's words."""
    number = layer * load_i64(control, N_EXPERTS) + expert
    return load_i64(control, EXPERTS) + 8 * EXPERT_WORDS * number


@njit
def keep(control, layer, expert):  # type: ignore[no-untyped-def]
    """Let an expert stay for as long as the job runs."""
    number = layer * load_i64(control, N_EXPERTS) + expert
    store_i64(load_i64(control, USED) + 8 * number, load_i64(control, SERIAL))


@njit
def _victim(control, layer, kind):  # type: ignore[no-untyped-def]
    """Return the resident that is worth least, layer * E + expert, for one of a layer; -1 if none may leave."""
    n_layers, n_experts, serial = load_i64(control, N_LAYERS), load_i64(control, N_EXPERTS), load_i64(control, SERIAL)
    addresses, used, experts = load_i64(control, ADDRESSES), load_i64(control, USED), load_i64(control, EXPERTS)
    values, weights, patience = load_i64(control, VALUES), load_i64(control, WEIGHTS), load_i64(control, PATIENCE)
    victim, least = -1, np.inf
    for place in range(n_layers):
        at = (layer - place) % n_layers
        weight, wait = load_f64(weights, at), load_f64(patience, place)
        for expert in range(n_experts):
            number = at * n_experts + expert
            if load_i64(addresses, MAX_MATRICES * number) > 0 and load_i64(used, number) != serial:
                worth = load_f64(values, number) * weight * wait
                if worth < least and load_i64(experts, EXPERT_WORDS * number + KIND) == kind:
                    victim, least = number, worth
    return victim


@njit
def log_read(control, layer, expert, begun_ns):  # type: ignore[no-untyped-def]
    """Find a slot for an expert and note that it is to be read there; return where it begins, or 0 if there is none."""
    number = load_i64(control, N_LOGGED)
    if number == MAX_LOGGED:
        return 0
    kind = load_i64(expert_words(control, layer, expert), KIND)
    if load_i64(load_i64(control, FREE), kind) != 0:
        return 0
    victim = _victim(control, layer, kind)
    if victim < 0:
        return 0
    words = load_i64(control, EXPERTS) + 8 * EXPERT_WORDS * victim
    address = load_i64(control, ADDRESSES) + 8 * MAX_MATRICES * victim
    base = load_i64(address, 0) - load_i64(words, PART + BEGIN) - load_i64(words, PART + LEAD)
    for matrix in range(MAX_MATRICES):
        store_i64(address + 8 * matrix, 0)
    entry = load_i64(control, LOG) + 8 * LOG_WORDS * number
    store_i64(entry + 8 * LAYER, layer)
    store_i64(entry + 8 * EXPERT, expert)
    store_i64(entry + 8 * BASE, base)
    store_i64(entry + 8 * VICTIM, victim)
    store_i64(entry + 8 * ARRANGED, 0)
    store_i64(entry + 8 * BEGUN_NS, begun_ns)
    store_i64(entry + 8 * ENDED_NS, 0)
    for part in range(load_i64(control, N_PARTS)):
        store_i64(entry + 8 * (RESULT + part), PENDING)
    store_i64(control + 8 * N_LOGGED, number + 1)
    return base


@njit
def _prepare(control, read, tail):  # type: ignore[no-untyped-def]
    """Write the submission of a read, N_PARTS * entry + part, at the ring's tail."""
    number, matrix = read // load_i64(control, N_PARTS), read % load_i64(control, N_PARTS)
    entry = load_i64(control, LOG) + 8 * LOG_WORDS * number
    words = expert_words(control, load_i64(entry, LAYER), load_i64(entry, EXPERT))
    part = words + 8 * (PART + PART_WORDS * matrix)
    sqe = load_i64(control, SQES) + _SQE_BYTES * (tail & load_i64(control, SQ_MASK))
    store_i32(sqe, 0, np.int32(_OP_READ))
    store_i32(sqe, 1, np.int32(load_i64(part, FILE)))
    store_i64(sqe + 8, load_i64(part, START))
    store_i64(sqe + 16, load_i64(entry, BASE) + load_i64(part, BEGIN))
    store_i64(sqe + 24, load_i64(part, LENGTH))  # and no flags
    store_i64(sqe + 32, TOKEN_BIT + 4 * (load_i64(control, SERIAL) + number) + matrix)
    for word in range(5, 8):
        store_i64(sqe + 8 * word, 0)


@njit
def submit(control):  # type: ignore[no-untyped-def]
    """Let the kernel begin as many of the logged reads as may be under way."""
    ring, tail_address = load_i64(control, RING), load_i64(control, SQ_TAIL)
    read, in_flight = load_i64(control, NEXT), load_i64(control, IN_FLIGHT)
    last = min(load_i64(control, N_PARTS) * load_i64(control, N_LOGGED), read + load_i64(control, DEPTH) - in_flight)
    if read >= last:
        return
    tail = atomic_load(tail_address)
    for number in range(read, last):
        _prepare(control, number, tail + number - read)
    atomic_store(tail_address, tail + last - read)
    errors = 0
    while read < last:
        taken = syscall6(IO_URING_ENTER, ring, last - read, 0, 0, 0, 0)
        if taken > 0:
            read += taken
            in_flight += taken
        elif errors < 100:  # interrupted, or the kernel is short of memory for the moment
            errors += 1
        else:
            atomic_store(tail_address, atomic_load(tail_address) - (last - read))
            break
    store_i64(control + 8 * NEXT, read)
    store_i64(control + 8 * IN_FLIGHT, in_flight)


@njit
def _reap(control):  # type: ignore[no-untyped-def]
    """Note what has been read and return how many reads that were, or -1 if one of them is not whole."""
    head_address, mask = load_i64(control, CQ_HEAD), load_i64(control, CQ_MASK)
    head, tail = atomic_load(head_address), atomic_load(load_i64(control, CQ_TAIL))
    n, whole = (tail - head) & 0xFFFFFFFF, True  # the indices wrap around
    for place in range(n):
        cqe = load_i64(control, CQES) + _CQE_BYTES * ((head + place) & mask)
        number = load_i64(cqe, 0) - TOKEN_BIT - 4 * load_i64(control, SERIAL)
        result = load_i32(cqe, 2)
        entry = load_i64(control, LOG) + 8 * LOG_WORDS * (number // 4)
        store_i64(entry + 8 * (RESULT + number % 4), result)
        words = expert_words(control, load_i64(entry, LAYER), load_i64(entry, EXPERT))
        if result < load_i64(words, PART + PART_WORDS * (number % 4) + NEEDED):
            whole = False
        missing = False
        for part in range(load_i64(control, N_PARTS)):
            missing = missing or load_i64(entry, RESULT + part) == PENDING
        if not missing:
            store_i64(entry + 8 * ENDED_NS, now_ns(control))
    atomic_store(head_address, tail)
    store_i64(control + 8 * IN_FLIGHT, load_i64(control, IN_FLIGHT) - n)
    return n if whole else -1


@njit
def _nap(control):  # type: ignore[no-untyped-def]
    """Sleep for a while, or until something has been read."""
    waited_for, time = control + 8 * SCRATCH, control + 8 * (SCRATCH + 1)
    store_i32(waited_for, 0, np.int32(load_i64(control, RING)))
    store_i32(waited_for, 1, np.int32(_POLLIN))
    store_i64(time, 0)
    store_i64(time + 8, _NAP_NS)
    syscall6(PPOLL, waited_for, 1, time, 0, 8, 0)


@njit
def hand_table(row, distance, steps, table, n):  # type: ignore[no-untyped-def]
    """Let so many steps at a distance behind a row work on n entries of a table."""
    for number in range(steps):
        there = row + 8 * ROW_WORDS * (distance + number)
        store_i64(there + 8 * TABLE.table, table)
        store_i64(there + 8 * TABLE.n_entries, n)


class BeginReadsWords(Words):
    """Words of a row of `begin_reads`.

    control (block, or 0 if there is none).
    """

    control: int


BEGIN_READS = columns(BeginReadsWords)


@step(BeginReadsWords)
def begin_reads(row: int, _thread: int, _n_threads: int) -> None:
    """Let the kernel begin what `dispatch` has logged; whoever comes first does it, while others go on."""
    if load_i64(row, BEGIN_READS.control) != 0 and claim_unit(row) == 0:
        submit(load_i64(row, BEGIN_READS.control))


@njit
def _landed(control, number):  # type: ignore[no-untyped-def]
    """Return whether all of an expert of the log has been read; `_reap` has seen to it that it is whole."""
    return load_i64(load_i64(control, LOG) + 8 * LOG_WORDS * number, ENDED_NS) != 0


class AwaitReadsWords(Words):
    """Words of a row of `await_reads`.

    control (block), end (int64, set to `END` then), stop (int64, set to the layer's number plus 1 then), layer, table
    (of missing experts), steps (for a table, which follow behind `next_turn`); and, set by `dispatch` for each layer,
    first (the number of the table's first expert in the log), n_missing (experts in the table) and n_handed (how many
    of them have had their turn).
    """

    control: int
    end: int
    stop: int
    layer: int
    table: int
    steps: int
    first: int = 0
    n_missing: int = 0
    n_handed: int = 0


AWAIT = columns(AwaitReadsWords)


@step(AwaitReadsWords)
def await_reads(row: int, _thread: int, _n_threads: int) -> None:
    """Wait until the next missing expert is in memory, and leave it and those that are there too to the steps behind.

    Whoever comes first does it. If a read fails or takes too long, end the program.
    """
    if claim_unit(row) != 0:
        return
    control = load_i64(row, AWAIT.control)
    first, n, ready = load_i64(row, AWAIT.first), load_i64(row, AWAIT.n_missing), load_i64(row, AWAIT.n_handed)
    begun_ns = now_ns(control)
    reads_ns = load_i64(load_i64(control, LOG) + 8 * LOG_WORDS * first, BEGUN_NS)
    last_ns = reads_ns + load_i64(control, GIVE_UP_NS)
    waited_ns = 0
    whole = True
    while True:
        n_read = _reap(control)
        whole = n_read >= 0
        if not whole or _landed(control, first + ready) or begun_ns + waited_ns > last_ns:
            break
        if n_read > 0:
            submit(control)
        # Polling first: to sleep at once costs as much as a short read. Polling on would take a core from others.
        if waited_ns < _YIELD_NS:
            for _ in range(_POLLS):
                pause()
            syscall6(SCHED_YIELD, 0, 0, 0, 0, 0, 0)
        else:
            _nap(control)
        waited_ns = now_ns(control) - begun_ns
    submit(control)
    store_i64(control + 8 * WAITED_NS, load_i64(control, WAITED_NS) + now_ns(control) - begun_ns)
    handed = ready
    while whole and ready < n and _landed(control, first + ready):
        store_i64(load_i64(control, LOG) + 8 * (LOG_WORDS * (first + ready) + ARRANGED), 1)
        ready += 1
    if ready == handed:
        store_i64(load_i64(row, AWAIT.end), END)
        store_i64(load_i64(row, AWAIT.stop), load_i64(row, AWAIT.layer) + 1)
        return
    store_i64(row + 8 * AWAIT.n_handed, ready)
    steps, rest = load_i64(row, AWAIT.steps), load_i64(row, AWAIT.table) + 8 * ENTRY_WORDS * handed
    hand_table(row, 2, steps, rest, ready - handed)


class NextTurnWords(Words):
    """Words of a row of `next_turn`.

    again (int64, set to the number of steps to go on by at the end of the table's steps).
    """

    again: int


NEXT_TURN = columns(NextTurnWords)


@step(NextTurnWords)
def next_turn(row: int, _thread: int, _n_threads: int) -> None:
    """Behind `await_reads`, tell whether to come back to it when what it has left to the steps is done.

    Whoever comes first does it.
    """
    if claim_unit(row) == 0:
        wait = row - 8 * ROW_WORDS
        done = load_i64(wait, AWAIT.n_handed) == load_i64(wait, AWAIT.n_missing)
        store_i64(load_i64(row, NEXT_TURN.again), 0 if done else -(load_i64(wait, AWAIT.steps) + 2))
