"""Whole engines in worlds drawn from seeds: everyone gets what they would get alone, and nothing is lost."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from unittest.mock import patch

import trio

from mer.compute.messages import Advance, Begin, Combine, Job, Operation, RunExperts, RunResident
from mer.testing.callers import Outcome, call, judge
from mer.testing.deterministic import run_seeded
from mer.testing.drawing import RandomSource, draw_features, draw_world
from mer.testing.hangs import fail_after
from mer.testing.invariants import check_now, watch
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.world import Feature, SimWorld

FOREVER_S = 1e6  # on the simulated clock; nothing here takes that long


@asynccontextmanager
async def open_world(world: SimWorld) -> AsyncIterator[SimEngine]:
    """Run the engine of a world during the block; its faults and its callers are left to the caller."""
    with patch("mer.engine.CHANNEL_EVENTS", world.channel_events):
        async with open_sim_engine(
            model=world.model,
            n_slots=world.n_slots,
            policy=world.policy,
            prefetch=world.prefetch,
            prefix_reuse=world.prefix_reuse,
            batch_tokens=world.batch_tokens,
            max_sequences=world.max_sequences,
            max_waiting=world.max_waiting,
            context=world.context,
            kv_blocks=world.kv_blocks,
            profile=world.profile,
            mirrors=world.mirrors,
            io_threads=world.io_threads,
            chunk_bytes=world.chunk_bytes,
            read_deadline_s=world.read_deadline_s,
            job_reads=world.job_reads,
            cost=world.cost,
            failures=world.worker_faults.failing_jobs,
            seed=world.seed,
        ) as sim:
            yield sim


async def run_world(world: SimWorld) -> str:
    """Let the callers of a world come, judge what each of them gets, and check that nothing is left of them.

    The invariants of the engine are checked after every step of every task. To be run on a simulated clock, best by
    `run_seeded`.

    Returns:
        A digest of all that happened: every job, read and event, in order and with its time.

    Raises:
        AssertionError: what must hold does not.
    """
    try:
        with fail_after(FOREVER_S):
            async with open_world(world) as sim:
                with watch(lambda: check_now(sim)):
                    return await _run(world, sim)
    except trio.TooSlowError as error:
        raise AssertionError(str(error)) from None


async def _run(world: SimWorld, sim: SimEngine) -> str:
    unreadable, doubtful = _break(world, sim)
    outcomes = [Outcome() for _ in world.requests]

    async def pause(at_s: float, for_s: float) -> None:
        await trio.sleep(at_s)
        sim.disk.freeze()
        await trio.sleep(for_s)
        sim.disk.thaw()

    async def close(after_s: float) -> None:
        await trio.sleep(after_s)
        sim.engine.close()

    async def desert(at_s: float) -> None:
        await trio.sleep(at_s)
        for outcome in outcomes:
            if outcome.scope is not None:
                outcome.scope.cancel()

    async with trio.open_nursery() as nursery:
        for at_s, for_s in world.freezes:
            nursery.start_soon(pause, at_s, for_s)
        if world.closed_after_s is not None:
            nursery.start_soon(close, world.closed_after_s)
        if world.deserted_at_s is not None:
            nursery.start_soon(desert, world.deserted_at_s)
        for request, outcome in zip(world.requests, outcomes, strict=True):
            nursery.start_soon(call, sim, request, outcome)
    for request, outcome in zip(world.requests, outcomes, strict=True):
        judge(sim, world, request, outcome, unreadable=unreadable, doubtful=doubtful)
    sim.disk.heal()
    sim.disk.let_return()
    await sim.check_quiet()
    return digest(sim, outcomes)


def _break(world: SimWorld, sim: SimEngine) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Let the reads of a world fail; return the experts that can never be read, and those that may fail to be."""
    every_copy = set(range(1 + len(world.mirrors)))
    lasting: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # copies of which a read fails always
    passing: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # or some times
    for fault in world.read_faults:
        hit = sim.break_expert(
            fault.layer, fault.expert, part=fault.part, number=fault.errno, times=fault.times, copy=fault.copy
        )
        copies = every_copy if fault.copy is None else {fault.copy}
        for key in hit:
            passing[key] |= copies if fault.errno is not None else every_copy  # nobody looks elsewhere while one hangs
            if fault.times is None and fault.copy is None:
                lasting[key] |= copies
    return (
        {key for key, copies in lasting.items() if copies == every_copy},
        {key for key, copies in passing.items() if copies == every_copy},
    )


def digest(sim: SimEngine, outcomes: Collection[Outcome] = ()) -> str:
    """Return a hash of what an engine has done: every job, read and event so far, in order and with its time."""
    trace = hashlib.sha256()
    for begun_s, job in sim.worker.log:
        trace.update(f"{begun_s} {_job(job)}\n".encode())
    for read in sim.disk.chunk_log:
        trace.update(f"{read}\n".encode())
    for outcome in outcomes:
        trace.update(f"{outcome.log}\n".encode())
    trace.update(_state(sim).encode())
    return trace.hexdigest()[:16]


def _state(sim: SimEngine) -> str:
    """Return the counters of every actor."""
    actors = (sim.scheduler, sim.cache, sim.pool, sim.fetcher, sim.kv)
    return "; ".join(str(actor.statistics()) for actor in actors)


def _job(job: Job) -> str:
    def text(operation: Operation) -> str:
        match operation:
            case Begin(batch):
                return f"begin {batch.tokens.tolist()} at {batch.positions.tolist()} in {batch.tables.tolist()}"
            case Advance(to):
                return f"advance to {to}"
            case RunExperts(layer, experts):
                return f"run {layer}: {[(loaded.expert, loaded.raw) for loaded in experts]}"
            case RunResident(layer):
                return f"go on from {layer}"
            case Combine(layer):
                return f"combine {layer}"
            case _:
                return repr(operation)

    return ", ".join(map(text, job.operations))


def make_world(seed: int, features: Collection[Feature] = tuple(Feature)) -> SimWorld:
    """Return the world of a seed: which of the features it has, its configuration, its faults, and who comes."""
    source = RandomSource(seed)
    return draw_world(source, draw_features(source, features))


def run_seed(seed: int) -> str:
    """Run the world of a seed, with an order of tasks that the seed draws too, and return the digest of its trace.

    The same seed gives the same digest in every process and on every machine.

    Raises:
        AssertionError: what must hold does not; anything else that is raised is a bug as well.
    """
    return run_seeded(run_world, make_world(seed), seed=seed)
