"""The engine: one nursery that owns every actor, and the calls that generate text."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from types import TracebackType

import numpy as np
import trio

from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.kernels.step import cache_failure
from mer.compute.kernels.target import KERNEL_CACHE, WIDE_VECTORS
from mer.computing import Computing, Worker, open_computing
from mer.config import Activations, EngineConfig, Hybrid, IoEngine, KVType, PrefetchSetting, Progress, Sampling
from mer.errors import ContextOverflow, EngineClosed, RequestError
from mer.io.arena import Arena
from mer.io.fetch import Fetcher
from mer.io.gguf import GGUFFile
from mer.io.mirror import mirror_paths
from mer.io.open_reader import OpenReader, open_reader
from mer.io.pool import BufferPool, demand_reserve
from mer.io.priority import Priority
from mer.model.spec import ModelSpec
from mer.plan import MemoryPlan, Model, VRAMPlan, load_model, plan_memory
from mer.prefetching import open_guessing, prefetch_mode
from mer.residency import open_residency
from mer.sched.events import Completion, Event, TokenEvent
from mer.sched.experts import ExpertCache
from mer.sched.fingerprint import model_fingerprint
from mer.sched.heat import HeatCounter, HeatProfile
from mer.sched.kv import KVBlocks, Lease
from mer.sched.kv_file import KVLayout
from mer.sched.prefix_files import PrefixFiles
from mer.sched.sampling import Sampler
from mer.sched.scheduler import Scheduler
from mer.sched.sequence import CHANNEL_EVENTS
from mer.sched.sequence import Sequence as Generation
from mer.sched.store import ExpertStore
from mer.stats import Settings, Statistics, VRAMSettings
from mer.system import peak_rss_bytes, private_bytes
from mer.text.chat import ChatTemplate, Message
from mer.text.detokenizer import StreamDetokenizer
from mer.text.stop import StopMatcher
from mer.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
DEFAULT_MAX_TOKENS = 256
LONG_TEXT = 1 << 15  # characters from which a prompt is encoded in a thread
MAX_WAITING = 64  # requests that may queue before `generate` waits to be queued


class _Text:
    """Detokenizes one generation and looks for its stop strings."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._detokenizer = StreamDetokenizer(tokenizer, prompt)
        self._stop = StopMatcher(stop)

    def push(self, token: int) -> tuple[str, bool]:
        """See `TextOutput`."""
        return self._stop.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """See `TextOutput`."""
        text, stopped = self._stop.push(self._detokenizer.flush())
        return text if stopped else text + self._stop.flush()


class TokenStream(trio.abc.ReceiveChannel[Event]):
    """The events of one generation; ends after the last token, or raises what ended the generation."""

    def __init__(
        self, generation: Generation, channel: trio.MemoryReceiveChannel[Event], wake: Callable[[], None]
    ) -> None:
        self._generation = generation
        self._channel = channel
        self._wake = wake

    async def receive(self) -> Event:
        """Return the next event, waiting until there is one; if cancelled, no event is lost.

        Raises:
            trio.EndOfChannel: the generation has finished.
            ReadError: bytes that it needed could not be read.
            NumericsError: the model computed NaN or infinity.
            EngineClosed: the engine was closed.
        """
        try:
            event = await self._channel.receive()
        except trio.EndOfChannel:
            error = self._generation.error
            if error is not None:
                raise copy.copy(error) from error.__cause__
            raise
        self._wake()
        return event

    async def aclose(self) -> None:
        """Cancel the generation, if it has not ended."""
        self.cancel()
        await trio.lowlevel.checkpoint()

    def cancel(self) -> None:
        """Cancel the generation, if it has not ended; synchronous."""
        self._generation.cancelled = True
        self._channel.close()
        self._wake()


