"""The scheduler: admits sequences, batches their tokens, and walks the layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import attrs
import numpy as np
import trio

from mer.compute.worker import (
    Attend,
    Batch,
    Begin,
    Combine,
    ComputeWorker,
    Done,
    Int32Array,
    LoadedExpert,
    Operation,
    Project,
    ReadBlocks,
    RunExperts,
    RunResident,
    WriteBlocks,
)
from mer.errors import EngineClosed, MerError, NumericsError
from mer.sched.admission import AdmissionQueue
from mer.sched.kv import KVBlocks, Lease, NextBlock
from mer.sched.layer import WORTH_BYTES, LayerRun, WorkerLink
from mer.sched.prefetch import Prefetcher
from mer.sched.prefix import PrefixNode
from mer.sched.sequence import Sequence, Status
from mer.sched.store import ExpertStore
from mer.sched.transfers import Transfers

CERTAIN_SHARE = 0.95  # of a layer's experts: a batch that needs as many reads the next layer's ahead


@attrs.frozen(kw_only=True)
class SchedulerStatistics:
    """Counters of the scheduler, and who is there now."""

    submitted: int
    finished: int
    failed: int
    cancelled: int
    running: int
    waiting: int  # in line for a place and KV blocks
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


@attrs.frozen(eq=False)
class _Member:
    """A sequence's share of a batch."""

    sequence: Sequence
    rows: slice

    @property
    def alive(self) -> bool:
        """Whether its results are still wanted."""
        return not self.sequence.cancelled and self.sequence.status is not Status.ENDED


