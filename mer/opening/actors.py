"""The actors of an engine, made and joined: the same for the engine, its simulation and the streaming benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import trio

from mer.compute.messages import ComputeWorker, Tier
from mer.io.arena import Arena
from mer.io.chunks import DEFAULT_CHUNK_BYTES
from mer.io.extents import ExpertMap, SlotClasses
from mer.io.fetch import Fetch
from mer.io.fetcher import DEFAULT_READ_DEADLINE_S, Fetcher
from mer.io.loan.desk import LoanDesk
from mer.io.loan.lender import Lender
from mer.io.pool import BufferPool, demand_reserve
from mer.io.reader import Reader
from mer.opening.loan import open_loan
from mer.sched.cache import ExpertCache
from mer.sched.draws import Draws
from mer.sched.governor import GuessMode
from mer.sched.kv import KVBlocks
from mer.sched.kv_file import KVLayout
from mer.sched.layer import WORTH_BYTES
from mer.sched.policy import Policy
from mer.sched.predictors.markov import MarkovPredictor
from mer.sched.prefetch import DiskFacts, Prefetcher
from mer.sched.prefix_files import InThread, PrefixFiles
from mer.sched.scheduler import Scheduler
from mer.sched.store import ExpertStore


@attrs.frozen(kw_only=True)
class Lending:
    """The reader as a loan to jobs, or the reason against it.

    Attributes:
        lender: the reader, if it can be lent.
        reason: why it cannot.
    """

    lender: Lender | None = None
    reason: str = "not asked for"


@attrs.frozen(kw_only=True)
class Guesses:
    """Settings of the guesses at the next layer's experts.

    Attributes:
        mode: see `Prefetcher`.
        bytes_per_s: returns the disk's rate while something is read; 0 while it is unknown.
        chunk_bytes: the largest single read.
        markov: chains that go on learning; by default new ones.
    """

    mode: GuessMode
    bytes_per_s: Callable[[], float]
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    markov: MarkovPredictor | None = None


@attrs.frozen(kw_only=True)
class ExpertActors:
    """The actors that bring experts from the disk to a worker; `fetcher.run` is to be run."""

    experts: ExpertMap
    top_k: int
    pool: BufferPool
    cache: ExpertCache
    fetcher: Fetcher
    store: ExpertStore
    prefetcher: Prefetcher | None
    job_reads: str  # whether jobs read missing experts: "on", or "off: " and why


@attrs.frozen(kw_only=True)
class Actors:
    """The actors that generate; `run` of scheduler, fetcher and worker are to be run."""

    experts: ExpertActors
    kv: KVBlocks
    scheduler: Scheduler
    prefixes: PrefixFiles


def open_expert_actors(
    *,
    experts: ExpertMap,
    classes: SlotClasses,
    arena: Arena,
    reader: Reader,
    top_k: int,
    policy: Policy,
    tier: Tier | None = None,
    lending: Lending | None = None,
    guesses: Guesses | None = None,
    read_deadline_s: float = DEFAULT_READ_DEADLINE_S,
    on_fetched: Callable[[Fetch], None] | None = None,
) -> ExpertActors:
    """Make and join the actors that bring experts from the disk to a worker.

    Args:
        experts: where every expert lies in the files, [L][E].
        classes: the sizes of the slots.
        arena: the slots.
        reader: of the files.
        top_k: experts that a token uses.
        policy: of the cache; a fresh one.
        tier: experts in the worker's own memory.
        lending: the loan to jobs that read missing experts; by default none.
        guesses: settings of prefetching; by default nothing is read on a guess.
        read_deadline_s: when a read that gives no answer is given up.
        on_fetched: see `ExpertStore`.

    Raises:
        ConfigError: the arena does not fit the experts or the reader, or the deadline is not positive.
    """
    counts = arena.slot_counts
    shape = experts.shape
    pool = BufferPool(counts, reserve=demand_reserve(counts, top_k))
    cache = ExpertCache(policy, shape)
    lending = lending or Lending()
    loan, why = open_loan(experts, classes, arena, lending.lender, lending.reason, cache, tier)
    fetcher = Fetcher(pool, arena, classes, experts, reader, read_deadline_s=read_deadline_s)
    desk = None if loan is None else LoanDesk(loan, fetcher, pool)
    prefetcher = None
    if guesses is not None:
        facts = DiskFacts(
            expert_bytes=lambda key: experts.experts[key[0]][key[1]].n_bytes,
            bytes_per_s=guesses.bytes_per_s,
            chunk_bytes=guesses.chunk_bytes,
        )
        prefetcher = Prefetcher(
            guesses.mode, facts, n_layers=shape[0], n_experts=shape[1], top_k=top_k, markov=guesses.markov
        )
    store = ExpertStore(
        cache,
        pool,
        fetcher,
        classes.kind_of,
        tier=tier,
        desk=desk,
        prefetcher=prefetcher,
        on_fetched=on_fetched,
    )
    return ExpertActors(
        experts=experts,
        top_k=top_k,
        pool=pool,
        cache=cache,
        fetcher=fetcher,
        store=store,
        prefetcher=prefetcher,
        job_reads=why,
    )


def open_actors(
    experts: ExpertActors,
    *,
    worker: ComputeWorker,
    kv: KVBlocks,
    layout: KVLayout,
    batch_tokens: int,
    max_sequences: int,
    max_waiting: int,
    on_routed: Callable[[int, int, Sequence[int]], None],
    worth_bytes: int = WORTH_BYTES,
    where: str = "the model file",
    draws: Draws | None = None,
    in_thread: InThread = trio.to_thread.run_sync,
) -> Actors:
    """Make the scheduler and join it with the worker, with what brings the experts, and with the KV blocks.

    Args:
        experts: see `open_expert_actors`.
        worker: computes.
        kv: the blocks of its KV memory.
        layout: what their bytes depend on.
        batch_tokens: see `Scheduler`, as for those that follow.
        max_sequences: likewise.
        max_waiting: likewise.
        on_routed: likewise.
        worth_bytes: likewise.
        where: likewise.
        draws: likewise.
        in_thread: see `PrefixFiles`.
    """
    n_layers, n_experts = experts.experts.shape
    scheduler = Scheduler(
        n_layers=n_layers,
        n_experts=n_experts,
        worker=worker,
        store=experts.store,
        kv=kv,
        batch_tokens=batch_tokens,
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        bytes_read=lambda: experts.fetcher.bytes_read,
        prefetcher=experts.prefetcher,
        on_routed=on_routed,
        worth_bytes=worth_bytes,
        where=where,
        draws=draws,
    )
    prefixes = PrefixFiles(
        kv=kv, layout=layout, transfer=scheduler.transfer, give_back=scheduler.give_back, in_thread=in_thread
    )
    return Actors(experts=experts, kv=kv, scheduler=scheduler, prefixes=prefixes)
