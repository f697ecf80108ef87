"""Where a batch's tokens are drawn, and that nothing of that can be seen in them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import trio
from numpy.typing import NDArray
from trio.testing import MockClock

from mer.config import Sampling
from mer.errors import RequestError
from mer.sched.draws import INLINE_LOGITS, SAMPLED_READS, Answer, Draws, Row
from mer.sched.sampling import Draw, Drawn, Sampler
from mer.testing.simengine import open_sim_engine
from mer.testing.simworker import SimModel

SAMPLED = Sampling(temperature=0.9, seed=4)


def row(sampling: Sampling | None, n_logits: int, seed: int = 0, banned: tuple[int, ...] = ()) -> Row:
    logits = np.random.default_rng(seed).normal(size=n_logits).astype(np.float32)
    return Row(logits, None if sampling is None else Sampler(sampling, banned).next_draw(logits))


@pytest.mark.parametrize(
    ("sampling", "n_logits", "n_rows", "in_thread"),
    [
        (Sampling(), INLINE_LOGITS, 1, False),
        (Sampling(), INLINE_LOGITS // 4, 4, False),
        (Sampling(), INLINE_LOGITS // 4, 5, True),
        (None, INLINE_LOGITS + 1, 1, True),
        (SAMPLED, INLINE_LOGITS // SAMPLED_READS, 1, False),
        (SAMPLED, INLINE_LOGITS // SAMPLED_READS + 1, 1, True),
        (SAMPLED, INLINE_LOGITS // SAMPLED_READS // 2, 3, True),
    ],
)
async def test_quick_draws_stay_in_the_trio_thread_and_all_others_leave_it_together(
    monkeypatch: pytest.MonkeyPatch, sampling: Sampling | None, n_logits: int, n_rows: int, in_thread: bool
) -> None:
    threads: list[threading.Thread] = []
    isfinite = np.isfinite

    def noting(values: NDArray[np.float32]) -> NDArray[np.bool_]:
        threads.append(threading.current_thread())
        return isfinite(values)

    rows = [row(sampling, n_logits, seed) for seed in range(n_rows)]
    monkeypatch.setattr(np, "isfinite", noting)
    answers = await Draws().run(rows)
    assert len(threads) == len(answers) == n_rows
    assert {thread is threading.current_thread() for thread in threads} == {not in_thread}
    assert len(set(threads)) == 1
    for given, answer in zip(rows, answers, strict=True):
        assert answer == Answer(finite=True, drawn=None if given.draw is None else given.draw.compute())


async def test_each_row_has_an_answer_of_its_own() -> None:
    infinite = row(Sampling(), 4)
    infinite.logits[2] = np.inf
    good, none_left = row(SAMPLED, 4, seed=1), row(Sampling(), 3, banned=(0, 1, 2))
    answers = await Draws(inline_logits=0).run([infinite, good, none_left, row(None, 5)])
    assert answers[0] == Answer(finite=False)
    assert good.draw is not None
    assert answers[1] == Answer(finite=True, drawn=good.draw.compute())
    assert isinstance(answers[2].error, RequestError)
    assert answers[2].drawn is None
    assert answers[3] == Answer(finite=True)


async def test_a_program_that_has_taken_all_threads_of_trio_does_not_stop_the_draws() -> None:
    limiter = trio.to_thread.current_default_thread_limiter()
    users = [object() for _ in range(int(limiter.available_tokens))]
    for user in users:
        limiter.acquire_on_behalf_of_nowait(user)
    try:
        with trio.fail_after(60):
            await Draws(inline_logits=0).run([row(SAMPLED, 10)])
    finally:
        for user in users:
            limiter.release_on_behalf_of(user)


def test_a_draw_that_was_asked_for_again_is_the_same_and_the_next_one_another() -> None:
    logits = np.zeros(1000, np.float32)
    sampler, twin = Sampler(SAMPLED), Sampler(SAMPLED)
    want = [twin.draw(logits) for _ in range(3)]
    assert len(set(want)) == 3
    tokens = []
    for _ in range(3):
        first, again = sampler.next_draw(logits), sampler.next_draw(logits)
        assert first.uniform == again.uniform
        tokens.append(sampler.took(again.compute()))
    assert tokens == want


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED])
async def test_tokens_are_the_same_wherever_and_beside_whomever_they_are_drawn(
    autojump_clock: MockClock, sampling: Sampling
) -> None:
    prompts = [(5, 6, 7), (8, 9), (3,), (5, 6)]
    for in_thread in (False, True):
        async with open_sim_engine(draws_in_thread=in_thread) as sim, trio.open_nursery() as nursery:

            async def ask(prompt: tuple[int, ...]) -> None:
                done = await sim.engine.generate(prompt, max_tokens=6, sampling=sampling, ignore_eos=True)
                assert done.tokens == sim.expected(prompt, 6, sampling=sampling)[0]

            for prompt in prompts:
                nursery.start_soon(ask, prompt)


async def test_who_is_cancelled_while_tokens_are_drawn_gets_none_and_the_others_get_theirs(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Draw.compute
    during: list[Callable[[], None]] = []

    def computing(draw: Draw) -> Drawn:
        for call in during:
            call()
        during.clear()
        return compute(draw)

    monkeypatch.setattr(Draw, "compute", computing)
    async with open_sim_engine(draws_in_thread=True) as sim:
        async with sim.engine.stream((5, 6), max_tokens=4) as leaving, sim.engine.stream((7,), max_tokens=2) as staying:
            during.append(leaving.cancel)  # in the middle of the first draw
            tokens = [event.token async for event in staying if hasattr(event, "token")]
            with pytest.raises(trio.ClosedResourceError):
                await leaving.receive()
        assert tokens == list(sim.expected((7,), 2)[0])
        statistics = sim.scheduler.statistics()
        assert (statistics.cancelled, statistics.finished, statistics.completion_tokens) == (1, 1, 2)
        await sim.check_quiet()


async def test_logits_that_are_not_finite_cost_a_sequence_no_uniform_number(autojump_clock: MockClock) -> None:
    """The rows are computed again with experts read anew, and the token is drawn with the number that it had."""
    model = SimModel(n_layers=1, n_experts=2, top_k=1)
    async with open_sim_engine(model=model, draws_in_thread=True) as sim:
        run = sim.scheduler._draws.run
        spoiled: list[list[Row]] = []

        async def spoiling(rows: list[Row]) -> list[Answer]:
            if len(spoiled) < 1:
                spoiled.append(rows)
                return [Answer(finite=False) for _ in rows]
            return await run(rows)

        sim.scheduler._draws.run = spoiling  # type: ignore[assignment, method-assign]
        done = await sim.engine.generate((4, 5), max_tokens=5, sampling=SAMPLED, ignore_eos=True)
        assert done.tokens == sim.expected((4, 5), 5, sampling=SAMPLED)[0]
        assert spoiled
        await sim.check_quiet()
