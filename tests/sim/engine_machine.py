"""The whole engine against what each caller would get alone: callers come, read, stop reading and leave at any time."""

from __future__ import annotations

import attrs
import trio
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from mer.sched.events import TokenEvent
from mer.testing.invariants import check_now
from mer.testing.machines import StartedTask, TrioStateMachine
from mer.testing.simdisk import DiskProfile
from mer.testing.simengine import SimEngine, open_sim_engine
from mer.testing.simworker import SimModel

MODEL = SimModel(n_layers=2, n_experts=5, top_k=2)
PROMPTS = ((5,), (2, 3, 4), (2, 3, 4, 5, 6, 7), (2, 3, 4, 5, 6, 7, 8, 9, 10, 11), tuple(2 + i % 14 for i in range(24)))
MOST_CALLERS = 6


@attrs.define(eq=False)
class Caller:
    """Somebody who reads a stream, as many events as it is told to."""

    expected: tuple[int, ...]
    reads: trio.Semaphore
    tokens: list[int] = attrs.Factory(list)
    ended: bool = False
    task: StartedTask[None] | None = None


class EngineMachine(TrioStateMachine):
    """Everyone gets the tokens they would get alone, as soon as they read them, whoever else comes and goes."""

    sim: SimEngine

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[Caller] = []

    @initialize(
        n_slots=st.integers(1, 10),
        batch_tokens=st.integers(2, 6),
        max_sequences=st.integers(1, 2),
        max_waiting=st.integers(1, 2),
        kv_blocks=st.integers(9, 14),  # the longest request takes 9
    )
    def open(self, n_slots: int, batch_tokens: int, max_sequences: int, max_waiting: int, kv_blocks: int) -> None:
        self.sim = self.enter(
            open_sim_engine(
                model=MODEL,
                n_slots=n_slots,
                batch_tokens=batch_tokens,
                max_sequences=max_sequences,
                max_waiting=max_waiting,
                kv_blocks=kv_blocks,
                profile=DiskProfile(jitter=3.0),
            )
        )

    def those_here(self) -> list[Caller]:
        return [caller for caller in self.callers if caller.task is not None and not caller.task.done]

    @precondition(lambda self: len(self.those_here()) < MOST_CALLERS)
    @rule(prompt=st.sampled_from(PROMPTS), max_tokens=st.integers(1, 10), reads=st.integers(0, 20))
    def come(self, prompt: tuple[int, ...], max_tokens: int, reads: int) -> None:
        caller = Caller(self.sim.expected(prompt, max_tokens)[0], trio.Semaphore(reads))
        self.callers.append(caller)

        async def read() -> None:
            async with self.sim.engine.stream(prompt, max_tokens=max_tokens, ignore_eos=True) as events:
                while not caller.ended:
                    await caller.reads.acquire()
                    event = await events.receive()
                    if isinstance(event, TokenEvent):
                        caller.tokens.append(event.token)
                        caller.ended = event.completion is not None

        caller.task = self.start(read)

    @precondition(lambda self: self.those_here())
    @rule(data=st.data(), n=st.integers(1, 10))
    def read(self, data: st.DataObject, n: int) -> None:
        caller = data.draw(st.sampled_from(self.those_here()))
        for _ in range(n):
            caller.reads.release()

    @precondition(lambda self: self.those_here())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.those_here())).task
        assert task is not None
        task.cancel()

    @rule(seconds=st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.sleep(seconds)

    @rule(frozen=st.booleans())
    def change_the_disk(self, frozen: bool) -> None:
        (self.sim.disk.freeze if frozen else self.sim.disk.thaw)()

    @rule(layer=st.integers(0, 1), expert=st.integers(0, 4), part=st.integers(0, 2), times=st.integers(1, 3))
    def fail_for_a_moment(self, layer: int, expert: int, part: int, times: int) -> None:
        """Let a page be unreadable for less than a read is tried; it must not be noticed."""
        self.sim.disk.heal()
        self.sim.break_expert(layer, expert, part=part, times=times)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "sim"):
            self.settle()
            check_now(self.sim)

    @invariant()
    def tokens_are_right(self) -> None:
        for caller in self.callers:
            assert tuple(caller.tokens) == caller.expected[: len(caller.tokens)]

    def teardown(self) -> None:
        if not hasattr(self, "sim"):
            return
        self.sim.disk.thaw()
        self.sim.disk.heal()
        for caller in self.callers:
            for _ in range(100):
                caller.reads.release()
        self.sleep(100.0)
        for caller in self.callers:
            assert caller.task is not None
            assert caller.task.done, "a caller waits for ever"
            assert caller.task.cancelled or tuple(caller.tokens) == caller.expected
        self.await_(self.sim.check_quiet())
