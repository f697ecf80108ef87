"""Callers of a simulated engine, and the judge of what they get."""

from __future__ import annotations

from collections.abc import Collection

import attrs
import trio

from mer.errors import ComputeError, EngineClosed, FileSuspended, MerError, NumericsError, ReadError
from mer.sched.events import Completion, PrefillEvent, TokenEvent
from mer.testing.simengine import END_TOKEN, SimEngine, letter
from mer.testing.world import Feature, SimRequest, SimWorld


@attrs.define(eq=False)
class Outcome:
    """Outcome of a request."""

    tokens: list[int] = attrs.Factory(list)  # that it has received
    completion: Completion | None = None
    error: MerError | None = None
    cancelled: bool = False
    refused_by: int | None = None  # requests that were in line when it was refused as one that does not wait
    scope: trio.CancelScope | None = None  # that the caller is in, from its arrival on
    log: list[tuple[float, str]] = attrs.Factory(list)  # when it received what


async def call(sim: SimEngine, request: SimRequest, outcome: Outcome) -> None:
    """Be one caller: read the stream at its pace, check that the events fit together, and note what comes.

    An error of the engine is noted, not raised.
    """
    await trio.sleep(request.arrives_s)
    patience_s = float("inf") if request.cancelled_after_s is None else request.cancelled_after_s
    with trio.move_on_after(patience_s) as outcome.scope:
        await trio.lowlevel.checkpoint()
        try:
            await _read(sim, request, outcome)
        except MerError as error:
            outcome.error = error
            outcome.log.append((trio.current_time(), type(error).__name__))
        except trio.WouldBlock:
            outcome.refused_by = (
                sim.scheduler.statistics().waiting
            )  # none is reserved: these prompts take no time to encode
            outcome.log.append((trio.current_time(), "refused"))
    outcome.cancelled = outcome.scope.cancelled_caught


async def _read(sim: SimEngine, request: SimRequest, outcome: Outcome) -> None:
    text, done, last = "", 0, None
    stream = sim.engine.stream_nowait if request.nowait else sim.engine.stream
    async with stream(
        request.prompt,
        max_tokens=request.max_tokens,
        ignore_eos=request.ignore_eos,
        sampling=request.sampling,
        stop=request.stop,
    ) as events:
        async for event in events:
            assert last is None, "an event after the last one"
            outcome.log.append((trio.current_time(), repr(event)))
            if isinstance(event, PrefillEvent):
                assert not outcome.tokens, "progress through the prompt after the first token"
                assert done < event.done <= event.total == len(request.prompt)
                done = event.done
            else:
                assert isinstance(event, TokenEvent)
                assert event.index == len(outcome.tokens), "a token is missing, or came twice"
                outcome.tokens.append(event.token)
                text += event.text
                last = event.completion
                assert (last is None) == (event.finish_reason is None)
            await trio.sleep(request.reads_every_s)
    assert last is not None, "the stream ended without a last token"
    assert last.tokens == tuple(outcome.tokens)
    assert last.text == text
    assert last.usage.prompt_tokens == len(request.prompt)
    assert last.usage.completion_tokens == len(outcome.tokens)
    assert 0 <= last.timings.queue_s <= last.timings.prefill_s
    assert last.timings.decode_s >= 0
    outcome.completion = last


def judge(
    sim: SimEngine,
    world: SimWorld,
    request: SimRequest,
    outcome: Outcome,
    *,
    unreadable: Collection[tuple[int, int]],
    doubtful: Collection[tuple[int, int]],
) -> None:
    """Assert that a caller got what it would get alone, or less for a reason that the world has.

    Args:
        sim: the engine.
        world: what it was opened for.
        request: what was asked for.
        outcome: what came of it.
        unreadable: experts that can never be read.
        doubtful: experts of which a read may have failed.
    """
    tokens, used = sim.expected(
        request.prompt,
        request.max_tokens,
        ignore_eos=request.ignore_eos,
        sampling=request.sampling,
        stop=request.stop,
    )
    computed = [*request.prompt, *tokens[:-1]]  # tokens that go through the layers
    damaged = next((i for i, token in enumerate(computed) if token in world.model.nan_hidden), len(computed))
    n_sound = max(0, damaged - len(request.prompt) + 1)  # tokens that come before NaN does
    got, error = tuple(outcome.tokens), outcome.error
    assert got == tokens[: len(got)], f"{got} is not what {tokens} begins with"
    if outcome.refused_by is not None:
        assert request.nowait, "refused, though it would have waited"
        assert outcome.refused_by >= world.max_waiting, "refused, though there was a place"
        assert not got
        return
    if outcome.completion is not None:
        assert error is None
        assert not outcome.cancelled
        assert got == tokens, "the generation ended early"
        assert n_sound >= len(tokens), "NaN went unnoticed"
        assert not used & set(unreadable), "an expert was computed that cannot be read"
        assert (outcome.completion.text, outcome.completion.finish_reason) == _text(request, tokens)
    elif error is None:
        assert outcome.cancelled, "neither tokens nor an error"
        assert request.cancelled_after_s is not None or world.deserted_at_s is not None
    elif isinstance(error, FileSuspended):
        assert doubtful, "a file that nothing is wrong with was left alone"
    elif isinstance(error, ReadError):
        assert used & {*doubtful, *unreadable} or _hangs(world), f"failed for an expert it does not use: {error}"
    elif isinstance(error, NumericsError):
        assert len(got) <= n_sound < len(tokens), "NaN where none is"
    elif isinstance(error, EngineClosed):
        assert world.closed_after_s is not None or _hangs(world), "closed by nobody"
    else:
        assert isinstance(error, ComputeError), repr(error)
        assert world.worker_faults.failing_jobs, "no job failed"


def _hangs(world: SimWorld) -> bool:
    """Return whether threads and slots may have been lost to reads that never return."""
    return Feature.HANGING_READS in world.features


def _text(request: SimRequest, tokens: tuple[int, ...]) -> tuple[str, str]:
    """Return the text and the finish reason of a generation."""
    if tokens[-1] == END_TOKEN and not request.ignore_eos:
        return "".join(map(letter, tokens[:-1])), "stop"
    text = "".join(map(letter, tokens))
    n_cut = max((len(stop) for stop in request.stop if text.endswith(stop)), default=0)
    return text[: len(text) - n_cut], "stop" if n_cut else "length"
