"""One generation as the command line sees it: events become text on standard output, bars and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import trio

from mer.cli.console import Bars, note
from mer.cli.interrupt import Interrupt
from mer.cli.options import GenerationOptions
from mer.config import default_max_tokens
from mer.sched.events import PrefillEvent
from mer.units import format_bytes, format_duration, format_slots

if TYPE_CHECKING:
    from mer.engine import Engine
    from mer.sched.events import Completion
    from mer.stats import Statistics
    from mer.text.chat import Chat, Message

INTERRUPTED = "interrupted"  # the finish reason of a generation that ctrl-C or a closed pipe ended


@attrs.define
class Result:
    """What one generation gave, whole or interrupted, and its figures."""

    text: str = ""
    tokens: list[int] = attrs.Factory(list)
    finish_reason: str = INTERRUPTED
    seed: int | None = None  # of a sampled generation that was not interrupted
    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, not computed
    prefill_s: float = 0.0  # from submission to the first token
    decode_s: float = 0.0  # from the first token to the last
    decode_bytes_read: int = 0  # in decode_s
    hits: int = 0  # (layer, expert) lookups while it ran, those of other generations included
    misses: int = 0
    bytes_read: int = 0  # from submission to the end
    reader_gone: bool = False  # standard output was closed by its reader


async def generate(
    engine: Engine,
    prompt: str | Sequence[int] | Sequence[Message] | Chat,
    options: GenerationOptions,
    *,
    write: Callable[[str], None],
    bars: Bars,
    interrupt: Interrupt,
    show_tokens: bool,
    before_text: Callable[[], None] = lambda: None,
) -> Result:
    """Stream one generation to `write` until it ends, ctrl-C is pressed, or `write` raises BrokenPipeError.

    Args:
        engine: an open engine.
        prompt: text, token ids, messages or a chat.
        options: what is generated; without a number of tokens it is 256, or what the context has left.
        write: takes every piece of text as it comes.
        bars: draw the reading of the prompt, and the generation if `show_tokens`.
        interrupt: entered; its first ctrl-C ends the generation.
        show_tokens: draw a bar of generated tokens too (never together with text on the same terminal).
        before_text: called once, when the bars are gone and the first token is there.
    """
    result = Result()
    pieces: list[str] = []
    before = engine.statistics()
    first_s = 0.0
    first_bytes = 0
    with interrupt.stopping():
        ids = await engine.encode_prompt(prompt)
        max_tokens = options.max_tokens
        if max_tokens is None:
            max_tokens = default_max_tokens(engine.plan.context - len(ids))
        started_s = trio.current_time()
        async with engine.stream(ids, max_tokens=max_tokens, **options.arguments()) as events:
            async for event in events:
                if isinstance(event, PrefillEvent):
                    result.prompt_tokens, result.reused_tokens = event.total, event.cached
                    bars.show("reading the prompt", event.done, event.total, "tokens")
                    continue
                now_s = trio.current_time()
                if not result.tokens:
                    first_s = now_s
                    first_bytes = engine.statistics().bytes_read
                    result.prefill_s = first_s - started_s
                    bars.clear()
                    before_text()
                result.tokens.append(event.token)
                result.decode_s = now_s - first_s
                pieces.append(event.text)
                if show_tokens:
                    bars.show("generating", len(result.tokens), max_tokens, "tokens")
                try:
                    write(event.text)
                except BrokenPipeError:
                    result.reader_gone = True
                    break
                if event.completion is not None:
                    _take_completion(result, event.completion)
                    if options.temperature == 0:
                        result.seed = None  # a greedy generation draws nothing
    bars.clear()
    result.text = "".join(pieces)
    after = engine.statistics()
    result.hits = after.cache.hits - before.cache.hits
    result.misses = after.cache.misses - before.cache.misses
    result.bytes_read = after.bytes_read - before.bytes_read
    if result.finish_reason == INTERRUPTED and result.tokens:
        result.decode_bytes_read = after.bytes_read - first_bytes
    return result


def _take_completion(result: Result, completion: Completion) -> None:
    """Take the engine's own account of a generation that was not interrupted."""
    result.finish_reason = completion.finish_reason
    result.seed = completion.seed
    result.prompt_tokens = completion.usage.prompt_tokens
    result.reused_tokens = completion.usage.cached_tokens
    result.prefill_s = completion.timings.prefill_s
    result.decode_s = completion.timings.decode_s
    result.decode_bytes_read = completion.timings.decode_bytes_read


