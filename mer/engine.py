"""The engine as its users see it: the calls that generate text."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import attrs
import numpy as np
import trio

from mer.config import Sampling, default_max_tokens
from mer.errors import ConfigError, ContextOverflow, EngineClosed, RequestError, TemplateError
from mer.home import Home
from mer.io.gguf import GGUFFile
from mer.model.spec import ModelSpec
from mer.sched.events import Completion, Event, TokenEvent
from mer.sched.heat import HeatCounter, HeatProfile
from mer.sched.kv import Lease
from mer.sched.prefix_files import PrefixFiles
from mer.sched.sampling import Sampler
from mer.sched.scheduler import Scheduler
from mer.sched.sequence import CHANNEL_EVENTS
from mer.sched.sequence import Sequence as Generation
from mer.text.chat import Chat, ChatTemplate, Message
from mer.text.detokenizer import StreamDetokenizer
from mer.text.renderer import Call
from mer.text.stop import StopMatcher
from mer.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # these import the kernels' compiler, which a simulated engine does without
    from mer.model.loading import Model
    from mer.plan.plan import MemoryPlan
    from mer.stats import Statistics

Ts = TypeVarTuple("Ts")
T = TypeVar("T")
Prompt = str | Sequence[int] | Sequence[Message] | Chat
LONG_TEXT = 1 << 8  # characters from which a prompt is encoded in a thread: new words take some 5 us a character
LONG_IDS = 1 << 12  # tokens from which they are looked at in a thread: half a microsecond for each
LONG_STOPS = 1 << 12  # characters of stop strings from which these are prepared in a thread


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
        self, home: Home, generation: Generation, channel: trio.MemoryReceiveChannel[Event], wake: Callable[[], None]
    ) -> None:
        self._home = home
        self._generation = generation
        self._channel = channel
        self._wake = wake

    async def receive(self) -> Event:
        """Return the next event, waiting until there is one; if cancelled, no event is lost.

        Raises:
            trio.EndOfChannel: the generation has finished.
            ReadError: bytes that it needed could not be read.
            NumericsError: the model computed NaN or infinity.
            GenerationError: drawing a token, or making text of it, failed.
            EngineClosed: the engine was closed.
            ForeignCall: the call comes from outside the engine's trio run or process.
        """
        self._home.check_task()
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
        """Cancel the generation, if it has not ended; synchronous, and without effect in a forked child.

        Raises:
            ForeignCall: the call comes from outside the engine's trio run.
        """
        if self._home.forked:
            return
        self._home.check()
        self._generation.cancelled = True
        self._channel.close()
        self._wake()


@attrs.frozen
class Origin:
    """The model file that an engine was opened with, and the memory plan that came of it."""

    model: Model
    plan: MemoryPlan


class Engine:
    """Generates text; made by `open_engine` or `run_engine`. Its methods may be called by any number of tasks.

    These must be tasks of the trio run that opened the engine, in the same process: other calls of `generate`,
    `stream`, `stream_nowait`, `save_prefix`, `load_prefix` and `close` raise ForeignCall before anything is touched.

    Args:
        home: the trio run that may call it.
        vocab_size: V; token ids of prompts are below it.
        context: positions of the longest sequence.
        longest_context: what the model allows, for errors.
        tokenizer: of the model.
        template: makes the model's chat template, when it is first needed.
        scheduler: runs the generations.
        prefixes: saves and restores what was computed.
        heat: counts the use of experts.
        statistics: returns a snapshot of every actor.
        stop: cancelled to stop the engine.
        origin: where the model comes from; None for one that comes of no file.
    """

    def __init__(
        self,
        *,
        home: Home,
        vocab_size: int,
        context: int,
        longest_context: int,
        tokenizer: Tokenizer,
        template: Callable[[], ChatTemplate],
        scheduler: Scheduler,
        prefixes: PrefixFiles,
        heat: HeatCounter,
        statistics: Callable[[], Statistics],
        stop: trio.CancelScope,
        origin: Origin | None = None,
    ) -> None:
        self._home = home
        self._vocab_size = vocab_size
        self._context = context
        self._longest_context = longest_context
        self._tokenizer = tokenizer
        self._make_template = template
        self._scheduler = scheduler
        self._prefixes = prefixes
        self._heat = heat
        self._statistics = statistics
        self._stop = stop
        self._origin = origin
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()
        self._chats = trio.CapacityLimiter(1)  # chats are rendered one after the other; waiting for it can be cancelled
        self._closed = ""  # or why

    @property
    def spec(self) -> ModelSpec:
        """The model's hyperparameters.

        Raises:
            RuntimeError: the engine is a simulated one, as for the next two.
        """
        return self._opened.model.spec

    @property
    def gguf(self) -> GGUFFile:
        """The model file's header."""
        return self._opened.model.gguf

    @property
    def plan(self) -> MemoryPlan:
        """How the memory budget is spent."""
        return self._opened.plan

    @property
    def _opened(self) -> Origin:
        if self._origin is None:
            raise RuntimeError("a simulated engine has neither a model file nor a memory plan")
        return self._origin

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    def statistics(self) -> Statistics:
        """Return a frozen snapshot of every actor and of the settings in force."""
        return self._statistics()

    def heat_profile(self) -> HeatProfile:
        """Return how often each expert has been used so far; its `save` writes it for the policy "static".

        Raises:
            ConfigError: the model is dense.
        """
        profile = self._heat.profile()
        if not profile.counts.size:
            raise ConfigError("a heat profile counts uses of experts, and the model is dense: it has none")
        return profile

    def close(self) -> None:
        """Stop the engine: running generations raise EngineClosed. Closing twice is allowed.

        In a forked child this ends the child's copy of the engine's tasks, and the parent's engine goes on.
        """
        if self._closed:
            return
        if not self._home.forked:
            self._home.check()
        self._closed = "the engine is closed"
        with suppress(RuntimeError) if self._home.forked else nullcontext():  # a child may have no run to stop
            self._stop.cancel()

    def fail(self, reason: str) -> None:
        """Stop the engine as `close` does, because it can compute nothing more."""
        self._closed = self._closed or f"the engine is closed: {reason}"
        self._stop.cancel()

    def release(self) -> None:
        """End the process that renders chats, if there is one; called when the engine has closed."""
        with self._template_lock:
            template = self._template
        if template is not None:
            template.close()

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

        Concurrent calls are batched and share the experts that are read. If cancelled, the generation ends and
        nothing is left of it. While the queue is full, the call waits to be queued.

        Args:
            prompt: text; or token ids, used exactly as given; or messages, rendered with the file's chat template, or a
                `Chat` of them that tells the template more, such as not to think.
            max_tokens: at most this many tokens, from 1 up; by default 256, or what the context leaves if that is less.
            sampling: how tokens are drawn; greedy by default.
            stop: strings that end the generation; they are not part of the text.
            ignore_eos: never draw an end-of-sequence token.

        Raises:
            RequestError: the request is malformed; ContextOverflow if it needs more positions than there are.
            TemplateError: the file has no chat template, or it cannot render these messages.
            ReadError: bytes that the generation needed could not be read.
            NumericsError: the model computed NaN or infinity.
            GenerationError: drawing a token, or making text of it, failed.
            EngineClosed: the engine is closed.
            ForeignCall: the call comes from outside the engine's trio run or process.
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

        A reader that leaves 64 events unread pauses its own generation and no other. When others wait for its place or
        its KV blocks, a paused generation gives them up. Once its reader has no more than half of those events left to
        read, it is next in line, computes its prompt and its tokens so far again, and goes on where it was. Tokens and
        events are the same as without the pause.
        """
        self._check()
        ids = await self._encode_aside(prompt)
        generation, channel = await self._prepare_aside(ids, max_tokens, sampling, stop, ignore_eos)
        events = TokenStream(self._home, generation, channel, self._scheduler.wake)
        try:
            await self._scheduler.submit(generation)
            yield events
        finally:
            events.cancel()

    @asynccontextmanager
    async def stream_nowait(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> AsyncIterator[TokenStream]:
        """Generate as `stream` does, but refuse at once instead of waiting to be queued, as an overloaded server must.

        Whether there is a place is decided when the block is entered, before the prompt is looked at. The place is kept
        while the prompt is encoded and counts as taken meanwhile; it is given back if that fails or is cancelled. A
        call is refused as long as an earlier `generate` or `stream` waits for a place, so that it never overtakes one.

        Raises:
            trio.WouldBlock: `max_waiting` requests are queued or being encoded, so that `stream` would wait; nothing
                has happened.
        """
        self._check()
        with self._scheduler.reserve() as place:
            ids = await self._encode_aside(prompt)
            generation, channel = await self._prepare_aside(ids, max_tokens, sampling, stop, ignore_eos)
            self._scheduler.submit_nowait(generation, place)
        events = TokenStream(self._home, generation, channel, self._scheduler.wake)
        try:
            await trio.lowlevel.checkpoint()
            yield events
        finally:
            events.cancel()

    def _check(self) -> None:
        """Refuse a call that the engine cannot serve, before anything is touched."""
        if self._closed:
            raise EngineClosed(self._closed)
        self._home.check_task()

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt as `encode` does, while the event loop goes on.

        If cancelled, an encoding ends soon, and a template at once. Chats wait for one another. Raises as `encode`.
        """
        self._check()
        return await self._encode_aside(prompt)

    async def _encode_aside(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt, made in a thread where that takes long: of long texts, many token ids, and of
        chats, whose templates may be malicious.
        """
        if isinstance(prompt, str):
            if len(prompt) < LONG_TEXT:
                return self.encode(prompt)
            return await trio.to_thread.run_sync(self._encode_text, prompt, trio.from_thread.check_cancelled)
        items = _items(prompt)
        if not isinstance(items, Chat):
            return await _aside(len(items) >= LONG_IDS, self._checked_ids, items)
        call = Call()
        try:
            return await trio.to_thread.run_sync(
                self._encode_chat, items, call, abandon_on_cancel=True, limiter=self._chats
            )
        finally:
            call.give_up()

    async def save_prefix(self, prompt: Prompt, path: str | os.PathLike[str]) -> int:
        """Save what a prompt's computation has given, so that `load_prefix` can spare it later, and return the tokens.

        The prompt's keys and values are saved in whole blocks of 64 tokens; the rest of the prompt is not. Blocks that
        are not in memory any more are computed first, as `generate` would. If cancelled, the file is there whole, or as
        it was before, and no other file is left. While another prefix is saved or restored, the call waits.

        Args:
            prompt: as for `generate`.
            path: the file, replaced if there is one; its format is described in docs/prefix-reuse.md. Any
                reader of it can read the prompt; only its owner may read it.

        Raises:
            RequestError: the prompt is malformed, or shorter than a block; ContextOverflow if it leaves no position.
            TemplateError: the file has no chat template, or it cannot render these messages.
            OSError: the file cannot be written.
            ReadError: bytes that the computation needed could not be read.
            NumericsError: the model computed NaN or infinity.
            EngineClosed: the engine is closed.
            ForeignCall: the call comes from outside the engine's trio run or process.
        """
        ids = await self.encode_prompt(prompt)
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
        generation, channel = await self._prepare_aside(ids, 1, None, (), ignore_eos=True)
        generation.keeps_lease = True
        events = TokenStream(self._home, generation, channel, self._scheduler.wake)
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

        The restored blocks are cached like those of finished generations: they are evicted when running generations
        need the memory. If cancelled, it has no effect. While another prefix is saved or restored, the call waits.

        Raises:
            PrefixFileError: the file is malformed, damaged, of another model, other activations or another type of KV,
                or does not fit the KV memory that no generation uses now; then nothing has changed.
            ConfigError: the engine was opened with `prefix_reuse=False`.
            OSError: the file cannot be read.
            EngineClosed: the engine is closed.
            ForeignCall: the call comes from outside the engine's trio run or process.
        """
        self._check()
        return await self._prefixes.load(path)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, as `generate` would use them.

        Blocks: for messages until the file's chat template has run, a millisecond or two, at the first call a tenth of
        a second, and for some seconds if it is malicious. `encode_prompt` does not.

        Raises:
            RequestError: the prompt is none of text, token ids and messages, or a token id is not in the vocabulary;
                ContextOverflow if it is certain to need more positions than there are.
            TemplateError: the file has no chat template, or it cannot render these messages.
            EngineClosed: the prompt is of messages, and the engine is closed.
        """
        if isinstance(prompt, str):
            return self._encode_text(prompt, lambda: None)
        items = _items(prompt)
        if isinstance(items, Chat):
            return self._encode_chat(items, Call())
        return self._checked_ids(items)

    def _checked_ids(self, items: list[Any]) -> list[int]:
        """Return what should be token ids as such; runs in any thread."""
        ids: list[int] = []
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | np.integer):
                raise RequestError(f"a prompt is text, token ids or messages, not a sequence with {item!r}")
            if not 0 <= item < self._vocab_size:
                raise RequestError(f"token id {item} is not in the vocabulary, 0 to {self._vocab_size - 1}")
            ids.append(int(item))
        return ids

    def _encode_chat(self, chat: Chat, call: Call) -> list[int]:
        """Return the token ids of a chat; runs in any thread."""
        try:
            with self._template_lock:
                if self._closed:
                    raise EngineClosed(self._closed)
                if self._template is None:
                    self._template = self._make_template()
            parts = self._template.render_parts(chat, call=call)
        except TemplateError:
            if self._closed:  # which has ended the template's process
                raise EngineClosed(self._closed) from None
            raise
        refuse = self._refusal(lambda: None)
        refuse(self._least_tokens(parts))
        return self._template.encode_parts(parts, progress=refuse)

    def _encode_text(self, text: str, check: Callable[[], None]) -> list[int]:
        """Return the token ids of a text; stop as soon as there are too many, or `check`, called often, raises."""
        refuse = self._refusal(check)
        refuse(self._least_tokens([text]))
        return self._tokenizer.encode(text, progress=refuse)

    def _least_tokens(self, parts: Sequence[str | int]) -> int:
        """Return how many tokens a prompt has at least, before an encoding that would take long."""
        n_bytes = sum(len(part.encode("utf-8", "surrogatepass")) for part in parts if isinstance(part, str))
        longest = max(1, self._tokenizer.longest_token_bytes)  # 0 where every token is a control token
        return n_bytes // longest + sum(isinstance(part, int) for part in parts)

    def _refusal(self, check: Callable[[], None]) -> Callable[[int], None]:
        """Return what refuses a prompt that has too many tokens already, and calls `check` before."""

        def refuse(n_tokens: int) -> None:
            check()
            if n_tokens > self._context:
                raise ContextOverflow(
                    f"the prompt is at least {n_tokens} tokens long, the engine has {self._context} positions per "
                    f"sequence; shorten the prompt or raise the context (the model allows {self._longest_context})"
                )

        return refuse

    async def _prepare_aside(
        self, ids: list[int], max_tokens: int | None, sampling: Sampling | None, stop: Sequence[str], ignore_eos: bool
    ) -> tuple[Generation, trio.MemoryReceiveChannel[Event]]:
        """Check a request and make its generation, in a thread if that takes long."""
        is_long = len(ids) >= LONG_IDS or _n_chars(stop) >= LONG_STOPS
        now_s = trio.current_time()
        return await _aside(is_long, self._prepare, ids, max_tokens, sampling, stop, ignore_eos, now_s)

    def _prepare(
        self,
        ids: list[int],
        max_tokens: int | None,
        sampling: Sampling | None,
        stop: Sequence[str],
        ignore_eos: bool,
        now_s: float,
    ) -> tuple[Generation, trio.MemoryReceiveChannel[Event]]:
        """Check a request and make its generation; runs in any thread."""
        # It could always run in the trio thread. But checking 90,000 token ids held the event loop for 45 to 90 ms, so
        # `_prepare_aside` has long requests prepared in a thread.
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
        if not ids:
            raise RequestError("the prompt is empty; give text or at least one token id")
        if max_tokens is None:
            max_tokens = default_max_tokens(self._context - len(ids))
        if len(ids) + max_tokens > self._context:
            raise ContextOverflow(
                f"{len(ids)} prompt tokens and max_tokens={max_tokens} need {len(ids) + max_tokens} positions, "
                f"the engine has {self._context} per sequence; shorten the prompt, lower max_tokens, or raise "
                f"the context (the model allows {self._longest_context})"
            )
        ends = self._tokenizer.eos_ids
        banned = self._tokenizer.suppressed | ends if ignore_eos else self._tokenizer.suppressed
        if len(banned) == self._tokenizer.vocab_size:
            why = "every token of the model's vocabulary ends a text, or must not be drawn"
            raise RequestError(f"{why}; there is none to draw" + (" with ignore_eos" if ignore_eos else ""))
        send, receive = trio.open_memory_channel[Event](CHANNEL_EVENTS)
        generation = Generation(
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampler=Sampler(sampling, banned),
            output=_Text(self._tokenizer, ids, [stop] if isinstance(stop, str) else stop),
            end_tokens=frozenset() if ignore_eos else ends,
            events=send,
            submitted_s=now_s,
        )
        return generation, receive


async def _aside(is_long: bool, sync_fn: Callable[[*Ts], T], *args: *Ts) -> T:
    """Return what a function returns that is called in a thread if that takes long; it is not interrupted."""
    return await trio.to_thread.run_sync(sync_fn, *args) if is_long else sync_fn(*args)


def _n_chars(stop: Sequence[str]) -> int:
    """Return how long stop strings are together; what are none, and will be refused, have no length."""
    return sum(len(text) for text in stop if isinstance(text, str)) if isinstance(stop, Sequence) else 0


def _items(prompt: Sequence[int] | Sequence[Message] | Chat) -> list[Any] | Chat:
    """Return a prompt that is no text as a chat, or else as what it consists of, whatever iterable it is."""
    if isinstance(prompt, Chat):
        return prompt
    if isinstance(prompt, Message | bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(f"a prompt is text, token ids or a list of messages, not {type(prompt).__name__}")
    items: list[Any] = list(prompt)
    return Chat(items) if items and all(isinstance(item, Message) for item in items) else items
