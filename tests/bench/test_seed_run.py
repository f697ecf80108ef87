"""The seed's way of running a stream: right bytes at the right time whatever the disk does, and exact counts."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.bench.datafile import DataFile, DataPlan, make_data, open_data, plan_data
from mer.bench.geometry import parse_geometry
from mer.bench.seed_run import SeedRun, seed_buffers
from mer.bench.stream import SEED, Task, count
from mer.bench.tally import Tally
from mer.bench.workload import Workload
from mer.compute.messages import Begin, Done, Operation, RunExperts
from mer.errors import ReadError
from mer.io.arena import Arena
from mer.io.files import IoMode
from mer.io.reader import ReadOperation
from mer.sched.simulate import Event

N_LAYERS, N_EXPERTS = 2, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFile:
    plan = plan_data(tmp_path_factory.mktemp("data"), parse_geometry("32x32", "q4_0"), N_LAYERS, N_EXPERTS)
    make_data(plan, lambda done, total: None)
    opened = open_data(plan)
    assert opened is not None
    return opened


def workload_of(events: Sequence[Event]) -> Workload:
    return Workload(name="test", n_layers=N_LAYERS, n_experts=N_EXPERTS, events=tuple(events))


class ScrambledDisk:
    """A reader whose operations land in any order, one whenever nobody can go on without; each leaves its expert's
    number in the buffer.
    """

    def __init__(self, data: DataFile, seed: int) -> None:
        self.modes = (IoMode(True, 4096, "simulated"),)
        self.started = trio.Event()
        self.reads: list[int] = []  # expert in the flat list
        self.fail_from: int | None = None  # number of the first read that fails
        self._random = random.Random(seed)
        self._operations: list[ReadOperation] = []
        self._at = {
            data.extent(layer, expert)[0]: layer * N_EXPERTS + expert
            for layer in range(N_LAYERS)
            for expert in range(N_EXPERTS)
        }

    def start(self, operation: ReadOperation) -> None:
        operation.buffer[:] = 255
        self.reads.append(self._at[operation.start])
        self._operations.append(operation)
        self.started.set()

    async def run(self) -> None:
        while True:
            await self.started.wait()
            await trio.testing.wait_all_tasks_blocked()
            operation = self._operations.pop(self._random.randrange(len(self._operations)))
            if not self._operations:
                self.started = trio.Event()
            if self.fail_from is not None and len(self.reads) > self.fail_from:
                operation.error = ReadError("disk", operation.start, operation.needed, "broken")
            operation.buffer[:] = self._at[operation.start]
            operation.on_landed(operation)


@attrs.define
class CheckingLink:
    """A worker that computes nothing, and looks whether the experts it is given lie where it is told."""

    data: DataFile
    ran: list[Event] = attrs.Factory(list)
    begun: list[int] = attrs.Factory(list)

    async def run(self, *operations: Operation) -> Done:
        await trio.lowlevel.checkpoint()
        experts = []
        for operation in operations:
            if isinstance(operation, Begin):
                self.begun.append(int(operation.batch.tokens[0]))
            if isinstance(operation, RunExperts):
                (loaded,) = operation.experts
                experts.append((operation.layer, loaded.expert))
                parts = self.data.experts.experts[operation.layer][loaded.expert].parts
                for part, address in zip(parts, loaded.addresses, strict=True):
                    number = operation.layer * N_EXPERTS + loaded.expert
                    assert ctypes.string_at(address, part.n_bytes) == bytes([number]) * part.n_bytes
        if experts:
            self.ran.append((experts[0][0], tuple(expert for _, expert in experts)))
        return Done(logits=np.zeros((1, 32), np.float32), compute_s=0.5)


async def run_scrambled(
    data: DataFile, workload: Workload, n_slots: int, seed: int, *, fail_from: int | None = None
) -> tuple[ScrambledDisk, CheckingLink, Tally]:
    disk, link, tally = ScrambledDisk(data, seed), CheckingLink(data), Tally()
    disk.fail_from = fail_from
    arena = Arena([seed_buffers(workload, n_slots)], [data.plan.stride_bytes])
    parts: Any = {"reader": disk, "link": link}
    run = SeedRun(workload=workload, data=data, n_slots=n_slots, arena=arena, tally=tally, **parts)
    failure: ReadError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run)
        try:
            await run.run()
        except ReadError as error:
            failure = error
        nursery.cancel_scope.cancel()
    arena.close()
    if failure is not None:
        raise failure
    return disk, link, tally


experts_of_an_iteration = st.lists(st.integers(0, N_EXPERTS - 1), min_size=1, max_size=4, unique=True).map(tuple)


@given(
    events=st.lists(st.tuples(st.integers(0, N_LAYERS - 1), experts_of_an_iteration), min_size=1, max_size=25),
    n_slots=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_whatever_the_disk_does(data: DataFile, events: list[Event], n_slots: int, seed: int) -> None:
    """Every expert is where it should be when it runs, and the counts are those of the cache alone."""
    workload = workload_of(events)
    disk, link, tally = trio.run(run_scrambled, data, workload, n_slots, seed)
    assert link.ran == events
    assert link.begun == list(range(len(events)))
    expected = count(Task(workload=workload, data=data.plan, n_slots=n_slots, threads=1), SEED)
    assert counts(tally) == counts(expected)
    assert len(disk.reads) == len(tally.read_s) == tally.reads
    assert tally.bytes_transferred == tally.reads * data.plan.stride_bytes
    assert tally.compute_s == [0.5] * len(events)


def counts(tally: Tally) -> list[int]:
    return [
        getattr(tally, name)
        for name in ("iterations", "lookups", "hits", "reads", "prefetches", "prefetches_used", "bytes_read")
    ]


@pytest.mark.parametrize("fail_from", range(6))
async def test_a_failed_read_ends_the_run_and_keeps_the_tally_whole(data: DataFile, fail_from: int) -> None:
    events = [(0, (at % N_EXPERTS, (at + 2) % N_EXPERTS)) for at in range(12)]
    workload = workload_of(events)
    with pytest.raises(ReadError, match="broken"):
        await run_scrambled(data, workload, 3, 1, fail_from=fail_from)


async def test_a_cancelled_run_has_counted_whole_iterations(data: DataFile) -> None:
    events = [(0, (at % N_EXPERTS, (at + 2) % N_EXPERTS)) for at in range(12)]
    workload = workload_of(events)
    disk, link, tally = ScrambledDisk(data, 0), CheckingLink(data), Tally()
    arena = Arena([seed_buffers(workload, 3)], [data.plan.stride_bytes])
    with trio.CancelScope() as scope:
        tally.on_iteration = lambda done: scope.cancel() if done == 5 else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.run)
            parts: Any = {"reader": disk, "link": link}
            await SeedRun(workload=workload, data=data, n_slots=3, arena=arena, tally=tally, **parts).run()
    assert tally.iterations == 5
    assert tally.lookups == 10
    shorter = Task(workload=workload_of(events[:6]), data=data.plan, n_slots=3, threads=1)
    expected = count(shorter, SEED)  # one iteration more, so that the fifth prefetches
    assert tally.hits + (tally.reads - tally.prefetches) == tally.lookups
    assert tally.prefetches == expected.prefetches
    assert tally.bytes_read == tally.reads * data.plan.geometry.expert_bytes


def test_the_plan_of_a_preset_reads_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """Experts of the presets fill whole pages: no byte is read in vain, and the buffers are as large as they."""
    for text, weights in (("mixtral", "q4_0"), ("mixtral/16", "q4_0"), ("mixtral/16", "f32"), ("qwen3-30b", "q4_0")):
        plan: DataPlan = plan_data(tmp_path, parse_geometry(text, weights), 1, 256)
        assert plan.stride_bytes == plan.geometry.expert_bytes


def test_buffers() -> None:
    flat = Workload(name="x", n_layers=1, n_experts=9, events=((0, (1, 2)), (0, (3, 4))))
    assert seed_buffers(flat, 16) == 18
    assert seed_buffers(flat, 4) == 6
