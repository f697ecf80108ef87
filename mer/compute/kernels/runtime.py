"""Running a program of steps on several threads at once, without the GIL.

A program is a list of *phases*: the rows from one barrier to the next. Every row's work is claimed unit by unit (see
`claim.py`), so that a phase is done when nothing is left to claim and nobody is inside it any more. Nobody waits for a
thread that has not come: one that the system keeps from its core delays the others only while it holds a unit.

`STATE` says it all in one int64: the number of phases that have begun so far (its *epoch*), the row with which this one
begins, and how many threads are inside. A thread enters by adding one to it, and leaves when it finds nothing to claim;
the last to leave begins the next phase instead, and stays inside. Behind the last phase stands `IDLE` instead of a row,
and an eventfd tells.

A BARRIER word above 1 is the address of an int64: so many of the rows that follow are left out after the barrier, or
run again if it is negative.

Threads stay inside `follow` for life, so that they never touch the interpreter. The words of the control block lie on
cache lines of their own; the offsets below are in bytes.
"""

from __future__ import annotations

from typing import Final

from numba import types

from mer.compute.kernels.ir import (
    atomic_add,
    atomic_load,
    atomic_load_i64,
    call_step,
    clock_ns,
    compare_exchange,
    load_i64,
    pause,
    store_i64,
    syscall6,
)
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import nogil_function
from mer.compute.kernels.system_calls import FUTEX, SCHED_YIELD, WRITE
from mer.compute.kernels.words import BARRIER, COUNTER, FUNCTION, ROW_WORDS

STATE: Final = 0  # int64: epoch << 32 | row << 12 | threads inside
STOP: Final = 64  # int32, non-zero ends the threads
SLEEPING: Final = 128  # int32, threads that sleep
PROGRAM: Final = 192  # int64 address of the rows
LENGTH: Final = 200  # int64 number of rows
FINISHED: Final = 208  # int64 eventfd to write to when a program has finished
ONE: Final = 216  # int64 1, what is written
N_THREADS: Final = 224  # int64 number of threads
TEAM: Final = 232  # int64: how many of the threads run programs; the others sleep
PROGRAMS: Final = 240  # int64: how many programs have been started
PHASE_NS: Final = 256  # int64 when the phase began
CROWDED_NS: Final = 264  # int64 until when the machine is taken to have more to run than cores
_START_ROOM = 272  # 16 bytes for the clock of `start`
LINES: Final = 320  # and a line for each thread:
ASLEEP: Final = 0  # int64, 1 while it sleeps; it sleeps on the first half
JOINED: Final = 8  # int64: the number of the last program that it took part in, from 1
ROOM: Final = 16  # 16 bytes for the clock
LINE_BYTES: Final = 64

MAX_THREADS: Final = 0xFFF
MAX_ROWS: Final = 0xFFFFE
IDLE: Final = 0xFFFFF

_ROW_BYTES = 8 * ROW_WORDS
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, process-private
_POLLS = 20  # between two looks at the clock
# How long a thread polls before it sleeps. Being woken takes some 50 us on a virtual machine, longer than most phases
# and than the time between two jobs; so those who wait for the next job poll 0.3 ms. Those who wait for a phase to end
# poll as long as it has taken so far: its last units should take no longer, unless whoever has them lacks a core, and
# then sleeping frees one.
_IDLE_NS, _PHASE_NS, _CROWDED_NS = 300_000, 50_000, 3_000
_LONG_YIELD_NS = 200_000  # if giving way takes longer, somebody else wants this core
_CROWDED_FOR_NS = 30_000_000


def control_bytes(n_threads: int) -> int:
    """Return the size of the control block of so many threads."""
    return LINES + LINE_BYTES * n_threads


@njit
def _epoch(state):  # type: ignore[no-untyped-def]
    return (state >> 32) & 0x7FFFFFFF


@njit
def _row(state):  # type: ignore[no-untyped-def]
    return (state >> 12) & 0xFFFFF