class Scheduler:
    """Runs all sequences together: in each batch one token of every decoding sequence, the rest prompt chunks.

    A batch walks the layers; each layer's experts are looked up once, by the union over the batch. A sequence whose
    reader is behind is left out until its channel has room. Cancelled sequences are noticed between layers and between
    jobs. While nothing is guessed, small batches go as far as the experts are in memory in one job.

    A sequence that is left out keeps its place and its KV blocks only while nobody needs them: between batches it is
    preempted for the first in line, and goes back in line, before newcomers, when its reader has emptied half of its
    channel. As no other is ever preempted, a preempted sequence gives its reader at least half a channel of tokens, or
    all that are left, before that can happen again.

    Blocks of KV are shared as soon as they are full and their batch has ended well: whoever begins with the same tokens
    begins behind them, and who has begun before goes on behind them.

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
    ) -> None:
        self._n_layers = n_layers
        self._experts = range(n_experts)
        self._staged_pairs = worker.staged_pairs
        self._resident_rows = worker.resident_rows
        self._worth_bytes = worth_bytes
        self._prefetcher = prefetcher
        self._on_routed = on_routed
        self._link = WorkerLink(worker.jobs, worker.results)
        self._store = store
        self._kv = kv
        self._batch_tokens = batch_tokens
        self._max_sequences = max_sequences
        self._bytes_read = bytes_read
        self._queue = AdmissionQueue(max_waiting)
        self._running: list[Sequence] = []  # in order of admission
        self._paused: list[Sequence] = []  # preempted, their readers are behind
        self._resumed: deque[Sequence] = deque()  # preempted, in line before the queue
        self._wake = trio.Event()
        self._transfers = Transfers(self._link, self._wake_up)
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
        self._wake_up()
        self._store.wake()

    def _wake_up(self) -> None:
        """Let `run` go on if it waits for something to do."""
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

    def statistics(self) -> SchedulerStatistics:
        """Return a snapshot."""
        return SchedulerStatistics(
            submitted=self._queue.entered,
            running=len(self._running),
            waiting=len(self._resumed) + len(self._queue),
            paused=len(self._paused),
            **attrs.asdict(self._counters),
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
        """Ask for nothing more ahead of time: no batch is to come."""
        self._store.drop_ahead()
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
        """Let go of sequences that have ended or were cancelled."""
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
        """Let sequences in line run, first come, first served, while there are places and KV blocks."""
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
        """Spare a sequence the part of its prompt that others have computed since it was admitted."""
        if sequence.status is Status.PREFILL:
            assert sequence.lease is not None
            there = self._kv.adopt(sequence.lease, sequence.span, sequence.n_known - 1)
            self._counters.reused_tokens += sequence.reuse(there)

    def _share(self, sequence: Sequence) -> None:
        """Let others use the blocks of a sequence that are full, after a batch that has damaged none of its rows."""
        assert sequence.lease is not None
        self._kv.share(sequence.lease, sequence.span, sequence.kv_tokens)

    def _make_room(self, n_blocks: int, shared: tuple[PrefixNode, ...]) -> bool:
        """Preempt paused sequences, the last admitted first, until there are a place and KV blocks; none if it is vain.

        If all that run are paused and no prefix is being saved or restored it is never in vain, because no sequence
        needs more blocks than there are.
        """
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
        """Leave out prompts whose next block an earlier one is about to compute for all, unless a batch takes all rows.

        They go on behind that block, so that prompts with a common prefix that come at once compute it once. Where a
        batch has room for everything, waiting for the next one would take longer.
        """
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

    def _compose(self) -> tuple[list[_Member], Batch | None]:
        """Build the next batch: a row of every decoding sequence, and what is left shared fairly among the prompts."""
        members: list[_Member] = []
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        by_phase = sorted(self._running, key=lambda s: s.status is Status.PREFILL)
        active = self._without_followers([sequence for sequence in by_phase if sequence.has_room])
        shares = share_rows(self._batch_tokens, [sequence.rows_left for sequence in active])
        for sequence, share in zip(active, shares, strict=True):
            if not share:
                continue
            rows, first = sequence.next_rows(share)
            owners += [len(members)] * len(rows)
            members.append(_Member(sequence, slice(len(tokens), len(tokens) + len(rows))))
            tokens += rows
            positions += range(first, first + len(rows))
        if not members:
            return [], None
        width = max(len(m.sequence.blocks) for m in members)
        tables = np.zeros((len(members), width), np.int32)
        for row, member in enumerate(members):
            tables[row, : len(member.sequence.blocks)] = member.sequence.blocks
        batch = Batch(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequences=np.array(owners, np.int32),
            tables=tables,
            outputs=np.array([m.rows.stop - 1 for m in members], np.int32),
        )
        return members, batch

    async def _run_batch(self, members: list[_Member], batch: Batch) -> None:
        """Take a batch through all layers and hand out its tokens; an error ends the sequences it concerns."""
        self._counters.batches += 1
        try:
            done = await self._walk(members, batch)
        except EngineClosed:
            raise
        except MerError as error:
            for member in members:
                if member.alive:
                    member.sequence.fail(error)
            return
        if done is None:
            return
        assert done.logits is not None
        assert done.damaged is not None
        now_s, bytes_read = trio.current_time(), self._bytes_read()
        for member, logits in zip(members, done.logits, strict=True):
            sequence, rows = member.sequence, member.rows
            if not member.alive:
                continue
            was_prefill = sequence.status is Status.PREFILL
            n_rows = rows.stop - rows.start
            if was_prefill and not sequence.tokens:
                self._counters.prompt_tokens += n_rows
            wants_token = sequence.computed(n_rows)
            if np.any((done.damaged >= rows.start) & (done.damaged < rows.stop)) or not np.isfinite(logits).all():
                sequence.fail(NumericsError("the model gave NaN or infinity: the weights are damaged"))
            elif wants_token:
                sequence.advance(logits, now_s, bytes_read)
                self._counters.completion_tokens += 1
            if sequence.error is None:
                self._share(sequence)

    async def _walk(self, members: list[_Member], batch: Batch) -> Done | None:
        """Run the layers; return None as soon as nobody wants the batch any more."""
        store = self._store
        operations: list[Operation] = [Begin(batch)]
        if self._prefetcher is not None:
            self._prefetcher.begin_pass()
        pinned_layer = 0
        pinned: tuple[LoadedExpert, ...] = ()
        late: list[Callable[[], None]] = []  # what the next job's start should not wait for

        def wanted() -> bool:
            return any(member.alive for member in members)

        def catch_up() -> None:
            while late:
                late.pop(0)()
            store.cache.settle()

        layer = 0
        while True:
            following = self._next(layer, batch)
            store.keeps_all = len(following) > 1
            try:
                done = await self._link.run(*operations, *following, on_started=catch_up)
            except BaseException:
                catch_up()
                store.discard(pinned_layer, pinned)
                raise
            finally:
                store.let_leave()
            used = partial(store.unpin, pinned_layer, pinned, used=True, arranged=done.arranged)
            if done.routes is not None:
                layer += self._note_passed(layer, done)
            if done.logits is not None:
                used()
                if self._prefetcher is not None:
                    self._prefetcher.end_pass(comparable=len(batch.tokens) == len(members))
                return done
            if not wanted():
                used()
                return None
            assert done.expert_ids is not None
            ids = done.expert_ids
            union = _union(ids, members)
            routed = partial(self._routed, layer, union, done, members)
            resident = store.pin_resident(layer, union)
            if resident is not None:
                late += used, store.claimed, routed
                pinned_layer, pinned = layer, resident
            else:
                used()
                staged = ids.size <= self._staged_pairs
                run = LayerRun(store, self._link, layer, staged=staged, pairs=ids.size, worth_bytes=self._worth_bytes)
                result = await run.run(union, wanted, routed)
                pinned_layer, pinned = layer, result.pinned
                if not wanted():
                    store.unpin(pinned_layer, pinned, used=False)
                    return None
                for expert, error in result.failed.items():
                    for member in members:
                        if member.alive and np.any(ids[member.rows] == expert):
                            member.sequence.fail(error)
            operations = [RunExperts(layer, pinned), Combine(layer)]
            layer += 1

    def _next(self, layer: int, batch: Batch) -> tuple[Operation, ...]:
        """Return what follows the experts of the layer before this one."""
        if layer == self._n_layers:
            return (Project(),)
        prefetcher, addresses = self._prefetcher, self._store.cache.addresses
        if prefetcher is not None and prefetcher.governor.allowed and not self._store.all_held:
            return (Attend(layer, predict=prefetcher.asks_gate),)
        if addresses is None or len(batch.tokens) > self._resident_rows:
            return (Attend(layer),)
        return Attend(layer), RunResident(layer, addresses), Project()

    def _note_passed(self, layer: int, done: Done) -> int:
        """Account for the layers from this one on that the worker has passed by itself; return how many."""
        assert done.routes is not None
        passed = done.routes if done.logits is not None else done.routes[:-1]
        for number, ids in enumerate(passed, layer):
            union = sorted(set(ids.ravel().tolist()))  # of those who have left meanwhile too
            self._store.cache.passed(number, union)
            if self._on_routed is not None:
                self._on_routed(number, len(ids), union)
            if self._prefetcher is not None:
                self._prefetcher.passed(number, union)
        return len(passed)

    def _routed(self, layer: int, union: list[int], done: Done, members: list[_Member]) -> None:
        """Tell of a layer's routing, and ask for what the next one needs, as far as it can be known or guessed."""
        assert done.expert_ids is not None
        if self._on_routed is not None:
            self._on_routed(layer, len(done.expert_ids), union)
        certain = self._is_next_certain(layer, done.expert_ids.shape, len(union) / len(self._experts), members)
        if certain:
            self._store.read_ahead((layer + 1) % self._n_layers, self._experts)
        if self._prefetcher is not None:
            self._prefetcher.routed(layer, union, done.predicted_ids, guess=not certain)

    def _is_next_certain(self, layer: int, shape: tuple[int, ...], union_share: float, members: list[_Member]) -> bool:
        """Return whether the batch is so large that it will need every expert of the next layer.

        It will if this layer needed nearly all of its own, and if that many draws leave out hardly any expert even of
        a uniform router. After the last layer the next batch counts, as far as prompts are left for it.
        """
        if union_share < CERTAIN_SHARE or self._n_layers == 1:
            return False
        n_rows, top_k = shape
        if layer + 1 == self._n_layers:
            left = sum(m.sequence.rows_left - (m.rows.stop - m.rows.start) for m in members if m.alive)
            n_rows = min(left, self._batch_tokens)
        return bool((1 - top_k / len(self._experts)) ** n_rows <= 1 - CERTAIN_SHARE)


def _union(ids: Int32Array, members: list[_Member]) -> list[int]:
    """Return the numbers of the experts that the living members' rows of ids [T, K] name, ascending, each once."""
    if len(ids) == 1:
        return sorted(ids[0].tolist())
    return sorted({expert for m in members if m.alive for expert in ids[m.rows].ravel().tolist()})


def share_rows(budget: int, needs: Seq[int]) -> list[int]:
    """Divide a batch's rows: nobody gets more than it needs, and whoever gets less gets no less than any other.

    If there are fewer rows than sequences, the smallest needs come first, those that decode among them.
    """
    shares = [0] * len(needs)
    left = budget
    by_need = sorted(range(len(needs)), key=needs.__getitem__)
    for position, i in enumerate(by_need):
        fair = max(1, left // (len(needs) - position))
        shares[i] = min(needs[i], fair, left)
        left -= shares[i]
    return shares
