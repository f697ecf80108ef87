"""The production engine on a simulated disk and a simulated worker, all of it on trio's clock."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar, TypeVarTuple, cast

import attrs
import trio

from mer.compute.state import Paged, StateLayout
from mer.config import PrefetchMode, Sampling
from mer.engine import Engine
from mer.errors import TemplateError
from mer.home import Home
from mer.io.arena import Arena
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS
from mer.io.extents import PROJECTIONS, ExpertExtents, ExpertMap, ExpertPart
from mer.io.fetcher import DEFAULT_READ_DEADLINE_S, Fetcher
from mer.io.ggml import GGMLType
from mer.io.pool import BufferPool, Priority
from mer.opening.actors import Guesses, Lending, open_actors, open_expert_actors
from mer.sched.cache import ExpertCache
from mer.sched.draws import INLINE_LOGITS, Draws
from mer.sched.fingerprint import FINGERPRINT_BYTES
from mer.sched.heat import HeatCounter, HeatProfile
from mer.sched.kv import KVBlocks
from mer.sched.kv_file import KVLayout
from mer.sched.policies.registry import DEFAULT_POLICY, CacheShape, make_policy
from mer.sched.prefetch import Prefetcher
from mer.sched.sampling import Sampler
from mer.sched.scheduler import Scheduler
from mer.sched.store import ExpertStore
from mer.testing.simdisk import DiskProfile, SimDisk, open_sim_disk
from mer.testing.simworker import JobCost, SimModel, SimWorker, greedy
from mer.testing.waits import open_engines, report

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

END_TOKEN = 1
THREAD_S = 1e-3  # how long a function takes that would run in a thread


def make_experts(model: SimModel, seed: int = 0) -> tuple[ExpertMap, list[int]]:
    """Return experts of uneven small sizes at odd offsets of two files, and the files' sizes."""
    rng = random.Random(seed)
    ends = [rng.randrange(5000), rng.randrange(5000)]
    layers = []
    for layer in range(model.n_layers):
        row = []
        for expert in range(model.n_experts):
            parts = []
            for projection in PROJECTIONS[-model.n_matrices :]:
                file, n_bytes = rng.randrange(2), rng.randrange(1, 6000)
                parts.append(ExpertPart(projection, GGMLType.Q4_0, 16, 1, file, ends[file], n_bytes))
                ends[file] += n_bytes + rng.choice([0, 0, 1, 4096])
            row.append(ExpertExtents(layer, expert, tuple(parts)))
        layers.append(tuple(row))
    return ExpertMap(tuple(layers)), ends


def letter(token: int) -> str:
    """Return the text of a token."""
    return chr(ord("a") + token)


