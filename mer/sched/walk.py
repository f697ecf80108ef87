"""Walk of one batch through the layers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import numpy as np

from mer.compute.messages import (
    Advance,
    Batch,
    Begin,
    Combine,
    ComputeWorker,
    Done,
    LoadedExpert,
    Operation,
    RunExperts,
    RunResident,
)
from mer.errors import EngineClosed, MerError
from mer.sched.batch import Member, union_of
from mer.sched.layer import LayerRun, WorkerLink
from mer.sched.prefetch import Prefetcher
from mer.sched.store import ExpertStore

CERTAIN_SHARE = 0.95  # of a layer's experts: a batch that needs as many reads the next layer's ahead


class LayerWalk:
    """Takes batches through all layers, one after the other.

    Each layer's experts are looked up once, by the union over the batch. While nothing is guessed, one job takes a
    small batch through the layers until an expert is missing.

    Args:
        n_layers: of the model.
        n_experts: of a layer.
        worker: computes.
        link: to the worker.
        store: experts.
        batch_tokens: largest number of rows in a batch.
        prefetcher: guesses what layers to come need, or None.
        on_routed: told of each layer's union of experts in a batch: layer, rows, numbers of the experts in order.
        worth_bytes: see `LayerRun`.

    Attributes:
        used: the experts of each layer that the last batch has reached.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_experts: int,
        worker: ComputeWorker,
        link: WorkerLink,
        store: ExpertStore,
        batch_tokens: int,
        prefetcher: Prefetcher | None,
        on_routed: Callable[[int, int, Seq[int]], None] | None,
        worth_bytes: int,
    ) -> None:
        self._n_layers = n_layers
        self._experts = range(n_experts)
        self._staged_pairs = worker.staged_pairs
        self._resident_rows = worker.resident_rows
        self._shared_layers = worker.shared_layers
        self._link = link
        self._store = store
        self._batch_tokens = batch_tokens
        self._prefetcher = prefetcher
        self._on_routed = on_routed
        self._worth_bytes = worth_bytes
        self.used: list[tuple[int, Seq[int]]] = []  # by the last batch: layer, numbers of its experts

    async def run(self, members: list[Member], batch: Batch) -> Done | None:
        """Run the layers; return None as soon as nobody wants the batch any more."""
        # One job a layer would be simpler. But between two jobs the cores are idle while Python looks experts up and
        # two threads wake: 300 us. So a job goes on past its layer while it finds every expert in memory, and what the
        # next job does not need (unpinning, the policy's learning, traces, guesses) is put off in `late`.
        store = self._store
        self.used.clear()
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
            store.residents.cache.settle()

        layer = 0
        while True:
            following = self._next(layer, batch, (pinned_layer, pinned))
            store.residents.keeps_all = len(following) > 1
            try:
                done = await self._link.run(*operations, *following, on_started=catch_up)
            except BaseException as failure:
                catch_up()
                store.residents.discard(pinned_layer, pinned)
                if isinstance(failure, MerError) and not isinstance(failure, EngineClosed):  # else the job goes on
                    store.loans.take_back()
                    store.loans.failed()
                raise
            finally:
                store.residents.let_leave()
            used = partial(store.residents.unpin, pinned_layer, pinned, used=True, arranged=done.arranged)
            if done.routes is not None:
                store.loans.take_back()
                layer += self._note_passed(layer, done)
            if done.logits is not None:
                used()
                if self._prefetcher is not None:
                    self._prefetcher.end_pass(comparable=len(batch.tokens) == len(members))
                return done
            if not wanted():
                used()
                store.residents.cache.missed(())
                return None
            assert done.expert_ids is not None
            ids = done.expert_ids
            union = union_of(ids, members)
            self.used.append((layer, union))
            routed = partial(self._routed, layer, union, done, members)
            resident = store.residents.pin_all(layer, union)
            if resident is not None:
                late += used, store.speculation.withdraw, routed
                pinned_layer, pinned = layer, resident
            else:
                used()
                staged = ids.size <= self._staged_pairs
                run = LayerRun(
                    store,
                    self._link,
                    layer,
                    staged=staged,
                    pairs=ids.size,
                    worth_bytes=self._worth_bytes,
                    shared=layer in self._shared_layers,
                )
                result = await run.run(union, wanted, routed)
                pinned_layer, pinned = layer, result.pinned
                if not wanted():
                    store.residents.unpin(pinned_layer, pinned, used=False)
                    return None
                for expert, error in result.failed.items():
                    for member in members:
                        if member.alive and np.any(ids[member.rows] == expert):
                            member.sequence.fail(error)
            operations = [RunExperts(layer, pinned), Combine(layer)]
            layer += 1

    def _next(self, layer: int, batch: Batch, pinned: tuple[int, tuple[LoadedExpert, ...]]) -> tuple[Operation, ...]:
        """Return the operations that follow the experts of the layer before this one."""
        if layer == self._n_layers:
            return (Advance(layer),)
        prefetcher, addresses = self._prefetcher, self._store.residents.cache.addresses
        if prefetcher is not None and prefetcher.governor.allowed and not self._store.residents.all_held:
            return (Advance(layer, predict=prefetcher.asks_gate),)
        if addresses is None or len(batch.tokens) > self._resident_rows:
            return (Advance(layer),)
        reads = self._store.loans.lend(*pinned)
        return Advance(layer), RunResident(layer, addresses, reads), Advance(self._n_layers)

    def _note_passed(self, layer: int, done: Done) -> int:
        """Account for the layers from this one on that one job has passed; return how many."""
        assert done.routes is not None
        passed = done.routes if done.logits is not None else done.routes[:-1]
        for number, ids in enumerate(passed, layer):
            union = sorted(set(ids.ravel().tolist()))  # rows of sequences that have ended meanwhile included
            self._store.loans.passed(number, union)
            self.used.append((number, union))
            if self._on_routed is not None:
                self._on_routed(number, len(ids), union)
            if self._prefetcher is not None:
                self._prefetcher.passed(number, union)
        self._store.loans.ended(layer + len(passed))
        return len(passed)

    def _routed(self, layer: int, union: list[int], done: Done, members: list[Member]) -> None:
        """Report a layer's routing, and ask for the experts that the next one is certain or likely to need."""
        assert done.expert_ids is not None
        if self._on_routed is not None:
            self._on_routed(layer, len(done.expert_ids), union)
        certain = self._is_next_certain(layer, done.expert_ids.shape, len(union) / len(self._experts), members)
        if certain:
            self._store.speculation.read_ahead((layer + 1) % self._n_layers, self._experts)
        if self._prefetcher is not None:
            self._prefetcher.routed(layer, union, done.predicted_ids, guess=not certain)
            self._store.speculation.guess()

    def _is_next_certain(self, layer: int, shape: tuple[int, ...], union_share: float, members: list[Member]) -> bool:
        """Return whether the batch is so large that it will need every expert of the next layer.

        It will if this layer needed nearly all of its experts, and if as many draws from a uniform router leave out
        hardly any. After the last layer the rows of the next batch count: those that prompts have left.
        """
        if union_share < CERTAIN_SHARE or self._n_layers == 1:
            return False
        n_rows, top_k = shape
        if layer + 1 == self._n_layers:
            left = sum(m.sequence.rows_left - (m.rows.stop - m.rows.start) for m in members if m.alive)
            n_rows = min(left, self._batch_tokens)
        return bool((1 - top_k / len(self._experts)) ** n_rows <= 1 - CERTAIN_SHARE)