class Engine:
    """Generates text; made by `open_engine` or `run_engine`. Its methods may be called by any number of tasks."""

    def __init__(
        self,
        *,
        model: Model,
        plan: MemoryPlan,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        prefixes: PrefixFiles,
        heat: HeatCounter,
        statistics: Callable[[], Statistics],
        stop: trio.CancelScope,
    ) -> None:
        self._model = model
        self._plan = plan
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._heat = heat
        self._statistics = statistics
        self._stop = stop
        self._template: ChatTemplate | None = None
        self._longest_token_bytes = max(map(len, map(tokenizer.token_bytes, range(tokenizer.vocab_size))), default=1)
        self._closed = ""  # or why

    @property
    def spec(self) -> ModelSpec:
        """The model's hyperparameters."""
        return self._model.spec

    @property
    def gguf(self) -> GGUFFile:
        """The model file's header."""
        return self._model.gguf

    @property
    def plan(self) -> MemoryPlan:
        """How the memory budget is spent."""
        return self._plan

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of every actor and of the settings in force."""
        return self._statistics()

    def heat_profile(self) -> HeatProfile:
        """Return how often each expert has been used so far; its `save` writes it for the policy "static"."""
        return self._heat.profile()

    def close(self) -> None:
        """Stop the engine: generations under way raise EngineClosed. Closing twice is allowed."""
        self._closed = self._closed or "the engine is closed"
        self._stop.cancel()

    def fail(self, reason: str) -> None:
        """Stop the engine as `close` does, because it can compute nothing more."""
        self._closed = self._closed or f"the engine is closed: {reason}"
        self._stop.cancel()

    async def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> Completion:
        """Generate until an end-of-sequence token, a stop string or `max_tokens`, and return the whole.

        Concurrent calls are batched and share the experts that are read. If cancelled, the generation ends and leaves
        nothing behind. While the queue is full, the call waits to be queued.

        Args:
            prompt: text; or token ids, used exactly as given; or messages, rendered with the file's chat template.
            max_tokens: at most this many tokens, from 1 up; by default 256, or what the context leaves if that is less.
            sampling: how tokens are drawn; greedy by default.
            stop: strings that end the generation; they are not part of the text.
            ignore_eos: never draw an end-of-sequence token.

        Raises:
            RequestError: the request is malformed; ContextOverflow if it needs more positions than there are.
            TemplateError: the file has no chat template, or it cannot render these messages.
            ReadError: bytes that the generation needed could not be read.
            NumericsError: the model computed NaN or infinity.
            EngineClosed: the engine is closed.
        """
        arguments = {"max_tokens": max_tokens, "sampling": sampling, "stop": stop, "ignore_eos": ignore_eos}
        async with self.stream(prompt, **arguments) as events:  # type: ignore[arg-type]
            async for event in events:
                if isinstance(event, TokenEvent) and event.completion is not None:
                    return event.completion
        raise EngineClosed("the generation ended without a last token")

    @asynccontextmanager
    async def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[TokenStream]:
        """Generate as `generate` does, and give the events as they come; leaving the block cancels.

        A prompt that begins with the same tokens as another one, or as a finished generation, is computed from where
        they differ, if memory has kept the rest; `Usage.cached_tokens` tells how much. The output is the same.

        A reader that falls 64 events behind pauses its own generation and no other. When others wait for its place or
        its KV blocks, a paused generation gives them up. Once its reader has no more than half of those events left to
        read, it is next in line, computes its prompt and its tokens so far again, and goes on where it was: neither
        the tokens nor the events are other than without the pause.
        """
        prompt = await self._encode_long(prompt)
        generation, channel = self._prepare(prompt, max_tokens, sampling, stop, ignore_eos)
        events = TokenStream(generation, channel, self._scheduler.wake)
        try:
            await self._scheduler.submit(generation)
            yield events
        finally:
            events.cancel()

    async def _encode_long(self, prompt: Prompt) -> Prompt:
        """Return the tokens of a long text, which take seconds for megabytes and are therefore made in a thread."""
        if isinstance(prompt, str) and len(prompt) > LONG_TEXT:
            return await trio.to_thread.run_sync(self.encode, prompt)
        return prompt

    async def save_prefix(self, prompt: Prompt, path: str | os.PathLike[str]) -> int:
        """Save what a prompt's computation has given, so that `load_prefix` can spare it later, and return the tokens.

        The prompt's keys and values are saved in whole blocks of 64 tokens; the rest of the prompt is not. What is not
        in memory any more is computed first, as `generate` would. If cancelled, nothing is left behind: the file is
        there whole, or as it was before. While another prefix is saved or restored, the call waits.

        Args:
            prompt: as for `generate`.
            path: the file, replaced if there is one; its format is described in docs/prefix-reuse.md. It tells the
                prompt to whoever can read it, and only its owner may.

        Raises:
            RequestError: the prompt is malformed, or shorter than a block; ContextOverflow if it leaves no position.
            TemplateError: the file has no chat template, or it cannot render these messages.
            OSError: the file cannot be written.
            ReadError: bytes that the computation needed could not be read.
            NumericsError: the model computed NaN or infinity.
            EngineClosed: the engine is closed.
        """
        if self._closed:
            raise EngineClosed(self._closed)
        ids = self.encode(await self._encode_long(prompt))
        tokens = ids[: self._prefixes.whole(len(ids))]
        if not tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; a prefix is saved in blocks of {self._prefixes.whole_block}, so "
                "that it must have at least as many"
            )
        lease = self._prefixes.hold(tokens) or await self._compute(ids)
        try:
            await self._prefixes.save(lease, tokens, path)
        finally:
            self._scheduler.give_back(lease)
        return len(tokens)

    async def _compute(self, ids: list[int]) -> Lease:
        """Compute a prompt and return its KV blocks, which the caller gives back."""
        generation, channel = self._prepare(ids, 1, None, (), True)
        generation.keeps_lease = True
        events = TokenStream(generation, channel, self._scheduler.wake)
        lease = None
        try:
            await self._scheduler.submit(generation)
            async for _ in events:
                pass
            lease = self._scheduler.take_lease(generation)
        finally:
            events.cancel()
            if lease is None and (unwanted := self._scheduler.take_lease(generation)) is not None:
                self._scheduler.give_back(unwanted)
        assert lease is not None
        return lease

    async def load_prefix(self, path: str | os.PathLike[str]) -> int:
        """Restore a prefix that `save_prefix` has saved, and return its tokens: prompts that begin with them use it.

        The restored blocks are cached like those of finished generations: they give way when running generations need
        the memory. If cancelled, nothing is left behind. While another prefix is saved or restored, the call waits.

        Raises:
            PrefixFileError: the file is malformed, damaged, of another model, other activations or another type of KV,
                or does not fit the KV memory that no generation uses now; then nothing has changed.
            ConfigError: the engine was opened with `prefix_reuse=False`.
            OSError: the file cannot be read.
            EngineClosed: the engine is closed.
        """
        if self._closed:
            raise EngineClosed(self._closed)
        return await self._prefixes.load(path)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, as `generate` would use them.

        Raises:
            RequestError: the prompt is none of text, token ids and messages, or a token id is not in the vocabulary.
            TemplateError: the file has no chat template, or it cannot render these messages.
        """
        if isinstance(prompt, str):
            least = len(prompt.encode("utf-8", "surrogatepass")) // self._longest_token_bytes
            if least > self._plan.context:  # before an encoding that would take long
                raise ContextOverflow(
                    f"the prompt is at least {least} tokens long, the engine has {self._plan.context} positions per "
                    f"sequence; shorten the prompt or raise the context (the model allows {self.spec.context_length})"
                )
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, Message | bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
            raise RequestError(f"a prompt is text, token ids or a list of messages, not {type(prompt).__name__}")
        items = list(prompt)
        messages = [item for item in items if isinstance(item, Message)]
        if messages and len(messages) == len(items):
            if self._template is None:
                self._template = ChatTemplate.from_gguf(self.gguf, self._tokenizer)
            return self._template.render_tokens(messages)
        ids: list[int] = []
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | np.integer):
                raise RequestError(f"a prompt is text, token ids or messages, not a sequence with {item!r}")
            if not 0 <= item < self.spec.vocab_size:
                raise RequestError(f"token id {item} is not in the vocabulary, 0 to {self.spec.vocab_size - 1}")
            ids.append(int(item))
        return ids

    def _prepare(
        self, prompt: Prompt, max_tokens: int | None, sampling: Sampling | None, stop: Sequence[str], ignore_eos: bool
    ) -> tuple[Generation, trio.MemoryReceiveChannel[Event]]:
        """Check a request and make its generation."""
        if self._closed:
            raise EngineClosed(self._closed)
        given = max_tokens is not None
        if given and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
            raise RequestError(f"max_tokens is {max_tokens!r}; it must be a whole number from 1 up")
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise RequestError(f"sampling is {sampling!r}; it must be a Sampling")
        if not isinstance(stop, Sequence):
            raise RequestError(f"stop is {stop!r}; it must be a list of stop strings")
        ids = self.encode(prompt)
        if not ids:
            raise RequestError("the prompt is empty; give text or at least one token id")
        if max_tokens is None:
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, self._plan.context - len(ids)))
        if len(ids) + max_tokens > self._plan.context:
            raise ContextOverflow(
                f"{len(ids)} prompt tokens and max_tokens={max_tokens} need {len(ids) + max_tokens} positions, "
                f"the engine has {self._plan.context} per sequence; shorten the prompt, lower max_tokens, or raise "
                f"the context (the model allows {self.spec.context_length})"
            )
        ends = self._tokenizer.eos_ids
        send, receive = trio.open_memory_channel[Event](CHANNEL_EVENTS)
        generation = Generation(
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampler=Sampler(sampling, ends if ignore_eos else ()),
            output=_Text(self._tokenizer, ids, [stop] if isinstance(stop, str) else stop),
            end_tokens=frozenset() if ignore_eos else ends,
            events=send,
            submitted_s=trio.current_time(),
        )
        return generation, receive


