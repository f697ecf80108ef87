"""The time of one round, with an engine whose every batch takes a known time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock

import mer
from mer.bench.cases import Case
from mer.bench.model_run import run_case

CHUNK_S, STEP_S, CHUNK = 8.0, 0.25, 16


@attrs.define
class SlowEngine:
    """Computes a prompt in chunks of 16 tokens that take 8 s each, then a token every 0.25 s."""

    spec: Any = attrs.field(factory=lambda: SimpleNamespace(vocab_size=100))
    batches: int = 0
    asked: list[tuple[list[int], dict[str, Any]]] = attrs.Factory(list)

    def statistics(self) -> Any:
        n = self.batches
        return SimpleNamespace(
            cache=SimpleNamespace(hits=7 * n, misses=n),
            reader=SimpleNamespace(bytes_read=1000 * n, busy_s=2.0 * n),
            worker=SimpleNamespace(compute_s=3.0 * n),
            stalled_s=0.5 * n,
        )

    @contextlib.asynccontextmanager
    async def stream(self, ids: list[int], **options: Any) -> AsyncIterator[trio.MemoryReceiveChannel[Any]]:
        self.asked.append((ids, options))
        send, receive = trio.open_memory_channel[Any](64)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, send, len(ids), options["max_tokens"])
            with receive:
                yield receive
            nursery.cancel_scope.cancel()

    async def _tell(self, send: trio.MemorySendChannel[Any], n_prompt: int, max_tokens: int) -> None:
        with send:
            for begin in range(0, n_prompt, CHUNK):
                await trio.sleep(CHUNK_S)
                self.batches += 1
                await send.send(mer.PrefillEvent(done=min(begin + CHUNK, n_prompt), total=n_prompt))
            for index in range(max_tokens):
                if index:
                    await trio.sleep(STEP_S)
                    self.batches += 1
                done: Any = object() if index == max_tokens - 1 else None
                await send.send(mer.TokenEvent(token=1, text="", index=index, completion=done))


@pytest.mark.parametrize(
    ("case", "time_s", "first_token_s", "batches"),
    [
        (Case(n_prompt=8), 8.0, 8.0, 1),
        (Case(n_prompt=40), 24.0, 24.0, 3),
        (Case(n_gen=4), 1.0, 8.0, 4),
        (Case(n_gen=1), 0.25, 8.0, 1),
        (Case(n_gen=4, depth=17), 1.0, 16.0, 4),
        (Case(n_prompt=16, depth=32), 8.0, 24.0, 1),
        (Case(n_prompt=32, depth=16), 16.0, 24.0, 2),
        (Case(n_prompt=8, depth=8), 4.0, 8.0, 0.5),
        (Case(n_prompt=20, depth=12), 2.0 + 8.0, 16.0, 1.25),
        (Case(n_prompt=24, depth=20), 6.0 + 8.0, 24.0, 1.75),
    ],
)
async def test_the_time_is_that_of_the_tokens_alone(
    case: Case, time_s: float, first_token_s: float, batches: float, autojump_clock: MockClock
) -> None:
    engine = SlowEngine()
    shown: list[int] = []
    one = await run_case(engine, case, (1, 2), shown.append)  # type: ignore[arg-type]
    counts = one.counts
    assert counts.time_s == pytest.approx(time_s)
    assert one.tokens_per_s == pytest.approx(case.n_tokens / time_s)
    assert one.first_token_s == pytest.approx(first_token_s)
    assert (counts.batches, counts.hits, counts.misses) == (batches, 7 * batches, batches)
    assert (counts.bytes_read, counts.reading_s, counts.compute_s) == (1000 * batches, 2 * batches, 3 * batches)
    assert counts.stalled_s == 0.5 * batches
    assert shown[-1] == case.n_tokens
    [(ids, options)] = engine.asked
    assert len(ids) == case.prompt_tokens
    assert options == {"max_tokens": case.max_tokens, "ignore_eos": True}