class SimTokenizer:
    """Every token is a letter; token 1 ends a sequence."""

    vocab_size = 26
    eos_ids = frozenset({END_TOKEN})
    suppressed: frozenset[int] = frozenset()
    longest_token_bytes = 1
    space_prefix = False

    def encode(self, text: str, *, progress: Callable[[int], None]) -> list[int]:
        """Return the ids of a text of letters."""
        progress(len(text))
        return [ord(letter) - ord("a") for letter in text]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the letter of a token."""
        return letter(token_id).encode()


async def run_here(sync_fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """Stand in for `trio.to_thread.run_sync`: it takes its time on the simulated clock, and nothing interrupts it."""
    await trio.lowlevel.checkpoint_if_cancelled()
    with trio.CancelScope(shield=True):
        await trio.sleep(THREAD_S)
    return sync_fn(*args)


@attrs.define(eq=False, kw_only=True)
class SimEngine:
    """An engine and everything in it."""

    engine: Engine
    scheduler: Scheduler
    model: SimModel
    experts: ExpertMap
    disk: SimDisk
    worker: SimWorker
    arena: Arena
    pool: BufferPool
    cache: ExpertCache
    store: ExpertStore
    fetcher: Fetcher
    kv: KVBlocks
    prefetcher: Prefetcher | None

    def expected(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        ignore_eos: bool = True,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> tuple[tuple[int, ...], set[tuple[int, int]]]:
        """Return the tokens that the engine must generate, and the experts that this takes.

        Args:
            prompt: token ids.
            max_tokens: as for `Engine.generate`.
            ignore_eos: likewise.
            sampling: likewise; one that is not greedy must have a seed.
            stop: likewise.
        """
        tokens: list[int] = []
        text = ""
        banned = SimTokenizer.eos_ids if ignore_eos else ()
        draw = greedy(banned) if sampling is None or not sampling.temperature else Sampler(sampling, banned).draw
        for token, used in self.model.generate(prompt, self.disk.seed, self.experts, draw):
            tokens.append(token)
            if token == END_TOKEN and not ignore_eos:
                return tuple(tokens), used
            text += letter(token)
            if len(tokens) == max_tokens or any(string in text for string in stop):
                return tuple(tokens), used
        raise AssertionError("a generation has no end of its own")

    def break_expert(
        self,
        layer: int,
        expert: int,
        *,
        part: int = 0,
        number: int | None = errno.EIO,
        times: int | None = None,
        copy: int | None = None,
    ) -> set[tuple[int, int]]:
        """Let reads of the page in the middle of one of an expert's matrices fail; return all experts that share it.

        Args:
            layer: of the expert.
            expert: its number.
            part: number of the matrix.
            number: of the error; with None such reads never return.
            times: how often; by default for ever.
            copy: of the files that is concerned; by default all.
        """
        matrix = self.experts.experts[layer][expert].parts[part]
        page = (matrix.offset + matrix.n_bytes // 2) // 4096 * 4096
        if number is None:
            self.disk.hang(matrix.file, page, page + 4096, times=times, copy=copy)
        else:
            self.disk.fail(matrix.file, page, page + 4096, number=number, times=times, copy=copy)
        return {(extents.layer, extents.expert) for extents, _ in self._at(matrix.file, page, page + 4096)}

    def parts_at(self, file: int, start: int, end: int) -> list[str]:
        """Return the names of the matrices that lie in a byte range of a file, at least in part."""
        return [
            f"{part.projection} of expert {extents.expert} of layer {extents.layer}"
            for extents, part in self._at(file, start, end)
        ]

    def _at(self, file: int, start: int, end: int) -> Iterator[tuple[ExpertExtents, ExpertPart]]:
        for row in self.experts.experts:
            for extents in row:
                for part in extents.parts:
                    if part.file == file and part.offset < end and start < part.offset + part.n_bytes:
                        yield extents, part

    async def settle(self) -> None:
        """Wait until nothing moves any more: longer than any job and any read takes.

        Raises:
            AssertionError: a read has not come back; it says which, and how to let it return.
        """
        await trio.sleep(1000)
        assert not self.disk.in_flight, f"reads do not come back:{report()}"

    async def check_quiet(self) -> None:
        """Assert that nothing is left of any generation and that all the counters add up.

        Raises:
            AssertionError: something is left or miscounted. What is left is listed with what it waits for, and with the
                call that lets it return where the simulation holds it.
        """
        await self.settle()
        s, pool, cache, fetcher, kv = (
            self.scheduler.statistics(),
            self.pool.statistics(),
            self.cache.statistics(),
            self.fetcher.statistics(),
            self.kv.statistics(),
        )
        assert (s.running, s.waiting, s.paused) == (0, 0, 0), f"sequences are not over:{report()}"
        assert s.reserved == 0, "places in the queue are kept for nobody"
        assert s.submitted == s.finished + s.failed + s.cancelled
        assert kv.available == kv.n_blocks, f"{kv.n_blocks - kv.available} KV blocks are held by nobody"
        assert (pool.pinned, pool.quarantined) == (0, 0), f"slots do not come back: {pool}{report()}"
        assert sum(pool.waiting) == 0, f"somebody waits for a slot:{report()}"
        assert pool.filling == fetcher.in_flight
        waits_for_a_retry = fetcher.in_flight > 0 and self.engine._closed  # that a closed engine will not make
        assert fetcher.in_flight == 0 or waits_for_a_retry, f"fetches are not over:{report()}"
        assert pool.free + pool.ready + pool.filling == pool.n_slots
        assert pool.ready == cache.resident
        assert cache.hits + cache.misses == cache.lookups
        assert cache.resident + cache.evictions <= fetcher.landed
        assert fetcher.started == fetcher.landed + fetcher.failed + fetcher.abandoned + fetcher.in_flight
        guessed = Priority.READ_AHEAD, Priority.PREFETCH
        speculation = [self.store.speculation.statistics(priority) for priority in guessed]
        assert fetcher.started <= cache.misses + sum(guesses.issued for guesses in speculation)
        for guesses in speculation:
            assert guesses.issued == sum(attrs.astuple(guesses)) - guesses.issued
        if self.store.loans.lent:  # a job was left alone when the engine was closed, and its reads with it
            assert self.engine._closed
            return
        assert fetcher.reads_started == self.model.n_matrices * fetcher.started + fetcher.retried == len(self.disk.log)
        assert fetcher.bytes_read == self.disk.statistics().bytes_read


@asynccontextmanager
async def open_sim_engine(
    *,
    model: SimModel | None = None,
    n_slots: int | None = None,
    policy: str = DEFAULT_POLICY,
    batch_tokens: int = 8,
    max_sequences: int = 4,
    max_waiting: int = 8,
    context: int = 64,
    kv_blocks: int = 64,
    prefix_reuse: bool = True,
    prefetch: PrefetchMode = "off",
    profile: DiskProfile | None = None,
    mirrors: Sequence[DiskProfile] = (),
    io_threads: int = DEFAULT_THREADS,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    read_deadline_s: float = DEFAULT_READ_DEADLINE_S,
    cost: JobCost | None = None,
    failures: frozenset[int] = frozenset(),
    worth_bytes: int = 0,
    job_reads: bool = False,
    draws_in_thread: bool = False,
    seed: int = 0,
) -> AsyncIterator[SimEngine]:
    """Run an engine during the block; its `close` stops the scheduler and the worker, the disk goes on until the end.

    Args:
        model: what is computed.
        n_slots: by default every expert has one.
        policy: of the cache, by name; the heat profile of "static" has every expert used in every visit.
        batch_tokens: as for `mer.open_engine`.
        max_sequences: likewise.
        max_waiting: requests that may queue before `generate` waits to be queued.
        context: as for `mer.open_engine`.
        kv_blocks: of `SimWorker.block_tokens` positions.
        prefix_reuse: as for `mer.open_engine`.
        prefetch: likewise.
        profile: of the disk.
        mirrors: of further drives with copies of the files.
        io_threads: reads that each drive sees at once.
        chunk_bytes: the largest of them.
        read_deadline_s: when a read that gives no answer is given up.
        cost: of jobs.
        failures: numbers of the jobs, from 0, that fail half-way.
        worth_bytes: of experts that are worth a job of their own while others load; simulated ones are small.
        job_reads: whether jobs make reads by themselves, where policy, mirrors and chunks allow it.
        draws_in_thread: whether tokens are drawn as those of large vocabularies, which takes `THREAD_S` for a batch.
        seed: of the files' bytes, the layout and the latencies.
    """
    # The actors could be joined here by hand, as suits a simulation; it would then test a copy of the engine's wiring.
    model = model or SimModel()
    experts, sizes = make_experts(model, seed)
    classes = experts.slot_classes(4096)
    n_slots = n_slots or model.n_layers * model.n_experts
    async with open_sim_disk(
        sizes, seed=seed, profile=profile, mirrors=mirrors, n_threads=io_threads, chunk_bytes=chunk_bytes
    ) as disk:
        arena = Arena((n_slots,), classes.slot_bytes)
        guesses = None
        if prefetch != "off":
            rate = (profile or DiskProfile()).bytes_per_s
            guesses = Guesses(mode=prefetch, bytes_per_s=lambda: rate, chunk_bytes=chunk_bytes)
        streaming = open_expert_actors(
            experts=experts,
            classes=classes,
            arena=arena,
            reader=disk,
            top_k=model.top_k,
            policy=make_policy(policy, _shape(model, n_slots, experts)),
            lending=Lending(lender=disk) if job_reads else None,
            guesses=guesses,
            read_deadline_s=read_deadline_s,
        )
        worker = SimWorker(model, arena, experts, disk_seed=seed, cost=cost, failures=failures, disk=disk)
        heat = HeatCounter(bytes(FINGERPRINT_BYTES), model.n_layers, model.n_experts)
        actors = open_actors(
            streaming,
            worker=worker,
            kv=KVBlocks(kv_blocks, worker.block_tokens, prefix_reuse=prefix_reuse),
            layout=_layout(model, worker, seed),
            batch_tokens=batch_tokens,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            on_routed=lambda layer, _n_tokens, used: heat.use(layer, used),
            worth_bytes=worth_bytes,
            draws=Draws(in_thread=run_here, inline_logits=0 if draws_in_thread else INLINE_LOGITS),
            in_thread=run_here,
        )
        stop = trio.CancelScope()

        async def run_actors() -> None:
            with stop:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(streaming.fetcher.run)
                    nursery.start_soon(worker.run)
                    nursery.start_soon(actors.scheduler.run)

        engine = Engine(
            home=Home(),
            vocab_size=model.vocab_size,
            context=context,
            longest_context=context,
            tokenizer=cast(Any, SimTokenizer()),
            template=_no_template,
            scheduler=actors.scheduler,
            prefixes=actors.prefixes,
            heat=heat,
            statistics=_no_statistics,
            stop=stop,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_actors)
            sim = SimEngine(
                engine=engine,
                scheduler=actors.scheduler,
                model=model,
                experts=experts,
                disk=disk,
                worker=worker,
                arena=arena,
                pool=streaming.pool,
                cache=streaming.cache,
                store=streaming.store,
                fetcher=streaming.fetcher,
                kv=actors.kv,
                prefetcher=streaming.prefetcher,
            )
            open_engines.set((*open_engines.get(), sim))
            try:
                yield sim
            finally:
                open_engines.set(tuple(other for other in open_engines.get() if other is not sim))
            engine.close()
        arena.close()


def _shape(model: SimModel, n_slots: int, experts: ExpertMap) -> CacheShape:
    """Return what a policy is made for, with a heat profile in which every expert is used in every visit."""
    visits = [(layer, range(model.n_experts)) for layer in range(model.n_layers)]
    return CacheShape(
        n_layers=model.n_layers,
        n_experts=model.n_experts,
        n_slots=n_slots,
        expert_bytes=tuple(max(extents.n_bytes for extents in layer) for layer in experts.experts),
        profile=HeatProfile.count(bytes(FINGERPRINT_BYTES), model.n_layers, model.n_experts, visits),
    )


def _layout(model: SimModel, worker: SimWorker, seed: int) -> KVLayout:
    """Return what the bytes of a simulated KV block depend on."""
    tile_bytes = 8 * worker.block_tokens
    return KVLayout(
        fingerprint=seed.to_bytes(FINGERPRINT_BYTES),
        kv_type="simulated",
        arithmetic="hashes",
        state=StateLayout((Paged(model.n_layers, tile_bytes, tile_bytes),), worker.block_tokens),
    )


def _no_template() -> NoReturn:
    raise TemplateError("a simulated model has no chat template; give text or token ids")


def _no_statistics() -> NoReturn:
    raise RuntimeError("a simulated engine has no settings; ask the actors of the SimEngine for their statistics")