@njit
def _state(epoch, row, inside):  # type: ignore[no-untyped-def]
    return (epoch & 0x7FFFFFFF) << 32 | row << 12 | inside


@njit
def _wake(control):  # type: ignore[no-untyped-def]
    """Wake the threads of the team that sleep."""
    if atomic_load(control + SLEEPING) == 0:
        return
    for thread in range(load_i64(control + TEAM, 0)):
        asleep = control + LINES + LINE_BYTES * thread + ASLEEP
        if atomic_load(asleep) != 0:
            _get_up(control, asleep)


@njit
def _get_up(control, asleep):  # type: ignore[no-untyped-def]
    """Let a thread sleep no longer, whoever says so first."""
    if compare_exchange(asleep, 1, 0) != 0:
        atomic_add(control + SLEEPING, -1)
        syscall6(FUTEX, asleep, _WAKE, 1, 0, 0, 0)


@njit
def _sleep(control, line, epoch, thread):  # type: ignore[no-untyped-def]
    """Sleep until a phase begins after that of `epoch`, if this thread belongs to the team."""
    asleep = line + ASLEEP
    atomic_add(control + SLEEPING, 1)
    compare_exchange(asleep, 0, 1)
    # whoever begins a phase looks for sleepers afterwards, so that either sees the other
    changed = _epoch(atomic_load_i64(control + STATE)) != epoch and thread < atomic_load_i64(control + TEAM)
    if changed or atomic_load(control + STOP) != 0:
        _get_up(control, asleep)
    while atomic_load(asleep) != 0:
        syscall6(FUTEX, asleep, _WAIT, 1, 0, 0, 0)


@njit
def _wait(control, line, state, thread):  # type: ignore[no-untyped-def]
    """Return once another phase than that of `state` has begun, or sooner."""
    epoch, begun_ns = _epoch(state), clock_ns(line + ROOM)
    now_ns = begun_ns
    idle = _row(state) == IDLE
    if thread >= load_i64(control + TEAM, 0):
        patience_ns = 0
    elif now_ns < load_i64(control + CROWDED_NS, 0):
        patience_ns = _CROWDED_NS
    elif idle:
        patience_ns = _IDLE_NS
    else:
        patience_ns = max(_PHASE_NS, now_ns - load_i64(control + PHASE_NS, 0))
    while now_ns - begun_ns < patience_ns:
        for _ in range(_POLLS):
            if _epoch(atomic_load_i64(control + STATE)) != epoch:
                return
            pause()
        before_ns = clock_ns(line + ROOM)
        syscall6(SCHED_YIELD, 0, 0, 0, 0, 0, 0)
        now_ns = clock_ns(line + ROOM)
        if now_ns - before_ns > _LONG_YIELD_NS and not idle:
            store_i64(control + CROWDED_NS, now_ns + _CROWDED_FOR_NS)
            return
    _sleep(control, line, epoch, thread)


@njit
def _run_phase(rows, index, length, thread, n_threads):  # type: ignore[no-untyped-def]
    """Run the rows of the phase that begins with row `index`, and return the row behind its last."""
    while True:
        row = rows + index * _ROW_BYTES
        call_step(load_i64(row, FUNCTION), row, thread, n_threads)
        index += 1
        if index == length or load_i64(row, BARRIER) != 0:
            return index


@njit
def _following(rows, end, length):  # type: ignore[no-untyped-def]
    """Return the row that comes after a phase whose last row is before `end`, or `length`."""
    barrier = load_i64(rows + (end - 1) * _ROW_BYTES, BARRIER)
    if barrier > 1:
        end += load_i64(barrier, 0)
    return min(end, length)


@njit
def _prepare_phase(rows, index, length):  # type: ignore[no-untyped-def]
    """Let nothing be claimed of the phase that begins with row `index`."""
    while True:
        row = rows + index * _ROW_BYTES
        store_i64(row + 8 * COUNTER, 0)
        index += 1
        if index == length or load_i64(row, BARRIER) != 0:
            return