def statistics_object(result: Result, statistics: Statistics) -> dict[str, Any]:
    """Return the figures of a generation and its engine as `--json` prints them; times in seconds, sizes in bytes."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused_tokens,
        "completion_tokens": len(result.tokens),
        "load_s": statistics.load_s,
        "prefill_s": result.prefill_s,
        "decode_s": result.decode_s,
        "cache_hits": statistics.cache.hits,
        "cache_misses": statistics.cache.misses,
        "bytes_read": statistics.bytes_read,
        "decode_bytes_read": result.decode_bytes_read,
        "peak_rss_bytes": statistics.peak_rss_bytes,
        "active_threads": statistics.worker.active_threads,
        "active_reason": statistics.worker.active_reason,
    }


def settings_object(statistics: Statistics) -> dict[str, Any]:
    """Return the settings in force as `--json` prints them."""
    return attrs.asdict(statistics.settings)


def _threads(statistics: Statistics) -> str:
    """Say how many threads may compute, and how many did if they were fewer."""
    worker, said = statistics.worker, f"{statistics.settings.threads} threads"
    if worker.active_threads < worker.n_threads:
        said += f" ({worker.active_threads} in the last job: {worker.active_reason})"
    return said


def say_statistics(result: Result, statistics: Statistics) -> None:
    """Print the figures of a generation for a person, on standard error."""
    for line in summary(result, statistics):
        note(line, "dim")


def summary(result: Result, statistics: Statistics) -> list[str]:
    """Return the figures of a generation as lines of text that fit a narrow terminal."""
    n_tokens = len(result.tokens)
    lookups = result.hits + result.misses
    generated = f"{n_tokens} tokens ({result.finish_reason})"
    prompt = f"prompt: {result.prompt_tokens} tokens"
    experts = f"experts: {result.hits / lookups:.1%} of {lookups} lookups hit" if lookups else "experts: none"
    read = f"; read {format_bytes(result.bytes_read)}"
    if result.seed is not None:
        generated += f" with seed {result.seed}"
    if result.decode_s > 0:
        generated += f", {(n_tokens - 1) / result.decode_s:.1f} tokens/s"
        read += f", {format_bytes(result.decode_bytes_read / (n_tokens - 1))} per generated token"
    if result.reused_tokens:
        prompt += f" ({result.reused_tokens} reused)"
    if result.prefill_s > 0:
        rate = (result.prompt_tokens - result.reused_tokens) / result.prefill_s
        prompt += f", {rate:.1f} tokens/s; first token after {format_duration(result.prefill_s)}"
    settings = statistics.settings
    lines = [
        generated,
        f"{prompt}; loaded in {format_duration(statistics.load_s)}",
        *([experts + read] if settings.slot_counts else []),
        f"memory: {format_bytes(statistics.private_bytes)} of a budget of {format_bytes(settings.memory_bytes)}; "
        f"{format_slots(settings.slot_counts, settings.slot_bytes)}; "
        f"peak RSS with file pages {format_bytes(statistics.peak_rss_bytes)}",
        f"in force: {settings.kernels} kernels, {settings.activations} activations, {settings.kv_type} KV, "
        f"{_threads(statistics)}, {'direct' if all(mode.direct for mode in settings.io_modes) else 'buffered'} "
        f"reads by {settings.io_engine}, {settings.policy} cache, context {settings.context}, "
        f"prefill chunk {settings.batch_tokens}",
    ]
    if settings.vram is not None and (vram := statistics.worker.vram) is not None:
        used = format_bytes(sum(settings.vram.parts.values()))
        lines.append(
            f"device: {settings.device} ({settings.device_reason}); VRAM {used} of "
            f"{format_bytes(settings.vram.budget_bytes)}, {vram.resident} of {vram.slots} slots in use; experts "
            f"computed there {vram.hits + vram.uploads}, copied {vram.uploads} ({format_bytes(vram.upload_bytes)})"
        )
    return lines
