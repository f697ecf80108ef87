"""A fetcher with everything round it, on a simulated disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from mer.io.arena import Arena
from mer.io.extents import PROJECTIONS, ExpertExtents, ExpertMap, ExpertPart, SlotClasses
from mer.io.fetch import Fetch
from mer.io.fetcher import Fetcher
from mer.io.ggml import GGMLType
from mer.io.pool import BufferPool, Priority, SlotState, Ticket
from mer.io.reader import Reader
from mer.testing.simdisk import SimDisk, content, open_sim_disk

LAYERS, EXPERTS = 2, 6
FREE, FILLING, READY, PINNED, QUARANTINED = SlotState
DEMAND, READ_AHEAD, PREFETCH = Priority


def make_experts(seed: int = 0, n_matrices: int = 3) -> tuple[ExpertMap, list[int]]:
    """Return experts of uneven sizes at odd offsets of two files, and the files' sizes: they end with the last part."""
    rng = random.Random(seed)
    ends = [rng.randrange(5000), rng.randrange(5000)]
    layers = []
    for layer in range(LAYERS):
        experts = []
        for expert in range(EXPERTS):
            parts = []
            for projection in PROJECTIONS[-n_matrices:]:
                file, n_bytes = rng.randrange(2), rng.randrange(1, 20_000)
                parts.append(ExpertPart(projection, GGMLType.Q4_0, 16, 1, file, ends[file], n_bytes))
                ends[file] += n_bytes + rng.choice([0, 0, 1, 4096])
            experts.append(ExpertExtents(layer, expert, tuple(parts)))
        layers.append(tuple(experts))
    used = [0, 0]
    for extents in (extents for row in layers for extents in row):
        for part in extents.parts:
            used[part.file] = max(used[part.file], part.offset + part.n_bytes)
    return ExpertMap(tuple(layers)), used


def big_experts(n_bytes: int) -> tuple[ExpertMap, list[int]]:
    """Return one layer of experts, each in a file of its own, with matrices of `n_bytes`, a multiple of 4096."""
    row = []
    for expert in range(EXPERTS):
        gate, up, down = (
            ExpertPart(name, GGMLType.Q4_0, 16, 1, expert, index * n_bytes, n_bytes)
            for index, name in enumerate(PROJECTIONS)
        )
        row.append(ExpertExtents(0, expert, (gate, up, down)))
    return ExpertMap((tuple(row),)), [3 * n_bytes] * EXPERTS


def hull_bytes(extents: ExpertExtents) -> int:
    """Bytes of the pages that an expert touches, counted page by page."""
    return 4096 * sum(
        len(range(part.offset // 4096, (part.offset + part.n_bytes - 1) // 4096 + 1)) for part in extents.parts
    )


def one_size(experts: ExpertMap) -> SlotClasses:
    """Return one class of slots for all experts, however much they differ."""
    needs = [e.layout(4096).n_bytes for row in experts.experts for e in row]
    kinds = tuple((0,) * len(row) for row in experts.experts)
    return SlotClasses(
        alignment=4096, slot_bytes=(max(needs),), n_experts=(len(needs),), needed_bytes=(sum(needs),), kinds=kinds
    )


def lease(pool: BufferPool) -> int | None:
    """Take a free slot, if there is one."""
    ticket = Ticket((0, 0), 0, DEMAND, lambda _: None)
    pool.request(ticket)
    if ticket.slot is None:
        pool.withdraw(ticket)
    return ticket.slot


async def wait_for_slot(pool: BufferPool) -> int:
    """Take a slot, waiting in line until there is one; nothing is lost if cancelled."""
    granted = trio.Event()
    ticket = Ticket((0, 0), 0, DEMAND, lambda _: granted.set())
    pool.request(ticket)
    try:
        await granted.wait()
    except BaseException:
        if ticket.slot is None:
            pool.withdraw(ticket)
        else:
            pool.release(ticket.slot)
        raise
    assert ticket.slot is not None
    return ticket.slot


@attrs.define(eq=False)
class Rig:
    """A fetcher with everything round it."""

    pool: BufferPool
    arena: Arena
    experts: ExpertMap
    fetcher: Fetcher
    inner: list[Fetch] = attrs.Factory(list)  # of which gate and up have landed alone
    done: list[Fetch] = attrs.Factory(list)  # that have landed or failed
    done_s: list[float] = attrs.Factory(list)  # when

    def inner_landed(self, fetch: Fetch) -> None:
        self.inner.append(fetch)

    def landed(self, fetch: Fetch) -> None:
        self.done.append(fetch)
        self.done_s.append(trio.current_time())

    def start(self, layer: int, expert: int, priority: Priority = DEMAND) -> Fetch:
        slot = lease(self.pool)
        assert slot is not None
        return self.fetcher.start(layer, expert, slot, priority, self)

    def part(self, layer: int, expert: int, index: int) -> ExpertPart:
        return self.experts.experts[layer][expert].parts[index]

    def check_bytes(self, fetch: Fetch, parts: Sequence[int] | None = None) -> None:
        base, view = self.arena.address(fetch.slot), self.arena.view(fetch.slot)
        for index in range(self.experts.n_matrices) if parts is None else parts:
            part = self.part(fetch.layer, fetch.expert, index)
            begin = fetch.addresses[index] - base
            assert 0 <= begin <= len(view) - part.n_bytes
            assert (view[begin : begin + part.n_bytes] == content(0, part.file, part.offset, part.n_bytes)).all()

    def check_conservation(self) -> None:
        s, r = self.fetcher.statistics(), self.pool.statistics()
        assert s.started == s.landed + s.failed + s.abandoned + s.in_flight
        assert s.reads_started == s.reads_landed + s.reads_failed + s.reads_cancelled + s.reads_in_flight
        assert s.reads_started == self.experts.n_matrices * s.started + s.retried
        for each in s.by_priority:
            assert min(attrs.astuple(each)) >= 0
            arrived, left = each.started + each.promoted_in, each.promoted_out + each.landed + each.failed
            assert arrived == left + each.abandoned + each.in_flight
        assert s.in_flight == sum(each.in_flight for each in s.by_priority)
        assert s.promoted == sum(each.promoted_in for each in s.by_priority)
        assert r.free + r.filling + r.ready + r.pinned + r.quarantined == r.n_slots


def make_rig(reader: Reader, experts: ExpertMap, n_slots: int = 8, **settings: Any) -> Rig:
    classes = one_size(experts)
    pool, arena = BufferPool((n_slots,)), Arena((n_slots,), classes.slot_bytes)
    return Rig(pool, arena, experts, Fetcher(pool, arena, classes, experts, reader, **settings))


@asynccontextmanager
async def open_rig(
    n_slots: int = 8,
    *,
    seed: int = 0,
    experts: tuple[ExpertMap, list[int]] | None = None,
    read_deadline_s: float = 30.0,
    **disk_settings: Any,
) -> AsyncIterator[tuple[Rig, SimDisk]]:
    """Run a fetcher on a simulated disk during the block."""
    expert_map, sizes = experts or make_experts(seed)
    with trio.fail_after(100_000):  # what waits for ever is to be seen
        async with open_sim_disk(sizes, **disk_settings) as disk, trio.open_nursery() as nursery:
            rig = make_rig(disk, expert_map, n_slots, read_deadline_s=read_deadline_s)
            nursery.start_soon(rig.fetcher.run)
            yield rig, disk
            nursery.cancel_scope.cancel()
