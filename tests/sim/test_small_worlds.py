"""Decisions that cost only time, where they are used: small worlds with the exact reads and jobs that they lead to."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from mer.io.pool import Priority
from mer.io.reader import ReadOperation
from mer.testing import DiskProfile, SimDisk, open_sim_disk
from tests.sim.worlds import READ_S, Read, World, ahead, demand, guess, open_world

# --- reads of a generation: the world, the tokens of its prompt, those to generate, the reads ---

THREE_LAYERS = {"n_layers": 3, "n_experts": 2, "top_k": 2, "n_slots": 4, "batch_tokens": 4}
"""Every batch needs every expert, and four of six have a slot."""

READS: dict[str, tuple[dict[str, int], int, int, list[Read]]] = {
    "layers that need every expert are read ahead, and nothing after the last one of the prompt": (
        THREE_LAYERS, 4, 1, demand(0, 0, 1) + ahead(1, 0, 1) + ahead(2, 0, 1),
    ),
    "after the last layer the first is read ahead for the rest of the prompt": (
        THREE_LAYERS, 8, 1,
        demand(0, 0, 1) + ahead(1, 0, 1) + ahead(2, 0, 1) + ahead(0, 0, 1) + ahead(1, 0, 1) + ahead(2, 0),
    ),
    "for the next token the first layer is read when it asks": (
        THREE_LAYERS, 4, 2,
        demand(0, 0, 1) + ahead(1, 0, 1) + ahead(2, 0, 1) + demand(0, 0, 1) + ahead(1, 0) + ahead(2, 0, 1),
    ),
    "a batch that leaves out one expert of three makes nothing certain": (
        THREE_LAYERS | {"n_experts": 3}, 4, 1, demand(0, 0, 1) + demand(1, 0, 1) + demand(2, 0, 1),
    ),
    "what has a slot is read once": (
        THREE_LAYERS | {"n_slots": 6}, 8, 3, demand(0, 0, 1) + ahead(1, 0, 1) + ahead(2, 0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("decision", READS)
async def test_reads(autojump_clock: MockClock, decision: str) -> None:
    shape, n_prompt, n_tokens, want = READS[decision]
    async with open_world(**shape) as world:
        await world.ask(n_prompt, n_tokens)
        assert world.reads == want
        layers = shape["n_layers"] * (math.ceil(n_prompt / shape["batch_tokens"]) + n_tokens - 1)
        assert world.sim.cache.statistics().lookups == shape["top_k"] * layers
        counts = world.sim.store.speculation.statistics(Priority.READ_AHEAD)
        assert counts.issued == counts.used + counts.promoted == sum(kind == "ahead" for kind, _, _ in want)


# --- jobs of a layer whose experts are all missing and land one after the other ---

FOUR_EXPERTS: dict[str, int] = {"n_layers": 1, "n_experts": 4, "top_k": 4, "batch_tokens": 4}
MUCH, NOTHING = 1 << 30, 0  # what is worth a job of its own

JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "while others are being read, what has landed waits for them": (
        {"worth_bytes": MUCH}, ["0 1 2 3"],
    ),
    "and while some wait for slots too, until all the others do": (
        {"worth_bytes": MUCH, "n_slots": 2}, ["0 1", "2 3"],
    ),
    "the last wave is what is left": (
        {"worth_bytes": MUCH, "n_slots": 3}, ["0 1 2", "3"],
    ),
    "a network that the experts share fills the wait for the first of them": (
        {"worth_bytes": MUCH, "shared": frozenset({0})}, ["shared", "0 1 2 3"],
    ),
    "what is worth it is computed at once, in stages as it lands": (
        {"worth_bytes": NOTHING},
        ["0 inner", "0 outer", "1 inner", "1 outer", "2 inner", "2 outer", "3 inner", "3 outer"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("decision", JOBS)
async def test_jobs(autojump_clock: MockClock, decision: str) -> None:
    """Whoever wakes the layer meanwhile, such as a caller that comes."""
    settings, want = JOBS[decision]

    async def keep_awake(world: World) -> None:
        while True:
            await trio.sleep(READ_S / 10)
            world.sim.scheduler.wake()

    async with open_world(**FOUR_EXPERTS, **settings) as world, trio.open_nursery() as nursery:
        nursery.start_soon(keep_awake, world)
        done = await world.sim.engine.generate((2, 3), max_tokens=1, ignore_eos=True)
        assert done.tokens == world.sim.expected((2, 3), 1)[0]
        nursery.cancel_scope.cancel()
        assert world.jobs == want
        assert world.reads == demand(0, 0, 1, 2, 3)


async def test_a_shared_network_takes_no_job_of_its_own_where_nothing_is_missing(autojump_clock: MockClock) -> None:
    """With all experts in memory it runs with the job that adds their outputs, whose result `ask` has checked."""
    async with open_world(**FOUR_EXPERTS, shared=frozenset({0}), worth_bytes=MUCH) as world:
        await world.ask(8)  # two batches
        assert world.jobs == ["shared", "0 1 2 3", "0 1 2 3"]


# --- guesses ---


@pytest.mark.parametrize(
    ("landed_s", "want"),
    [(0.2, guess(1, 0, 1, 2, 3, 4, 5)), (1.2, guess(1, 0, 1, 2, 3))],
    ids=["in time for two more", "too late for any more"],
)
async def test_a_guess_that_would_come_late_is_not_read(
    autojump_clock: MockClock, landed_s: float, want: list[Read]
) -> None:
    """Layers follow each other after a second; four guesses are read at once, and more when these have landed."""
    async with open_world(n_layers=2, n_experts=8, top_k=6, prefetch="auto") as world:
        prefetcher, speculation = world.sim.prefetcher, world.sim.store.speculation
        assert prefetcher is not None
        for _ in range(200):
            prefetcher.begin_pass()
            for layer in (0, 1):
                prefetcher.routed(layer, range(6), None, guess=False)
                speculation.guess()
                await trio.sleep(1.0)
            prefetcher.end_pass(comparable=False)
        assert world.reads == []
        world.sim.disk.freeze()
        prefetcher.begin_pass()
        prefetcher.routed(0, range(6), None, guess=True)
        speculation.guess()
        assert world.reads == guess(1, 0, 1, 2, 3)
        await trio.sleep(landed_s)
        world.sim.disk.thaw()
        await trio.sleep(0.1)
        assert world.reads == want


@pytest.mark.parametrize(("keeps_all", "want"), [(False, guess(1, 1)), (True, [])], ids=["may leave", "must stay"])
async def test_a_guess_is_asked_for_only_if_an_expert_may_leave_for_it(
    autojump_clock: MockClock, keeps_all: bool, want: list[Read]
) -> None:
    """While a job may use any expert that is resident, a guess would wait in line, and come after its layer."""
    async with open_world(n_layers=2, n_experts=3, top_k=1, n_slots=3, prefetch="markov") as world:
        prefetcher, store = world.sim.prefetcher, world.sim.store
        assert prefetcher is not None
        for layer in (0, 1) * 40:
            prefetcher.routed(layer, [layer], None, guess=False)
        for expert in range(3):  # all slots are taken
            _, claims = store.claims.claim(0, [expert])
            await trio.sleep(1.0)
            store.residents.unpin(0, [store.claims.take(claim) for claim in claims], used=False)
        world.reads.clear()
        store.residents.keeps_all = keeps_all
        prefetcher.routed(0, [0], None, guess=True)
        store.speculation.guess()
        assert world.reads == want
        assert sum(world.sim.pool.statistics().waiting) == 0


# --- reads of the disk ---


async def test_only_the_first_read_into_a_slot_meets_memory_without_pages(autojump_clock: MockClock) -> None:
    async with open_world(**THREE_LAYERS) as world:
        await world.ask(4, 3)
        assert len(world.untouched) == 3 * len(world.reads) > 3 * 4
        assert world.untouched == [True] * (3 * 4) + [False] * (3 * (len(world.reads) - 4))


PAGE = 4096

LAST_CHUNK: dict[str, tuple[float, tuple[int, int], float]] = {
    "of two equal drives the first to ask takes the last chunk": (1.0, (0, 0), 1.0),
    "a drive takes the last chunk that another would have read no sooner": (1.5, (0, 0), 1.0),
    "a slow drive leaves the last chunk to the fast one": (1 / 3, (1, 0), 1 / 3),
}
"""How long the mirror takes for a chunk; which copy reads the last one, from which byte on; how long that takes."""


@pytest.mark.parametrize("decision", LAST_CHUNK)
async def test_the_last_chunk(autojump_clock: MockClock, decision: str) -> None:
    """Two drives that see two reads at once, and a read of one chunk after one of four."""
    mirror_s, want, took_s = LAST_CHUNK[decision]

    def drive(latency_s: float) -> DiskProfile:
        return DiskProfile(latency_s=latency_s, jitter=0.0, bytes_per_s=1e15)

    async with open_sim_disk(
        [1 << 20], profile=drive(1.0), mirrors=[drive(mirror_s)], n_threads=2, chunk_bytes=PAGE
    ) as disk:
        await read(disk, 4)
        before = len(disk.chunk_log)
        began_s = trio.current_time()
        await read(disk, 1)
        assert [(copy, start) for copy, _, start, _ in disk.chunk_log[before:]] == [want]
        assert trio.current_time() - began_s == pytest.approx(took_s)


async def read(disk: SimDisk, n_chunks: int) -> None:
    """Read the first chunks of a file."""
    landed = trio.Event()
    buffer = np.frombuffer(mmap.mmap(-1, n_chunks * PAGE), np.uint8)  # aligned to pages
    disk.start(
        ReadOperation(
            file=0,
            start=0,
            length=len(buffer),
            needed=len(buffer),
            buffer=buffer,
            on_landed=lambda _: landed.set(),
        )
    )
    await landed.wait()
    assert (buffer == disk.content(0, 0, len(buffer))).all()
