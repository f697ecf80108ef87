"""The queue of chunks against a plain list of what there is to read."""

from __future__ import annotations

import random
from math import inf

import attrs
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.errors import ReadError
from mer.io.chunks import Chunk, ChunkQueue, Work
from mer.io.pool import Priority
from mer.io.reader import ReadOperation

PAGE = 4096
MEMORY = np.zeros(16 * PAGE, dtype=np.uint8)
DEMAND, READ_AHEAD, PREFETCH = Priority


def operation(n_chunks: int, priority: Priority = DEMAND) -> ReadOperation:
    n_bytes = n_chunks * PAGE
    return ReadOperation(
        file=0,
        start=0,
        length=n_bytes,
        needed=n_bytes,
        buffer=MEMORY[:n_bytes],
        on_landed=lambda _: None,
        priority=priority,
    )


def failure() -> ReadError:
    return ReadError("file", 0, PAGE, "broken", 5)


@attrs.define(eq=False)
class Plain:
    """What the model knows of an operation."""

    operation: ReadOperation
    number: int
    waiting: list[int]  # chunks that no thread has begun
    reading: set[int] = attrs.Factory(set)
    failed: bool = False

    @property
    def over(self) -> bool:
        return not self.waiting and not self.reading


class Model:
    """One copy, any number of threads; every thread that is free takes what it gets."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.n_threads = rng.randint(1, 4)
        self.limit = rng.randint(1, 3)
        self.queue = ChunkQueue(n_threads=self.n_threads, chunk_bytes=PAGE, prefetch_threads=self.limit)
        self.plain: list[Plain] = []
        self.taken: dict[Chunk, Plain] = {}
        self.speculative: set[Chunk] = set()
        self.n_added = 0

    def check_ended(self, ended: list[Work]) -> None:
        over = [plain for plain in self.plain if plain.over]
        assert {work.operation for work in ended} == {plain.operation for plain in over}
        assert len(ended) == len(over)
        for work in ended:
            plain = next(plain for plain in over if plain.operation is work.operation)
            assert (work.error is not None) is plain.failed
        self.plain = [plain for plain in self.plain if not plain.over]
        assert self.queue.operations == tuple(plain.operation for plain in self.plain)
        waiting = [
            sum(len(plain.waiting) * PAGE for plain in self.plain if plain.operation.priority is priority)
            for priority in Priority
        ]
        assert list(self.queue.queued_bytes()) == waiting

    def add(self) -> None:
        new = operation(self.rng.randint(1, 5), self.rng.choice(list(Priority)))
        self.plain.append(Plain(new, self.n_added, list(range(new.length // PAGE))))
        self.n_added += 1
        self.check_ended(self.queue.add(new, "file", 0.0))

    def take(self) -> None:
        if len(self.taken) == self.n_threads:
            return
        may_guess = len(self.speculative) < self.limit
        candidates = [
            plain for plain in self.plain if plain.waiting and (plain.operation.priority is not PREFETCH or may_guess)
        ]
        got = self.queue.take(0, 0.0)
        if not candidates:
            assert got == inf
            return
        expected = min(candidates, key=lambda plain: (plain.operation.priority, plain.number))
        assert isinstance(got, Chunk)
        assert got.work.operation is expected.operation
        number = expected.waiting.pop(0)
        assert (got.begin, got.end) == (number * PAGE, number * PAGE + PAGE)
        expected.reading.add(number)
        self.taken[got] = expected
        if expected.operation.priority is PREFETCH:
            self.speculative.add(got)

    def finish(self, *, well: bool) -> None:
        if not self.taken:
            return
        chunk = self.rng.choice(list(self.taken))
        plain = self.taken.pop(chunk)
        self.speculative.discard(chunk)
        plain.reading.remove(chunk.begin // PAGE)
        if not well:
            plain.failed = True
            plain.waiting.clear()
        self.check_ended(self.queue.finish(chunk, None if well else failure(), 0.0))

    def promote(self) -> None:
        if not self.plain:
            return
        plain = self.rng.choice(self.plain)
        priority = Priority(self.rng.randint(0, plain.operation.priority))
        if priority is not plain.operation.priority:
            self.speculative = {chunk for chunk in self.speculative if self.taken[chunk] is not plain}
        self.queue.promote(plain.operation, priority, 0.0)
        assert plain.operation.priority is priority
        self.check_ended([])

    def cancel(self) -> None:
        if not self.plain:
            return
        plain = self.rng.choice(self.plain)
        plain.failed = plain.failed or bool(plain.waiting)
        plain.waiting.clear()
        self.check_ended(self.queue.cancel(plain.operation))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from("aattttffffepc"), max_size=150))
def test_the_queue_gives_what_a_plain_list_would(seed: int, actions: list[str]) -> None:
    model = Model(random.Random(seed))
    calls = {"a": model.add, "t": model.take, "p": model.promote, "c": model.cancel}
    for action in actions:
        if action in calls:
            calls[action]()
        else:
            model.finish(well=action == "f")
    while model.plain:
        model.take()
        model.finish(well=True)
    assert model.queue.queued_bytes() == (0, 0, 0)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_with_copies_that_fail_and_hang_everything_ends_right(seed: int) -> None:
    """Threads of several copies at work until nothing is left; what landed was read well, once, and else not at all."""
    rng = random.Random(seed)
    n_copies, n_threads = rng.randint(1, 4), rng.randint(1, 3)
    queue = ChunkQueue(n_copies=n_copies, n_threads=n_threads, chunk_bytes=PAGE)
    bad = rng.choice([0.0, 0.2, 0.7])
    idle = [n_threads] * n_copies
    reading: list[Chunk] = []
    ended: list[Work] = []
    read_well: dict[ReadOperation, list[int]] = {}
    tried: dict[tuple[ReadOperation, int], list[int]] = {}
    operations, cancelled, written_off = [], set(), set()
    now_s, steps = 0.0, rng.randint(1, 80)

    while steps or reading or queue.operations:
        now_s += rng.random() * rng.choice([1e-4, 1])
        action = rng.random()
        if steps and action < 0.3:
            new = operation(rng.randint(1, 6), rng.choice(list(Priority)))
            operations.append(new)
            read_well[new] = []
            ended += queue.add(new, "file", now_s)
        elif steps and action < 0.35 and queue.operations:
            victim = rng.choice(queue.operations)
            cancelled.add(victim)
            ended += queue.cancel(victim)
        elif steps and action < 0.40 and queue.operations:
            victim = rng.choice(queue.operations)
            written_off.add(victim)
            done, bereft = queue.write_off(victim, now_s)
            for copy in bereft:
                if rng.random() < 0.2:
                    done += queue.lose_thread(copy)
                else:
                    idle[copy] += 1
            ended += done + queue.end_hopeless()
        elif action < 0.7 or not reading:
            copy = rng.randrange(n_copies)
            if idle[copy]:
                got = queue.take(copy, now_s)
                if isinstance(got, Chunk):
                    assert got.copy == copy
                    history = tried.setdefault((got.work.operation, got.begin), [])
                    assert copy not in history, "read twice from one copy"
                    history.append(copy)
                    idle[copy] -= 1
                    reading.append(got)
                else:
                    assert got > 0
                    if not reading and queue.operations:
                        now_s += min(got, 61.0)  # nothing else will happen before
        else:
            chunk = reading.pop(rng.randrange(len(reading)))
            well = rng.random() >= bad
            if well:
                read_well[chunk.work.operation].append(chunk.begin)
            ended += queue.finish(chunk, None if well else failure(), now_s)
            if not (chunk.written_off and queue.dismiss(chunk.copy)):
                idle[chunk.copy] += 1
        steps -= bool(steps)
        assert [copy.working for copy in queue.copies] == [
            idle[n] + sum(c.copy == n and not c.written_off for c in reading) for n in range(n_copies)
        ]
        for each in queue.copies:
            assert each.threads <= 2 * n_threads
            assert 0 <= each.stuck <= each.threads
        assert any(each.working for each in queue.copies) or not any(queue.queued_bytes())
    assert len(ended) == len(operations)
    assert {work.operation for work in ended} == set(operations)
    for work in ended:
        wanted = list(range(0, work.operation.length, PAGE))
        read = sorted(read_well[work.operation])
        assert len(set(read)) == len(read)
        if work.error is None:
            assert read == wanted
        else:
            assert work.incomplete is (work.error.reason.startswith("cancelled"))
            assert read != wanted
            if work.incomplete:
                assert work.operation in cancelled | written_off
            elif not written_off:
                assert bad


def test_a_promotion_is_what_its_latency_counts_from() -> None:
    queue = ChunkQueue(n_threads=1, chunk_bytes=PAGE)
    new = operation(1, PREFETCH)
    queue.add(new, "file", 10.0)
    queue.promote(new, DEMAND, 15.0)
    chunk = queue.take(0, 16.0)
    assert isinstance(chunk, Chunk)
    assert queue.stalled_s(new, 18.0) == 2.0
    (work,) = queue.finish(chunk, None, 20.0)
    assert (work.started_s, work.wanted_s) == (10.0, 15.0)
    assert queue.stalled_s(new, 20.0) == 0.0


def test_equal_copies_do_not_leave_the_last_chunk_to_each_other() -> None:
    """Only to one that would have read it before: of threads that take equally long, the first to ask begins."""
    queue = ChunkQueue(n_copies=2, n_threads=4, chunk_bytes=PAGE)
    queue.add(operation(2), "file", 0.0)
    for copy in (0, 1):
        chunk = queue.take(copy, 0.0)
        assert isinstance(chunk, Chunk)
        queue.finish(chunk, None, 1.0)  # a second for each
    queue.add(operation(1), "file", 1.0)
    assert isinstance(queue.take(1, 1.0), Chunk)


def test_a_slower_copy_leaves_the_last_chunk_to_the_faster() -> None:
    queue = ChunkQueue(n_copies=2, n_threads=4, chunk_bytes=PAGE)
    queue.add(operation(2), "file", 0.0)
    for copy, ended_s in ((0, 1.0), (1, 3.0)):
        chunk = queue.take(copy, 0.0)
        assert isinstance(chunk, Chunk)
        queue.finish(chunk, None, ended_s)
    queue.add(operation(1), "file", 3.0)
    assert queue.take(1, 3.0) == 3.0  # as long as it would read itself
    assert isinstance(queue.take(0, 3.0), Chunk)
