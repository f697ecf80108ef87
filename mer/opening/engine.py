"""Opening an engine: one nursery that owns every actor."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import trio

from mer.address_space import check_address_space, naming_refusals
from mer.compute.kernels.kv_layout import KV_TILE
from mer.config import EngineConfig, PrefetchMode
from mer.engine import Engine, Origin
from mer.errors import EngineClosed
from mer.home import Home, OwnProcessStack, apart_from_children
from mer.io.arena import Arena
from mer.io.file_reader import FileReader
from mer.io.mirror import mirror_paths
from mer.io.open_reader import OpenReader, open_reader
from mer.io.pool import Priority
from mer.io.ring_reader import RingReader
from mer.model.loading import Model
from mer.opening.actors import Guesses, Lending, open_actors, open_expert_actors
from mer.opening.caching import open_residency
from mer.opening.prefetching import Experience, load_experience, measured_rate, prefetch_mode
from mer.opening.settings import settings_in_force
from mer.opening.worker import Computing, Worker, open_computing
from mer.plan.plan import MemoryPlan, load_and_plan
from mer.sched.fingerprint import model_fingerprint
from mer.sched.kv import KVBlocks
from mer.sched.kv_file import KVLayout
from mer.setting import takes_settings_of
from mer.stats import Statistics
from mer.system import peak_rss_bytes, private_bytes
from mer.text.chat import ChatTemplate
from mer.text.tokenizer import Tokenizer


@takes_settings_of(EngineConfig)
@asynccontextmanager
async def open_engine(*arguments: Any, **settings: Any) -> AsyncIterator[Engine]:
    """Open a model and close it when the block is left.

    If cancelled, or when the block raises, everything is taken down and the error goes on unwrapped. A setting that
    does not exist is a TypeError at once.

    Raises:
        ModelFileError: the file is malformed or not supported.
        NotEnoughMemory: a budget is too small; the text carries the arithmetic.
        ConfigError: a setting is out of range, or the device that was asked for cannot be used.
        ReadError: bytes could not be read.
        ProfileError: the heat profile is malformed or of another model.
        TraceError: the trace exists and is malformed or of another model.
        OSError: the heat profile or the trace cannot be opened; it names the file.
        ForeignCall: the call does not come from a task of trio's.
    """
    Home()  # refuses anything but a task of trio's before anything is read
    config = EngineConfig(*arguments, **settings)
    with _Unwrapped():
        async with trio.open_nursery() as nursery:
            engine = await nursery.start(run_engine, config)
            try:
                yield engine
            finally:
                engine.close()


@contextmanager
def _reading(reader: FileReader) -> Iterator[None]:
    """Cancel the block, which waits for a reader, when the reader fails.

    Raises:
        EngineClosed: the reader can read nothing more.
    """
    failures: list[str] = []
    with trio.CancelScope() as scope:

        def stop(why: str) -> None:
            failures.append(why)
            scope.cancel()

        with reader.telling(stop):
            yield
    if failures:
        raise EngineClosed(f"the engine could not be opened: {failures[0]}")


async def run_engine(config: EngineConfig, *, task_status: trio.TaskStatus[Engine] = trio.TASK_STATUS_IGNORED) -> None:
    """Open a model, report the engine through `task_status`, and serve until it is closed or cancelled.

    For services that own the nursery: `engine = await nursery.start(mer.run_engine, config)`. Raises as `open_engine`
    does.
    """
    # Opening and serving could be two functions, the second given what the first has made. It is one because lints
    # follow a nursery, and what is closed after it, in one function only. The room's other modules make the parts.
    begun_s = time.perf_counter()
    home = Home()
    with naming_refusals(), OwnProcessStack() as stack:
        model, plan, fingerprint = await trio.to_thread.run_sync(_load, config)
        check_address_space(plan.used_bytes - private_bytes())
        tokenizer = await trio.to_thread.run_sync(Tokenizer.from_gguf, model.gguf)
        residency = await open_residency(config, model, plan, fingerprint)
        if residency.recorder is not None:
            stack.callback(residency.recorder.close)
        opened = stack.enter_context(
            open_reader(
                model.gguf.paths,
                io_engine=config.io_engine,
                mirrors=[mirror_paths(model.gguf.paths, mirror) for mirror in config.mirrors],
                expected=model.gguf.identities,
                n_threads=config.io_threads,
            )
        )
        reader = opened.reader
        with _reading(reader):
            computing = await open_computing(config, model, plan, reader)
        worker = computing.worker
        dense_bytes_read = reader.statistics().bytes_read
        arena = Arena(plan.slot_counts, plan.classes.slot_bytes)
        stack.callback(arena.close)
        stack.callback(worker.close)
        pinned = computing.pin(arena.address(0), arena.n_bytes) if arena.n_slots else "no slots to pin"
        mode = prefetch_mode(config, plan)
        experience = await load_experience(model, mode, fingerprint)
        experts = open_expert_actors(
            experts=model.experts,
            classes=plan.classes,
            arena=arena,
            reader=reader,
            top_k=model.spec.top_k,
            policy=residency.policy,
            tier=computing.tier,
            lending=_lending(opened),
            guesses=_guesses(mode, reader, experience),
        )
        cache, store, fetcher, prefetcher = experts.cache, experts.store, experts.fetcher, experts.prefetcher
        stack.callback(store.loans.stop)
        if prefetcher is not None:
            stack.callback(experience.save, prefetcher.markov)
        kv = KVBlocks(plan.limits.kv_blocks, KV_TILE, prefix_reuse=config.prefix_reuse)
        actors = open_actors(
            experts,
            worker=worker,
            kv=kv,
            layout=_kv_layout(computing, fingerprint),
            batch_tokens=plan.limits.batch_tokens,
            max_sequences=plan.limits.sequences,
            max_waiting=config.max_waiting,
            on_routed=residency.routed,
            where=str(config.path),
        )
        scheduler = actors.scheduler
        settings = settings_in_force(config, plan, model, computing, pinned, arena, opened, cache, experts.job_reads)
        load_s = 0.0

        def statistics() -> Statistics:
            return Statistics(
                load_s=load_s,
                dense_bytes_read=dense_bytes_read,
                bytes_read=model.gguf.header_bytes_read + reader.statistics().bytes_read,
                stalled_s=store.waiting.stalled_s,
                private_bytes=private_bytes(),
                peak_rss_bytes=peak_rss_bytes(),
                settings=settings,
                scheduler=scheduler.statistics(),
                cache=cache.statistics(),
                read_ahead=store.speculation.statistics(Priority.READ_AHEAD),
                prefetch=store.speculation.statistics(Priority.PREFETCH),
                predictors=None if prefetcher is None else prefetcher.statistics(),
                pool=experts.pool.statistics(),
                fetcher=fetcher.statistics(),
                reader=reader.statistics(),
                worker=worker.statistics(),
                kv=kv.statistics(),
                trace=None if residency.recorder is None else residency.recorder.statistics(),
            )

        def disown() -> None:
            reader.disown()
            worker.disown()

        worker.start_threads()
        with _Unwrapped():
            async with trio.open_nursery() as nursery:
                stack.enter_context(apart_from_children(disown))
                engine = Engine(
                    home=home,
                    vocab_size=model.spec.vocab_size,
                    context=plan.context,
                    longest_context=model.spec.context_length,
                    tokenizer=tokenizer,
                    template=partial(ChatTemplate.from_gguf, model.gguf, tokenizer),
                    origin=Origin(model, plan),
                    scheduler=scheduler,
                    prefixes=actors.prefixes,
                    heat=residency.heat,
                    statistics=statistics,
                    stop=nursery.cancel_scope,
                )
                stack.callback(engine.release)
                stack.callback(engine.close)  # however it ends
                stack.enter_context(reader.telling(engine.fail))
                nursery.start_soon(fetcher.run)
                nursery.start_soon(_compute, worker, engine)
                if residency.recorder is not None:
                    nursery.start_soon(residency.recorder.run)
                nursery.start_soon(scheduler.run)
                load_s = time.perf_counter() - begun_s
                task_status.started(engine)


def _load(config: EngineConfig) -> tuple[Model, MemoryPlan, bytes]:
    """Read a model's header, plan the memory, and take the model's fingerprint.

    Runs in a thread: where a vocabulary has 250 thousand tokens, the three take a second and more.
    """
    model, plan = load_and_plan(config)
    return model, plan, model_fingerprint(model.gguf)


async def _compute(worker: Worker, engine: Engine) -> None:
    """Run the worker; when it ends uncancelled, it can compute nothing more, so the engine closes."""
    await worker.run()
    engine.fail(worker.failure)


def _lending(opened: OpenReader) -> Lending:
    """Return the loan of the reader to jobs, or the reason why it cannot be lent."""
    reader = opened.reader
    if isinstance(reader, RingReader):
        return Lending(lender=reader)
    return Lending(reason=f"only io_uring can be lent ({opened.reason})")


def _guesses(mode: PrefetchMode, reader: FileReader, experience: Experience) -> Guesses | None:
    """Return the settings of prefetching, or None if the mode is off."""
    if mode == "off":
        return None
    return Guesses(mode=mode, bytes_per_s=measured_rate(reader), markov=experience.markov)


def _kv_layout(computing: Computing, fingerprint: bytes) -> KVLayout:
    """Return the layout that the bytes of a KV block depend on."""
    return KVLayout(
        fingerprint=fingerprint,
        kv_type=computing.kv_type,
        arithmetic=computing.arithmetic,
        state=computing.state,
    )


class _Unwrapped:
    """Lets a single error out of the exception group that the nursery in its block wraps it in.

    The error keeps its own cause and context; a group that the error itself is stays as it is.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            single = error.exceptions[0]
            context, suppressed = single.__context__, single.__suppress_context__
            try:
                raise single
            finally:
                single.__context__, single.__suppress_context__ = context, suppressed