@njit
def _work(control, line, state, thread, n_threads):  # type: ignore[no-untyped-def]
    """Inside the phase of `state`, and in those that begin with this thread inside; return the epoch of the last."""
    rows, length = load_i64(control + PROGRAM, 0), load_i64(control + LENGTH, 0)
    epoch, index = _epoch(state), _row(state)
    while True:
        end = _run_phase(rows, index, length, thread, n_threads)
        while True:
            state = atomic_load_i64(control + STATE)
            if state & MAX_THREADS > 1:
                if compare_exchange(control + STATE, state, state - 1) != 0:
                    return epoch
                continue
            index = _following(rows, end, length)
            if index < length:
                _prepare_phase(rows, index, length)
                if compare_exchange(control + STATE, state, _state(epoch + 1, index, 1)) != 0:
                    store_i64(control + PHASE_NS, clock_ns(line + ROOM))
                    _wake(control)
                    epoch = _epoch(_state(epoch + 1, 0, 0))
                    break
            elif compare_exchange(control + STATE, state, _state(epoch + 1, IDLE, 0)) != 0:
                syscall6(WRITE, load_i64(control + FINISHED, 0), control + ONE, 8, 0, 0, 0)
                return _epoch(_state(epoch + 1, 0, 0))


@nogil_function(types.void(types.int64, types.int64, types.int64))
def follow(control, thread, n_threads):  # type: ignore[no-untyped-def]
    """Take part in every program that is started in `control`, as `thread`, until stopped."""
    line = control + LINES + LINE_BYTES * thread
    done = -1  # the epoch of the phase in which nothing is left for this thread
    while True:
        state = atomic_load_i64(control + STATE)
        if atomic_load(control + STOP) != 0:
            return
        if _row(state) == IDLE or _epoch(state) == done or thread >= load_i64(control + TEAM, 0):
            _wait(control, line, state, thread)
        elif compare_exchange(control + STATE, state, state + 1) != 0:
            store_i64(line + JOINED, load_i64(control + PROGRAMS, 0))
            done = _work(control, line, state, thread, n_threads)


@nogil_function(types.void(types.int64, types.int64))
def prepare(control, n_threads):  # type: ignore[no-untyped-def]
    """Make a zeroed control block one of so many threads that have nothing to do; all of them are the team."""
    store_i64(control + ONE, 1)
    store_i64(control + N_THREADS, n_threads)
    store_i64(control + TEAM, n_threads)
    store_i64(control + STATE, _state(0, IDLE, 0))


@nogil_function(types.void(types.int64, types.int64, types.int64, types.int64))
def start(control, rows, length, team):  # type: ignore[no-untyped-def]
    """Let the first `team` threads of `control`, which are idle, run a program; its eventfd tells when they have."""
    store_i64(control + PROGRAM, rows)
    store_i64(control + LENGTH, length)
    store_i64(control + TEAM, team)
    store_i64(control + PROGRAMS, load_i64(control + PROGRAMS, 0) + 1)
    _prepare_phase(rows, 0, length)
    store_i64(control + PHASE_NS, clock_ns(control + _START_ROOM))
    state = atomic_load_i64(control + STATE)
    compare_exchange(control + STATE, state, _state(_epoch(state) + 1, 0, 0))
    _wake(control)


@nogil_function(types.void(types.int64, types.int64))
def run_alone(rows, length):  # type: ignore[no-untyped-def]
    """Run a program on the calling thread."""
    index = 0
    while index < length:
        _prepare_phase(rows, index, length)
        index = _following(rows, _run_phase(rows, index, length, 0, 1), length)


@nogil_function(types.void(types.int64))
def stop(control):  # type: ignore[no-untyped-def]
    """End the threads of `control`; they must be idle."""
    atomic_add(control + STOP, 1)
    state = atomic_load_i64(control + STATE)
    compare_exchange(control + STATE, state, _state(_epoch(state) + 1, IDLE, 0))
    for thread in range(load_i64(control + N_THREADS, 0)):
        _get_up(control, control + LINES + LINE_BYTES * thread + ASLEEP)