@asynccontextmanager
async def open_engine(
    path: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    io_threads: int | None = None,
    io_engine: IoEngine = "auto",
    mirrors: Iterable[str | os.PathLike[str]] = (),
    slots: int | None = None,
    context: int | None = None,
    max_sequences: int | None = None,
    batch_tokens: int | None = None,
    activations: Activations = "auto",
    kv_type: KVType | None = None,
    prefetch: PrefetchSetting = "auto",
    prefix_reuse: bool = True,
    device: str = "auto",
    vram: int | str | None = None,
    hybrid: Hybrid = "auto",
    vram_slots: int | None = None,
    policy: str | None = None,
    heat: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> AsyncIterator[Engine]:
    """Open a model and close it when the block is left.

    If cancelled, or when the block raises, everything is taken down and the error goes on unwrapped.

    Args:
        path: the GGUF file, or any part of a split one.
        memory: bounds the whole process, in bytes or as text such as "8GiB"; by default the control group's limit or
            what is available.
        threads: compute threads; by default one per processor.
        io_threads: reads that each disk sees at once; by default 8 with io_uring and 4 with threads.
        io_engine: what makes them: "io_uring", "threads", or "auto", which takes the first if the system and the files
            allow it.
        mirrors: identical copies of the file, or of all parts of a split one under the same names, on further drives:
            each a path of the copy or of its folder. They are compared with the original by header and samples, and
            share the reading by how fast they are.
        slots: caps the expert slots below what the budget allows.
        context: positions of the longest sequence.
        max_sequences: sequences that run at once; by default 8, or what a small prefill chunk allows.
        batch_tokens: rows of a batch, which is also the prefill chunk.
        activations: precision of activations that meet quantized weights: "int8", "int15", or "auto" by the model's
            size.
        kv_type: how keys and values are kept: "f32", "f16" or "q8_0"; by default "f32" for a model of F32 weights, else
            "f16".
        prefix_reuse: whether prompts use what was computed for the same tokens before.
        device: "cpu", "cuda", "cuda:N", or "auto", which takes the first GPU that torch can use; see docs/cuda.md.
        vram: bounds what the engine takes of the GPU's memory, in bytes or as text; by default what is free there.
        hybrid: whether the processor computes experts that are only in memory beside the GPU: "auto", as many as
            measure faster, or "off". With "auto" tokens may depend on what is where.
        vram_slots: caps the expert slots there below what that allows.
        policy: which experts stay in memory: "lfru", "layer-lru", "lfu", "static" or "cost"; by default "lfru".
        heat: a heat profile of this model, which the policy "static" needs.
        trace: a file that the routing is recorded in, made or appended to; see docs/traces.md. If it cannot be
            written any more, it ends with a warning in the log, and the engine goes on.
        prefetch: which guesses at what the next layer needs are read while the disk is idle: "off", "markov", "gate" or
            "auto", which reads what is worth it and tries out whether it pays; see docs/prefetch.md.
        on_progress: called in the trio thread as kernels are compiled and weights are read.

    Raises:
        ModelFileError: the file is malformed or not supported.
        NotEnoughMemory: a budget is too small; the text carries the arithmetic.
        ConfigError: a setting is out of range, or the device that was asked for cannot be used.
        ReadError: bytes could not be read.
        ProfileError: the heat profile is malformed or of another model.
        TraceError: the trace exists and is malformed or of another model.
    """
    config = EngineConfig(
        path=path,
        memory=memory,
        threads=threads,
        io_threads=io_threads,
        io_engine=io_engine,
        mirrors=mirrors,
        slots=slots,
        context=context,
        max_sequences=max_sequences,
        batch_tokens=batch_tokens,
        activations=activations,
        kv_type=kv_type,
        prefetch=prefetch,
        prefix_reuse=prefix_reuse,
        device=device,
        vram=vram,
        hybrid=hybrid,
        vram_slots=vram_slots,
        policy=policy,
        heat=heat,
        trace=trace,
        **({} if on_progress is None else {"on_progress": on_progress}),
    )
    with _Unwrapped():
        async with trio.open_nursery() as nursery:
            engine = await nursery.start(run_engine, config)
            try:
                yield engine
            finally:
                engine.close()


async def run_engine(config: EngineConfig, *, task_status: trio.TaskStatus[Engine] = trio.TASK_STATUS_IGNORED) -> None:
    """Open a model, report the engine through `task_status`, and serve until it is closed or cancelled.

    For services that own the nursery: `engine = await nursery.start(mer.run_engine, config)`. Raises as `open_engine`
    does.
    """
    begun_s = time.perf_counter()
    model = load_model(config)
    plan = plan_memory(model, config)
    tokenizer = Tokenizer.from_gguf(model.gguf)
    with ExitStack() as stack:
        residency = await open_residency(config, model, plan)
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
        computing = await open_computing(config, model, plan, reader)
        worker = computing.worker
        dense_bytes_read = reader.statistics().bytes_read
        arena = Arena(plan.slot_counts, plan.classes.slot_bytes)
        stack.callback(arena.close)
        stack.callback(worker.close)
        pinned = computing.pin(arena.address(0), arena.n_bytes)
        pool = BufferPool(plan.slot_counts, reserve=demand_reserve(plan.slot_counts, model.spec.top_k))
        cache = ExpertCache(residency.policy, (model.spec.n_layers, model.spec.n_experts))
        store = ExpertStore(cache, pool, plan.classes.kind_of, computing.tier)
        fetcher = Fetcher(
            pool, arena, plan.classes, model.experts, reader, on_done=store.landed, on_inner=store.inner_landed
        )
        store.attach(fetcher)
        guessing = await open_guessing(config, model, plan, store, reader)
        if guessing is not None:
            stack.callback(guessing.save)
        kv = KVBlocks(plan.limits.kv_blocks, KV_TILE, prefix_reuse=config.prefix_reuse)
        scheduler = Scheduler(
            n_layers=model.spec.n_layers,
            n_experts=model.spec.n_experts,
            worker=worker,
            store=store,
            kv=kv,
            batch_tokens=plan.limits.batch_tokens,
            max_sequences=plan.limits.sequences,
            max_waiting=MAX_WAITING,
            bytes_read=lambda: fetcher.bytes_read,
            prefetcher=None if guessing is None else guessing.prefetcher,
            on_routed=residency.routed,
        )
        settings = _settings(config, plan, model, computing, pinned, arena, opened, cache)
        load_s = 0.0

        def statistics() -> Statistics:
            return Statistics(
                load_s=load_s,
                dense_bytes_read=dense_bytes_read,
                bytes_read=model.gguf.header_bytes_read + reader.statistics().bytes_read,
                stalled_s=store.stalled_s,
                private_bytes=private_bytes(),
                peak_rss_bytes=peak_rss_bytes(),
                settings=settings,
                scheduler=scheduler.statistics(),
                cache=cache.statistics(),
                read_ahead=store.speculation(Priority.READ_AHEAD),
                prefetch=store.speculation(Priority.PREFETCH),
                predictors=None if guessing is None else guessing.prefetcher.statistics(),
                pool=pool.statistics(),
                fetcher=fetcher.statistics(),
                reader=reader.statistics(),
                worker=worker.statistics(),
                kv=kv.statistics(),
                trace=None if residency.recorder is None else residency.recorder.statistics(),
            )

        worker.start_threads()
        with _Unwrapped():
            async with trio.open_nursery() as nursery:
                engine = Engine(
                    model=model,
                    plan=plan,
                    tokenizer=tokenizer,
                    scheduler=scheduler,
                    prefixes=PrefixFiles(
                        kv=kv,
                        layout=_kv_layout(model, computing),
                        transfer=scheduler.transfer,
                        give_back=scheduler.give_back,
                    ),
                    heat=residency.heat,
                    statistics=statistics,
                    stop=nursery.cancel_scope,
                )
                nursery.start_soon(fetcher.run)
                nursery.start_soon(_compute, worker, engine)
                if residency.recorder is not None:
                    nursery.start_soon(residency.recorder.run)
                nursery.start_soon(scheduler.run)
                load_s = time.perf_counter() - begun_s
                task_status.started(engine)


async def _compute(worker: Worker, engine: Engine) -> None:
    """Run the worker; one that ends by itself can compute nothing more, so that the engine closes."""
    await worker.run()
    engine.fail("its compute worker has stopped, because its device failed")


def _kv_layout(model: Model, computing: Computing) -> KVLayout:
    """Return what the bytes of a KV block depend on."""
    spec = model.spec
    return KVLayout(
        fingerprint=model_fingerprint(model.gguf),
        kv_type=computing.kv_type,
        arithmetic=computing.arithmetic,
        n_layers=spec.n_layers,
        n_kv_heads=spec.n_kv_heads,
        head_dim=spec.head_dim,
        block_tokens=KV_TILE,
        block_bytes=computing.kv_block_bytes,
    )


def _settings(
    config: EngineConfig,
    plan: MemoryPlan,
    model: Model,
    computing: Computing,
    pinned: str,
    arena: Arena,
    opened: OpenReader,
    cache: ExpertCache,
) -> Settings:
    types: dict[str, int] = {}
    for tensor in model.gguf.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.n_bytes
    return Settings(
        memory_bytes=plan.budget_bytes,
        memory_source=plan.budget_source,
        threads=plan.limits.threads,
        io_threads=opened.reader.depth,
        io_engine=opened.reader.engine,
        io_reason=opened.reason,
        mirrors=tuple(map(str, config.mirrors)),
        slots=plan.slots,
        slot_counts=plan.slot_counts,
        slot_bytes=plan.classes.slot_bytes,
        context=plan.context,
        kv_tokens=plan.limits.kv_blocks * KV_TILE,
        prefix_reuse=config.prefix_reuse,
        max_sequences=plan.limits.sequences,
        batch_tokens=plan.limits.batch_tokens,
        device=plan.device.label,
        device_reason=plan.device.reason,
        vram=None if plan.vram is None else _vram_settings(plan.vram, config.hybrid, pinned),
        kernels=computing.kernels,
        wide_vectors=WIDE_VECTORS,
        kernel_cache=cache_failure() or str(KERNEL_CACHE),
        activations=computing.activations,
        kv_type=computing.kv_type,
        policy=cache.statistics().policy,
        prefetch=prefetch_mode(config, plan),
        heat=None if config.heat is None else str(config.heat),
        trace=None if config.trace is None else str(config.trace),
        io_modes=opened.reader.modes,
        huge_pages=arena.huge_pages,
        types=types,
    )


def _vram_settings(vram: VRAMPlan, hybrid: str, pinned: str) -> VRAMSettings:
    return VRAMSettings(
        budget_bytes=vram.budget_bytes,
        budget_source=vram.budget_source,
        parts=dict(vram.parts),
        slots=vram.slots,
        slot_counts=vram.slot_counts,
        slot_bytes=vram.classes.slot_bytes,
        dense=vram.dense,
        dense_reason=vram.dense_reason,
        hybrid=hybrid,
        pinned=pinned,
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
