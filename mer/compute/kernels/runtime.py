"""Running a program of steps on several threads at once (SPMD), without the GIL.

Threads stay inside `follow` for life, so that they never touch the interpreter. `start` publishes a program and wakes
them; every thread runs the same rows, and the last one to finish writes to an eventfd. Rows whose BARRIER word is set
end in a barrier: poll and yield, then sleep on a futex. A BARRIER word above 1 is the address of an int64: so many of
the rows that follow are left out after the barrier, or run again if it is negative.

The control block's words lie on cache lines of their own; the offsets below are in bytes.
"""

from __future__ import annotations

from numba import types

from mer.compute.kernels.ir import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_step,
    load_i64,
    pause,
    store_i64,
    syscall6,
)
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import BARRIER, FUNCTION, ROW_WORDS, nogil_function
from mer.compute.kernels.system_calls import FUTEX, SCHED_YIELD, WRITE

CONTROL_BYTES = 512
GENERATION = 0  # bumped to start a program or to stop; idle threads sleep on it
STOP = 64  # non-zero ends the threads
ARRIVED = 128  # threads that reached the current barrier
PHASE = 192  # bumped when a barrier opens; its sleepers wait on it
PROGRAM = 256  # int64 address of the rows
LENGTH = 264  # int64 number of rows
FINISHED = 272  # int64 eventfd to write to when a program has finished
ONE = 280  # int64 1, what is written

_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, process-private
# A thread that waits polls for a microsecond, yields, and so on for some 0.3 ms; then it sleeps. On a virtual machine,
# waking up from that takes some 50 us, longer than most barriers and than the time between two jobs.
_POLLS, _YIELDS = 20, 300


@njit
def _wait_change(address, seen):  # type: ignore[no-untyped-def]
    """Return once the int32 at `address` differs from `seen`.

    Whoever is waited for may be on this very core, held up by the polling; yielding lets it go on, and leaves both
    awake, so that the system moves one of them to a core that is free.
    """
    for _ in range(_YIELDS):
        for _ in range(_POLLS):
            if atomic_load(address) != seen:
                return
            pause()
        syscall6(SCHED_YIELD, 0, 0, 0, 0, 0, 0)
    while atomic_load(address) == seen:
        syscall6(FUTEX, address, _WAIT, seen, 0, 0, 0)


@njit
def _publish(address):  # type: ignore[no-untyped-def]
    """Bump the int32 at `address` and wake every thread that sleeps on it."""
    atomic_add(address, 1)
    syscall6(FUTEX, address, _WAKE, 0x7FFFFFFF, 0, 0, 0)


@njit
def _barrier(control, n_threads):  # type: ignore[no-untyped-def]
    phase = atomic_load(control + PHASE)
    if atomic_add(control + ARRIVED, 1) == n_threads - 1:
        atomic_store(control + ARRIVED, 0)
        _publish(control + PHASE)
    else:
        _wait_change(control + PHASE, phase)


@njit
def _run_rows(control, rows, length, thread, n_threads):  # type: ignore[no-untyped-def]
    index = 0
    while index < length:
        row = rows + index * (ROW_WORDS * 8)
        call_step(load_i64(row, FUNCTION), row, thread, n_threads)
        barrier = load_i64(row, BARRIER)
        index += 1
        if n_threads > 1 and barrier != 0 and index < length:
            _barrier(control, n_threads)
        if barrier > 1:
            index += load_i64(barrier, 0)


@nogil_function(types.void(types.int64, types.int64, types.int64))
def follow(control, thread, n_threads):  # type: ignore[no-untyped-def]
    """Run every program that is started in `control`, as `thread`, until stopped."""
    seen = 0
    while True:
        _wait_change(control + GENERATION, seen)
        seen = atomic_load(control + GENERATION)
        if atomic_load(control + STOP) != 0:
            return
        _run_rows(control, load_i64(control + PROGRAM, 0), load_i64(control + LENGTH, 0), thread, n_threads)
        if atomic_add(control + ARRIVED, 1) == n_threads - 1:
            atomic_store(control + ARRIVED, 0)
            syscall6(WRITE, load_i64(control + FINISHED, 0), control + ONE, 8, 0, 0, 0)


@nogil_function(types.void(types.int64, types.int64, types.int64))
def start(control, rows, length):  # type: ignore[no-untyped-def]
    """Let the threads of `control`, which are idle, run a program; `control`'s eventfd tells when they have."""
    store_i64(control + PROGRAM, rows)
    store_i64(control + LENGTH, length)
    store_i64(control + ONE, 1)
    _publish(control + GENERATION)


@nogil_function(types.void(types.int64, types.int64))
def run_alone(rows, length):  # type: ignore[no-untyped-def]
    """Run a program on the calling thread."""
    _run_rows(0, rows, length, 0, 1)


@nogil_function(types.void(types.int64))
def stop(control):  # type: ignore[no-untyped-def]
    """End the threads of `control`; they must be idle."""
    atomic_store(control + STOP, 1)
    _publish(control + GENERATION)
