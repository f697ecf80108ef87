"""One round of a whole-model benchmark: a generation timed by its events, and what the engine counted meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from mer.bench.cases import Case, spread_tokens
from mer.bench.model_results import Counts, Round
from mer.sched.events import PrefillEvent

if TYPE_CHECKING:
    from mer.engine import Engine


async def run_case(engine: Engine, case: Case, seed: tuple[int, int], on_token: Callable[[int], None]) -> Round:
    """Generate once, greedily and never ending early, and return what the tokens of the case took.

    A prompt's time runs from its submission to the first token, a generation's from the first token to the last. Where
    a prompt comes after others at a depth, its time begins at the end of the batch in which the depth is reached; a
    batch that holds tokens of both is shared out by their numbers.

    Args:
        engine: an open engine that reuses no prefixes and does nothing else.
        case: what is run.
        seed: of the prompt's tokens.
        on_token: called with the tokens of the case that are done.

    Raises:
        MerError: what the engine raises.
    """
    prompt = spread_tokens(case.prompt_tokens, engine.spec.vocab_size, seed)
    batches = done = 0
    begin: Counts | None = None
    before = count(engine, 0)
    submitted = before
    end: Counts | None = None
    first_token_s = 0.0
    if case.n_prompt and not case.depth:
        begin = submitted
    async with engine.stream(prompt, max_tokens=case.max_tokens, ignore_eos=True) as events:
        async for event in events:
            if isinstance(event, PrefillEvent):
                batches += 1
                if case.n_prompt and begin is None:
                    now = count(engine, batches)
                    if event.done >= case.depth:
                        begin = before.towards(now, (case.depth - done) / (event.done - done))
                    before = now
                done = event.done
                on_token(max(0, done - case.depth) if case.n_prompt else 0)
                continue
            now_s = trio.current_time()
            if event.index == 0:
                first_token_s = now_s - submitted.time_s
                if not case.n_prompt:
                    begin = count(engine, batches)
            else:
                batches += 1
                on_token(event.index)
            if event.completion is not None:
                end = count(engine, batches, now_s)
    assert begin is not None
    assert end is not None
    return Round(n_tokens=case.n_tokens, first_token_s=first_token_s, counts=end.since(begin))


def count(engine: Engine, batches: int, now_s: float | None = None) -> Counts:
    """Return what the engine has counted up to now, and the time when that is known, or `now_s`."""
    statistics = engine.statistics()
    return Counts(
        time_s=trio.current_time() if now_s is None else now_s,
        batches=batches,
        hits=statistics.cache.hits,
        misses=statistics.cache.misses,
        bytes_read=statistics.reader.bytes_read,
        reading_s=statistics.reader.busy_s,
        stalled_s=statistics.stalled_s,
        compute_s=statistics.worker.compute_s,
    )
