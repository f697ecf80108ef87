"""The scheduler: admits sequences, batches their tokens, and walks the layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

import attrs
import trio

from mer.compute.messages import (
    Batch,
    ComputeWorker,
    Done,
    ReadBlocks,
    WriteBlocks,
)
from mer.errors import EngineClosed, MerError, NumericsError
from mer.sched.admission import AdmissionQueue, Place
from mer.sched.batch import Member, compose
from mer.sched.draws import Answer, Draws, Row
from mer.sched.kv import KVBlocks, Lease, NextBlock
from mer.sched.kv_transfers import Transfers
from mer.sched.layer import WORTH_BYTES, WorkerLink
from mer.sched.prefetch import Prefetcher
from mer.sched.prefix import PrefixNode
from mer.sched.sequence import Sequence, Status
from mer.sched.store import ExpertStore
from mer.sched.walk import LayerWalk


@attrs.frozen(kw_only=True)
class SchedulerStatistics:
    """Counters of the scheduler, and numbers of the sequences that are not over."""

    submitted: int
    finished: int
    failed: int
    cancelled: int
    running: int
    waiting: int  # in line for a place and KV blocks
    reserved: int  # places in the queue that are kept for prompts which are being encoded
    paused: int  # preempted, and not in line again: their readers have not caught up
    preemptions: int
    batches: int
    prompt_tokens: int  # computed; not counted again when a preempted sequence computes them again
    reused_tokens: int  # not computed, as their KV was there, a preempted sequence's own included
    completion_tokens: int


@attrs.define
class _Counters:
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    preemptions: int = 0
    batches: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0


class Scheduler:
    """Runs all sequences together: in each batch one token of every decoding sequence, the rest prompt chunks.

    A batch walks the layers; each layer's experts are looked up once, by the union over the batch. A sequence whose
    channel is full is paused: batches leave it out until its reader has made room. The scheduler notices cancelled
    sequences between layers and between jobs. While nothing is guessed, one job takes a small batch through the layers
    until an expert is missing.

    A paused sequence keeps its place and its KV blocks only while no other needs them. Between batches the scheduler
    preempts it for the first in line, and puts it back in line, before newcomers, when its reader has emptied half of
    its channel. Only paused sequences are ever preempted. So a preempted sequence gives its reader at least half a
    channel of tokens, or all that are left, before it can be preempted again.

    KV blocks are shared as soon as they are full and their batch has ended well: sequences with the same tokens go on
    after these blocks, also those that were admitted before.

    Args:
        n_layers: of the model.
        n_experts: of a layer.
        worker: computes.
        store: experts.
        kv: blocks of the worker's KV memory.
        batch_tokens: largest number of rows in a batch.
        max_sequences: largest number of sequences that run at once.
        max_waiting: sequences that may queue before `submit` waits.
        bytes_read: returns the bytes of experts read so far.
        prefetcher: guesses what layers to come need, or None.
        on_routed: told of each layer's union of experts in a batch: layer, rows, numbers of the experts in order.
        worth_bytes: see `LayerRun`.
        draws: where tokens are drawn.
        where: the model file, for errors.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_experts: int,
        worker: ComputeWorker,
        store: ExpertStore,
        kv: KVBlocks,
        batch_tokens: int,
        max_sequences: int,
        max_waiting: int,
        bytes_read: Callable[[], int],
        prefetcher: Prefetcher | None = None,
        on_routed: Callable[[int, int, Seq[int]], None] | None = None,
        worth_bytes: int = WORTH_BYTES,
        draws: Draws | None = None,
        where: str = "the model file",
    ) -> None:
        self._where = where
        self._prefetcher = prefetcher
        self._draws = Draws() if draws is None else draws
        link = WorkerLink(worker.jobs, worker.results)
        self._walk = LayerWalk(
            n_layers=n_layers,
            n_experts=n_experts,
            worker=worker,
            link=link,
            store=store,
            batch_tokens=batch_tokens,
            prefetcher=prefetcher,
            on_routed=on_routed,
            worth_bytes=worth_bytes,
        )
        self._store = store
        self._kv = kv
        self._batch_tokens = batch_tokens
        self._max_sequences = max_sequences
        self._bytes_read = bytes_read
        self._queue = AdmissionQueue(max_waiting)
        self._running: list[Sequence] = []  # in order of admission
        self._paused: list[Sequence] = []  # preempted, their readers have not caught up
        self._resumed: deque[Sequence] = deque()  # preempted, in line before the queue
        self._wake = trio.Event()
        self._transfers = Transfers(link, self._wake_up)
        self._counters = _Counters()

    async def submit(self, sequence: Sequence) -> None:
        """Queue a sequence, waiting while the queue is full; if cancelled, the sequence is cancelled too.

        Raises:
            EngineClosed: the scheduler has stopped.
        """
        try:
            await self._queue.put(sequence)
        except trio.Cancelled:
            sequence.cancelled = True
            self.wake()
            raise
        self.wake()

    def reserve(self) -> Place:
        """Keep a place in the queue for a sequence to come; see `AdmissionQueue.reserve`."""
        return self._queue.reserve()

    def submit_nowait(self, sequence: Sequence, place: Place) -> None:
        """Queue a sequence in the place that was kept for it.

        Raises:
            EngineClosed: the scheduler has stopped.
        """
        place.enter(sequence)
        self.wake()

    def wake(self) -> None:
        """Make the scheduler look again: a sequence was cancelled, or its reader has made room.

        Cancelled sequences that were not running are gone when this returns.
        """
        cancelled = self._queue.remove_cancelled()
        for preempted in (self._paused, self._resumed):
            for sequence in [s for s in preempted if s.cancelled]:
                preempted.remove(sequence)
                cancelled.append(sequence)
        for sequence in cancelled:
            self._let_go(sequence)
        if all(sequence.cancelled for sequence in self._running):
            self._store.loans.stop()
        self._wake_up()
        self._store.waiting.wake()

    def _wake_up(self) -> None:
        """Wake `run` if it waits for something to do."""
        self._wake.set()

    async def transfer(self, operation: ReadBlocks | WriteBlocks) -> Done:
        """Run an operation on KV blocks between two batches; see `Transfers.run`."""
        return await self._transfers.run(operation)

    def give_back(self, lease: Lease) -> None:
        """Release KV blocks that no sequence of the scheduler holds: others may need them."""
        self._kv.release(lease)
        self._wake_up()

    def take_lease(self, sequence: Sequence) -> Lease | None:
        """Take over the KV blocks of a sequence with `keeps_lease`, if it has generated all it should."""
        if sequence.status is not Status.ENDED or sequence.error is not None:
            return None
        lease, sequence.lease = sequence.lease, None
        return lease

    @property
    def present(self) -> tuple[Sequence, ...]:
        """The sequences that are not over: those that run, those that were preempted, and the queue."""
        return (*self._running, *self._paused, *self._resumed, *self._queue)

    def statistics(self) -> SchedulerStatistics:
        """Return a snapshot."""
        return SchedulerStatistics(
            submitted=self._queue.entered,
            running=len(self._running),
            waiting=len(self._resumed) + len(self._queue),
            reserved=self._queue.n_kept,
            paused=len(self._paused),
            **attrs.asdict(self._counters, recurse=False),
        )

    async def run(self) -> None:
        """Serve sequences until cancelled; those that are left then fail with EngineClosed."""
        try:
            while True:
                await self._transfers.serve()
                self._reap()
                self._admit()
                members, batch = self._compose()
                if batch is None:
                    self._drop_speculation()
                    await self._wake.wait()
                    self._wake = trio.Event()
                else:
                    await self._run_batch(members, batch)
        finally:
            self._close()

    def _drop_speculation(self) -> None:
        """Stop speculation: no batch is to come."""
        self._store.speculation.drop_ahead()
        if self._prefetcher is not None:
            self._prefetcher.stop()

    def _close(self) -> None:
        """Fail every sequence that is left, and refuse new ones."""
        self._transfers.close()
        self._drop_speculation()
        outside = [*self._paused, *self._resumed, *self._queue.close()]
        self._paused.clear()
        self._resumed.clear()
        for sequence in [*self._running, *outside]:
            if sequence.status is not Status.ENDED and not sequence.cancelled:
                sequence.fail(EngineClosed("the engine was closed before the generation had finished"))
        self._reap()
        for sequence in outside:
            self._let_go(sequence)

    def _reap(self) -> None:
        """Remove sequences that have ended or were cancelled."""
        for sequence in list(self._running):
            if sequence.status is Status.ENDED or sequence.cancelled:
                self._running.remove(sequence)
                self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        """Count a sequence that has ended or was cancelled, and take back its KV blocks."""
        if sequence.error is not None:
            self._counters.failed += 1
        elif sequence.status is Status.ENDED:
            self._counters.finished += 1
        else:
            self._counters.cancelled += 1
            sequence.end()
        handed_over = sequence.keeps_lease and sequence.error is None and not sequence.cancelled
        if sequence.lease is not None and not handed_over:
            self._kv.release(sequence.lease)
            sequence.lease = None

    def _admit(self) -> None:
        """Admit sequences in line, first come, first served, while there are places and KV blocks."""
        for sequence in [s for s in self._paused if s.caught_up]:
            self._paused.remove(sequence)
            self._resumed.append(sequence)
        for sequence in self._running:
            self._adopt(sequence)
        while (first := self._resumed[0] if self._resumed else self._queue.first) is not None:
            shared = self._kv.find(first.span, first.n_known - 1)  # the last token's logits are needed
            needed = self._kv.needed(first.total_tokens)
            if not self._make_room(needed, shared):
                return
            first.lease = self._kv.reserve(needed, shared)
            assert first.lease is not None
            if self._resumed:
                self._resumed.popleft()
            else:
                self._queue.take()
                first.started_s = trio.current_time()
            self._counters.reused_tokens += first.reuse(len(shared) * self._kv.block_tokens)
            first.status = Status.PREFILL
            self._running.append(first)

    def _adopt(self, sequence: Sequence) -> None:
        """Let a sequence skip the part of its prompt that others have computed since it was admitted."""
        if sequence.status is Status.PREFILL:
            assert sequence.lease is not None
            there = self._kv.adopt(sequence.lease, sequence.span, sequence.n_known - 1)
            self._counters.reused_tokens += sequence.reuse(there)

    def _share(self, sequence: Sequence) -> None:
        """Let others use the blocks of a sequence that are full, after a batch that has damaged none of its rows."""
        assert sequence.lease is not None
        self._kv.share(sequence.lease, sequence.span, sequence.kv_tokens)

    def _make_room(self, n_blocks: int, shared: tuple[PrefixNode, ...]) -> bool:
        """Preempt paused sequences, the last admitted first, until there are a place and KV blocks.

        If preempting all of them would not be enough, it preempts none and returns False. That cannot be if all that
        run are paused and no prefix is being saved or restored, because no sequence needs more blocks than there are.
        """
        # Leaving paused sequences alone would be simpler: but one stream that nobody reads could then stop every other
        # request, and a task that generates inside its own stream would wait for itself.
        paused = [s for s in self._running if not s.has_room]
        if len(self._running) - len(paused) == self._max_sequences:
            return False
        if not self._kv.fits(n_blocks, shared, [s.lease for s in paused if s.lease is not None]):
            return False
        while len(self._running) == self._max_sequences or not self._kv.fits(n_blocks, shared):
            sequence = paused.pop()
            assert sequence.lease is not None
            self._running.remove(sequence)
            self._kv.release(sequence.lease)
            sequence.lease = None
            sequence.preempt()
            self._paused.append(sequence)
            self._counters.preemptions += 1
        return True

    def _without_followers(self, active: list[Sequence]) -> list[Sequence]:
        """Leave out prompts whose next block an earlier prompt is about to compute, unless a batch takes all rows.

        They go on after that block, so that prompts which come together compute a common prefix once. Where a batch has
        room for all rows, waiting for the next batch would take longer.
        """
        # Without this, as a batch shares its rows fairly, equal prompts would all compute the same rows side by side.
        if sum(sequence.rows_left for sequence in active) <= self._batch_tokens:
            return active
        leading: set[NextBlock] = set()
        rest: list[Sequence] = []
        for sequence in active:
            if sequence.status is Status.PREFILL:
                assert sequence.lease is not None
                wanted = self._kv.next_block(sequence.lease, sequence.span, sequence.n_known - 1)
                if wanted in leading:
                    continue
                if (led := self._kv.next_block(sequence.lease, sequence.span, sequence.n_known)) is not None:
                    leading.add(led)
            rest.append(sequence)
        return rest

    def _compose(self) -> tuple[list[Member], Batch | None]:
        """Build the next batch: a row of every decoding sequence, the other rows shared fairly among the prompts."""
        by_phase = sorted(self._running, key=lambda s: s.status is Status.PREFILL)
        active = self._without_followers([sequence for sequence in by_phase if sequence.has_room])
        return compose(active, self._batch_tokens)

    async def _run_batch(self, members: list[Member], batch: Batch) -> None:
        """Take a batch through all layers and hand out its tokens; an error ends the sequences it concerns."""
        self._counters.batches += 1
        try:
            done = await self._walk.run(members, batch)
        except EngineClosed:
            raise
        except MerError as error:
            for member in members:
                if member.alive:
                    member.sequence.fail(error)
            return
        if done is not None:
            await self._hand_out(members, done)

    async def _hand_out(self, members: list[Member], done: Done) -> None:
        """Draw the tokens of a batch and send each to its sequence; rows that gave NaN may be computed again.

        While it draws, the sequences are as before the batch; one that is cancelled meanwhile gets nothing.
        """
        assert done.logits is not None
        assert done.damaged is not None
        damaged = set(done.damaged.tolist())
        rows: list[Row] = []
        for member, logits in zip(members, done.logits, strict=True):
            gives_token = member.alive and member.sequence.gives_token(member.n_rows)
            rows.append(Row(logits, member.sequence.sampler.next_draw(logits) if gives_token else None))
        answers = await self._draws.run(rows)
        now_s, bytes_read = trio.current_time(), self._bytes_read()
        sound = [
            answer.finite and damaged.isdisjoint(range(m.rows.start, m.rows.stop))
            for m, answer in zip(members, answers, strict=True)
        ]
        forgotten = 0 if all(sound) else self._forget_used()
        for member, answer, is_sound in zip(members, answers, sound, strict=True):
            if member.alive and is_sound:
                self._advance(member, answer, now_s, bytes_read)
            elif member.alive:
                self._doubt(member.sequence, forgotten)

    def _advance(self, member: Member, answer: Answer, now_s: float, bytes_read: int) -> None:
        """Account for a member's rows, and send the token that they gave, if any."""
        sequence = member.sequence
        sequence.doubted = False
        if sequence.status is Status.PREFILL and not sequence.tokens:
            self._counters.prompt_tokens += member.n_rows
        sequence.computed(member.n_rows)
        if answer.error is not None:
            sequence.fail_with(answer.error)
        elif answer.drawn is not None:
            sequence.advance(answer.drawn, now_s, bytes_read)
            self._counters.completion_tokens += sequence.error is None
        if sequence.error is None:
            self._share(sequence)

    def _forget_used(self) -> int:
        """Drop the experts that the last batch has used, any of which may be damaged in memory; return how many."""
        return sum(self._store.residents.forget(layer, experts) for layer, experts in self._walk.used)

    def _doubt(self, sequence: Sequence, forgotten: int) -> None:
        """Compute rows that gave NaN again, with experts read again; fail the sequence if that was done before.

        This mends a bit that has flipped in memory or on the way there. Nothing has been recorded of these rows, and
        the next batch overwrites their KV.
        """
        if forgotten and not sequence.doubted:
            sequence.doubted = True
            return
        again = ", also with experts read again" if sequence.doubted else ""
        sequence.fail(
            NumericsError(
                f"{self._where}: the model gave NaN or infinity{again}: the weights are damaged; get the file again"
            )
        )
