"""Running a program of steps on several threads at once (SPMD), without the GIL.

Thread 0 is the leader: it publishes a program, wakes the followers, and runs the same rows as they do. Rows whose
BARRIER word is set end in a barrier: spin briefly, then sleep on a futex. Followers stay inside `follow` for life, so
that they never touch the interpreter.

The control block's words lie on cache lines of their own; the offsets below are in bytes.
"""

from __future__ import annotations

import platform

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
from mer.errors import ConfigError

CONTROL_BYTES = 512
GENERATION = 0  # bumped to start a program or to stop; followers sleep on it
STOP = 64  # non-zero ends the followers
ARRIVED = 128  # threads that reached the current barrier
PHASE = 192  # bumped when a barrier opens; its sleepers wait on it
PROGRAM = 256  # int64 address of the rows
LENGTH = 264  # int64 number of rows

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)  # Linux system call number
if _FUTEX < 0:
    raise ConfigError(f"mer computes on x86_64 and aarch64 processors, not on {platform.machine()}")
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, process-private
_SPINS = 2000  # polls before a thread goes to sleep: a few microseconds


@njit
def _wait_change(address, seen):  # type: ignore[no-untyped-def]
    """Return once the int32 at `address` differs from `seen`."""
    for _ in range(_SPINS):
        if atomic_load(address) != seen:
            return
        pause()
    while atomic_load(address) == seen:
        syscall6(_FUTEX, address, _WAIT, seen, 0, 0, 0)


@njit
def _publish(address):  # type: ignore[no-untyped-def]
    """Bump the int32 at `address` and wake every thread that sleeps on it."""
    atomic_add(address, 1)
    syscall6(_FUTEX, address, _WAKE, 0x7FFFFFFF, 0, 0, 0)


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
    for index in range(length):
        row = rows + index * (ROW_WORDS * 8)
        call_step(load_i64(row, FUNCTION), row, thread, n_threads)
        if n_threads > 1 and (load_i64(row, BARRIER) != 0 or index == length - 1):
            _barrier(control, n_threads)


@nogil_function(types.void(types.int64, types.int64, types.int64))
def follow(control, thread, n_threads):  # type: ignore[no-untyped-def]
    """Run every program that the leader publishes in `control`, as `thread`, until stopped."""
    seen = 0
    while True:
        _wait_change(control + GENERATION, seen)
        seen = atomic_load(control + GENERATION)
        if atomic_load(control + STOP) != 0:
            return
        rows, length = load_i64(control + PROGRAM, 0), load_i64(control + LENGTH, 0)
        _run_rows(control, rows, length, thread, n_threads)


@nogil_function(types.void(types.int64, types.int64, types.int64, types.int64))
def lead(control, rows, length, n_threads):  # type: ignore[no-untyped-def]
    """Run a program with the followers of `control` and return when every thread has finished it."""
    if n_threads > 1:
        store_i64(control + PROGRAM, rows)
        store_i64(control + LENGTH, length)
        _publish(control + GENERATION)
    _run_rows(control, rows, length, 0, n_threads)


@nogil_function(types.void(types.int64))
def stop(control):  # type: ignore[no-untyped-def]
    """End the followers of `control`; they must be idle."""
    atomic_store(control + STOP, 1)
    _publish(control + GENERATION)
