"""Report of the waits in a run of trio with simulated engines: each waiting task, and what would wake it."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from mer.io.pool import SlotState
from mer.sched.sequence import Sequence, Status

if TYPE_CHECKING:
    from mer.testing.simengine import SimEngine

MOST_TASKS = 20  # that a report lists
_MER = f"{Path(__file__).parents[1]}/"
_MACHINERY = (  # that runs tasks and says nothing of what they wait for
    f"{Path(trio.__file__).parent}/",
    f"{_MER}testing/deterministic.py",
    f"{_MER}testing/machines.py",
)

open_engines: trio.lowlevel.RunVar[tuple[SimEngine, ...]] = trio.lowlevel.RunVar("open_engines", default=())
"""The simulated engines of this run of trio that are open."""


def report() -> str:
    """Return who waits for what, one line each: reads, fetches, slots and sequences of open engines, then all tasks."""
    lines = [line for sim in open_engines.get() for line in waits(sim)]
    return "\n".join(["", *(f"  {line}" for line in [*lines, *_tasks()])])


def waits(sim: SimEngine) -> Iterator[str]:
    """Yield what in an engine waits and for what, with the call that would let it go on."""
    if sim.disk.frozen:
        yield "the disk is frozen: sim.disk.thaw() lets its reads end"
    for copy, file, start, length, since_s in sim.disk.hanging:
        names = ", ".join(sim.parts_at(file, start, start + length)) or "nothing that is used"
        of_copy = f" on copy {copy}" if sim.disk.mirrors else ""
        yield (
            f"a read of {length} bytes at {start} of {sim.disk.paths[file]}{of_copy} hangs since {since_s:g} s, for "
            f"{names}: sim.disk.let_return() ends it, and sim.disk.heal() before that spares later reads"
        )
    if sim.worker.frozen is not None and not sim.worker.frozen.is_set():
        yield "the worker is frozen: sim.worker.frozen.set() lets its jobs go on"
    for fetch in sim.fetcher.fetches:
        parts = sim.experts.experts[fetch.layer][fetch.expert].parts
        names = ", ".join(parts[part].projection for part in sorted(fetch.missing))
        yield (
            f"the fetch of expert {fetch.expert} of layer {fetch.layer} ({fetch.priority.name.lower()}) into "
            f"slot {fetch.slot} waits for {names}"
        )
    for slot, state in enumerate(sim.pool.states):
        if state is SlotState.QUARANTINED:
            yield f"slot {slot} waits for a read that was given up and has not returned"
    pool, kv = sim.pool.statistics(), sim.kv.statistics()
    if sum(pool.waiting):
        yield f"{sum(pool.waiting)} requests wait for a slot: of {pool.n_slots}, {pool.free} are free"
    for sequence in sim.scheduler.present:
        yield f"{_name(sequence)} {_reason(sequence, f'{kv.available} of {kv.n_blocks} KV blocks are to be had')}"


def _name(sequence: Sequence) -> str:
    begin = ", ".join(map(str, sequence.prompt[:4])) + (", ..." if len(sequence.prompt) > 4 else "")
    return f"the sequence with the prompt ({begin}), {len(sequence.tokens)} of {sequence.max_tokens} tokens generated,"


def _reason(sequence: Sequence, blocks: str) -> str:
    """Return what a sequence waits for, as the end of a sentence."""
    if sequence.cancelled:
        return "is cancelled and waits for the running job to end"
    if sequence.status is Status.WAITING:
        return f"waits for a place in a batch; {blocks}"
    if sequence.status is Status.PREEMPTED:
        return f"is preempted until its caller has read half of its events; {blocks}"
    if not sequence.has_room:
        return "waits for its caller, who does not read: receive its events, or leave the block of its stream"
    return f"is in {sequence.status.value} and waits for its experts or for a job"


def _tasks() -> Iterator[str]:
    """Yield where every task waits but those of trio: in whose code, and what that has called."""
    found = (line for task in _all_tasks() if (line := _place(task)) is not None)
    yield from islice(found, MOST_TASKS)
    n_more = sum(1 for _ in found)
    if n_more:
        yield f"and {n_more} further tasks"


def _all_tasks() -> Iterator[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    waiting = [] if root is None else [root]
    while waiting:
        task = waiting.pop()
        yield task
        waiting += [child for nursery in task.child_nurseries for child in nursery.child_tasks]


def _place(task: trio.lowlevel.Task) -> str | None:
    """Return where a task waits: its innermost line outside of `mer` and trio, and its innermost in `mer`."""
    own: tuple[str, int] | None = None
    inner: tuple[str, int] | None = None
    for frame, line in task.iter_await_frames():
        name = frame.f_code.co_filename
        if not name.startswith(_MACHINERY) and "/greenback/" not in name:
            inner = name, line
            if not name.startswith(_MER):
                own = inner
    if inner is None:
        return None
    places = " -> ".join(dict.fromkeys(f"{Path(name).name}:{line}" for name, line in (own or inner, inner)))
    return f"task {task.name} waits at {places}: {linecache.getline(*(own or inner)).strip()}"
