"""A simulated compute worker on trio's clock: its numbers are hashes of all that they must depend on.

The hidden state of a row is a hash of its token, its position, the KV entries of the positions before it and the bytes
of the experts that were given for it, as they lie in memory while the job runs. A wrong expert, a wrong slot, stale
bytes, a wrong KV table, a missing expert or a wrong order therefore gives other logits; what is wrong beyond doubt is
an AssertionError at once.
"""

from __future__ import annotations

import bisect
import functools
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.compute.messages import (
    Advance,
    Batch,
    Begin,
    Combine,
    Done,
    Int64Array,
    Job,
    LoadedExpert,
    Operation,
    ReadBlocks,
    RunExperts,
    RunResident,
    RunShared,
    Stage,
    Uint8Array,
    WorkerStatistics,
    WriteBlocks,
)
from mer.errors import ComputeError
from mer.io.arena import Arena
from mer.io.extents import ExpertMap
from mer.limits import MAX_MATRICES
from mer.testing.simdisk import SimDisk, content
from mer.testing.simreads import SimReads

_MASK = (1 << 64) - 1
_ARRANGED = 0x5A  # a raw expert's bytes are "re-arranged" by xor with it
_SHARED = 0x5A4ED  # what a shared network makes of a hidden state
_GARBAGE = 0xBAD  # the hidden state of a row whose experts were not all computed

Draw: TypeAlias = Callable[[npt.NDArray[np.float32]], int]
"""Chooses a token by its logits [V]."""


def greedy(banned: Collection[int] = ()) -> Draw:
    """Return a draw of the most likely token that is not banned, the lowest number among equals."""
    return lambda logits: max(set(range(len(logits))) - set(banned), key=lambda token: (logits[token], -token))


def mix(*values: int) -> int:
    """Return a 64-bit hash of numbers in order."""
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = (h ^ value) * 0xBF58476D1CE4E5B9 & _MASK
        h ^= h >> 29
    return h


@attrs.frozen(kw_only=True)
class SimModel:
    """A model whose arithmetic is hashing; `expected` is what an engine must generate with it."""

    n_layers: int = 2
    n_experts: int = 6
    top_k: int = 2
    vocab_size: int = 16
    seed: int = 0
    habit: int = 0  # of 16 rows of a layer as many use the experts that it prefers, the others any
    shared: frozenset[int] = frozenset()  # layers whose experts share a network
    n_matrices: int = 3  # of an expert
    nan_hidden: frozenset[int] = frozenset()  # tokens that make the hidden state NaN from the first layer on
    nan_router: frozenset[int] = frozenset()  # tokens whose router logits are NaN, and nothing else
    nan_logits: frozenset[int] = frozenset()  # tokens whose logits are infinite, with a finite hidden state

    def embed(self, token: int, position: int) -> int:
        """Return the hidden state that a token starts with."""
        return mix(self.seed, token, position)

    def attend(self, layer: int, entries: Sequence[int], x: int) -> int:
        """Return the hidden state after attention over the KV entries of all positions up to the row's own."""
        return mix(layer, x, *entries)

    def route(self, layer: int, x: int) -> list[int]:
        """Return the experts of a row in router order."""
        if self.habit and mix(layer, x) % 16 < self.habit:
            return [(layer + i) % self.n_experts for i in range(self.top_k)]
        keys = [mix(x, layer, expert) for expert in range(self.n_experts)]
        return sorted(range(self.n_experts), key=keys.__getitem__)[: self.top_k]

    def share(self, layer: int, x: int) -> int:
        """Return the hidden state after a layer's shared network, if it has one."""
        return mix(x, _SHARED) if layer in self.shared else x

    def logits(self, x: int) -> npt.NDArray[np.float32]:
        """Return the logits [V] of a row."""
        return np.array([mix(x, token) / 2**60 for token in range(self.vocab_size)], np.float32)

    def generate(
        self, prompt: Sequence[int], disk_seed: int, experts: ExpertMap, draw: Draw
    ) -> Iterator[tuple[int, set[tuple[int, int]]]]:
        """Yield the tokens for a prompt, computed position by position with every expert at hand, drawn by `draw`.

        With each token comes the set of all (layer, expert) pairs that it and those before it took.
        """
        kv: list[list[int]] = [[] for _ in range(self.n_layers)]
        used: set[tuple[int, int]] = set()
        tokens = list(prompt)
        for position, token in enumerate(tokens):  # grows as it is walked
            x = self.embed(token, position)
            for layer in range(self.n_layers):
                kv[layer].append(x)
                x = self.attend(layer, kv[layer], x)
                chosen = self.route(layer, x)
                used |= {(layer, expert) for expert in chosen}
                outputs = [mix(x, file_crc(disk_seed, experts, layer, expert)) for expert in chosen]
                x = mix(self.share(layer, x), *outputs)
            if position + 1 == len(tokens):
                tokens.append(draw(self.logits(x)))
                yield tokens[-1], set(used)


@functools.lru_cache(4096)
def _crc(disk_seed: int, file: int, offset: int, n_bytes: int) -> int:
    return zlib.crc32(content(disk_seed, file, offset, n_bytes).data)


def matrix_crcs(disk_seed: int, experts: ExpertMap, layer: int, expert: int) -> tuple[int, ...]:
    """Return the checksums of an expert's matrices as the simulated files have them."""
    parts = experts.experts[layer][expert].parts
    return tuple(_crc(disk_seed, part.file, part.offset, part.n_bytes) for part in parts)


def file_crc(disk_seed: int, experts: ExpertMap, layer: int, expert: int) -> int:
    """Return the checksum of an expert as the simulated files have it."""
    return mix(*matrix_crcs(disk_seed, experts, layer, expert))


@attrs.frozen(kw_only=True)
class JobCost:
    """Times of jobs on the simulated clock."""

    job_s: float = 20e-6
    row_s: float = 5e-6  # for each row of an Advance to a router
    expert_s: float = 10e-6  # for each expert; half of it for each stage


class SimWorker:
    """A ComputeWorker of a SimModel, deterministic.

    Like a real one it re-arranges raw experts in place, keeps the batch until the next Begin, and has no mercy with
    memory that changes under it: the bytes that a job uses are looked at when it begins and when it ends. A stage uses
    and changes its own matrices only.

    Args:
        model: what to compute.
        arena: the memory of the slots.
        experts: where the experts lie in the files.
        disk_seed: of the SimDisk that the files are on.
        cost: how long jobs take.
        failures: numbers of the jobs, from 0, that fail half-way.
        staged_pairs: see `ComputeWorker`.
        resident_rows: see `ComputeWorker`.
        disk: what jobs read from that make reads by themselves.
    """

    def __init__(
        self,
        model: SimModel,
        arena: Arena,
        experts: ExpertMap,
        *,
        disk_seed: int = 0,
        cost: JobCost | None = None,
        failures: frozenset[int] = frozenset(),
        staged_pairs: int = 12,
        resident_rows: int = 3,
        disk: SimDisk | None = None,
    ) -> None:
        self._disk = disk
        self.staged_pairs = staged_pairs
        self.resident_rows = resident_rows
        self.shared_layers = model.shared
        self._model, self._arena, self._experts, self._disk_seed = model, arena, experts, disk_seed
        self._slot_addresses = [arena.address(slot) for slot in range(arena.n_slots)]
        self._cost, self._failures = cost or JobCost(), failures
        self.block_tokens = 4  # positions in a KV block
        self.batches: list[Batch] = []  # every batch begun
        self.log: list[tuple[float, Job]] = []  # every job, and when it began
        self.frozen: trio.Event | None = None  # set it to an Event to hold the jobs that begin from then on
        self.jobs, self._jobs = trio.open_memory_channel[Job](1)
        self._results, self.results = trio.open_memory_channel[Done](1)
        self._kv: dict[tuple[int, int, int], tuple[int, bool]] = {}  # (layer, block, offset): hidden state, NaN
        self._x: list[int] = []
        self._nan: list[bool] = []
        self._routes: list[list[int]] = []
        self._is_away = False  # an expert that the last RunResident has come to
        self._inner: set[int] = set()  # experts of the layer whose INNER has run, and not their OUTER
        self._outputs: list[dict[int, int]] = []  # for each row {expert: output}
        self._layer = -1
        self._shared_ran = False
        self._n_jobs = self._n_tokens = self._n_runs = 0
        self._compute_s = 0.0

    async def run(self) -> None:
        """See `ComputeWorker`."""
        with self._results:
            async for job in self._jobs:
                if self.frozen is not None:
                    await self.frozen.wait()
                begun_s = trio.current_time()
                self.log.append((begun_s, job))
                fails = self._n_jobs in self._failures
                self._n_jobs += 1
                done = Done()
                job.on_started()
                for operation in job.operations:
                    done = await self._run_operation(operation, done, fails=fails)
                    if done.routes is not None and self._is_away:
                        break
                if fails:
                    done = Done(error=ComputeError("a simulated job failed"))
                self._compute_s += trio.current_time() - begun_s
                await self._results.send(done)

    def statistics(self) -> WorkerStatistics:
        """See `ComputeWorker`."""
        return WorkerStatistics(
            name="simulated",
            kernels="none",
            n_threads=1,
            active_threads=1,
            active_reason="a simulated one",
            jobs=self._n_jobs,
            tokens=self._n_tokens,
            expert_runs=self._n_runs,
            compute_s=self._compute_s,
        )

    async def _run_operation(self, operation: Operation, done: Done, *, fails: bool) -> Done:
        match operation:
            case Begin(batch):
                self._begin(batch)
            case Advance(layer, predict) if layer < self._model.n_layers:
                await trio.sleep(self._cost.job_s + self._cost.row_s * len(self._x))
                self._attend(layer)
                done = attrs.evolve(
                    done,
                    expert_ids=np.array(self._routes, np.int32),
                    predicted_ids=self._predict(layer + 1) if predict else None,
                    damaged=self._damaged(),
                )
            case RunExperts(layer, experts):
                await self._run_experts(layer, experts, fails=fails)
            case RunShared(layer):
                await trio.sleep(self._cost.expert_s)
                self._run_shared(layer)
            case RunResident():
                done = await self._run_resident(operation, done, fails=fails)
            case Combine(layer):
                self._combine(layer)
            case Advance():
                await trio.sleep(self._cost.job_s)
                done = attrs.evolve(done, logits=self._project(), damaged=self._damaged())
            case ReadBlocks(blocks):
                await trio.sleep(self._cost.job_s)
                done = attrs.evolve(done, kv=tuple(self._read_block(block) for block in blocks))
            case WriteBlocks(blocks, kv):
                await trio.sleep(self._cost.job_s)
                if not fails:
                    for block, data in zip(blocks, kv, strict=True):
                        self._write_block(block, data)
        return done

    async def _run_resident(self, operation: RunResident, done: Done, *, fails: bool) -> Done:
        assert len(self._x) <= self.resident_rows
        assert operation.addresses.shape == (self._model.n_layers, self._model.n_experts, MAX_MATRICES)
        layer, routes, reads = operation.layer, [self._routes], None
        if operation.reads is not None:
            assert self._disk is not None
            reads = SimReads(operation.reads, self._disk, self._arena)
        while True:
            self._is_away = not await self._run_layer(layer, operation.addresses, reads, fails=fails)
            if self._is_away:
                break
            self._combine(layer)
            layer += 1
            if layer == self._model.n_layers:
                break
            done = await self._run_operation(Advance(layer), done, fails=fails)
            routes.append(self._routes)
        return attrs.evolve(done, routes=np.array(routes, np.int32))

    async def _run_layer(self, layer: int, addresses: Int64Array, reads: SimReads | None, *, fails: bool) -> bool:
        """Run the experts of a layer that are there, and those that can be read; return whether that is all of them."""
        chosen = sorted({expert for route in self._routes for expert in route})
        there = {expert: addresses[layer, expert].tolist() for expert in chosen}
        missing = [expert for expert in chosen if there[expert][0] == 0]
        found: list[LoadedExpert] | None = []
        if reads is not None:
            reads.keep(layer, chosen)
            if missing and min(first for first, *_ in there.values()) >= 0:
                found = reads.begin(layer, missing)
        if found is None or len(found) < sum(first <= 0 for first, *_ in there.values()) or fails:
            return False  # if it fails half-way through, no byte has changed of experts that are arranged
        loaded = [
            LoadedExpert(expert, tuple(there[expert][: self._model.n_matrices]), (False, False))
            for expert in chosen
            if there[expert][0]
        ]
        await self._run_experts(layer, loaded, fails=fails)
        while found:
            assert reads is not None
            n = await reads.wait(len(found))
            if n == 0:  # as if none of the layer's experts had been run
                self._outputs = [{} for _ in self._x]
                self._n_runs -= len(chosen) - len(found)
                return False
            await self._run_experts(layer, found[:n], fails=fails)
            found = found[n:]
        return True

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block: a hidden state and whether it is NaN, for all layers and positions."""
        return 16 * self._model.n_layers * self.block_tokens

    def _places(self, block: int) -> list[tuple[int, int, int]]:
        return [(layer, block, offset) for layer in range(self._model.n_layers) for offset in range(self.block_tokens)]

    def _read_block(self, block: int) -> Uint8Array:
        entries = [self._kv[place] for place in self._places(block)]
        kv = np.array(entries, np.uint64).view(np.uint8).reshape(-1)
        kv.flags.writeable = False
        return kv

    def _write_block(self, block: int, kv: Uint8Array) -> None:
        assert len(kv) == self.block_bytes
        for place, (x, nan) in zip(self._places(block), kv.view(np.uint64).reshape(-1, 2).tolist(), strict=True):
            self._kv[place] = (x, bool(nan))

    def _begin(self, batch: Batch) -> None:
        assert len(batch.tokens) == len(batch.positions) == len(batch.sequences) > 0
        assert len(batch.tables) == len(batch.outputs) == batch.sequences.max() + 1
        assert (np.diff(batch.sequences) >= 0).all(), "the rows of a sequence are not adjacent"
        same = np.diff(batch.sequences) == 0
        assert (np.diff(batch.positions)[same] == 1).all(), "the rows of a sequence are not in order"
        of_row = batch.tables[batch.sequences, batch.positions // self.block_tokens]
        places = set(zip(of_row.tolist(), (batch.positions % self.block_tokens).tolist(), strict=True))
        assert len(places) == len(batch.tokens), "two rows write to the same place"
        self.batches.append(batch)
        self._n_tokens += len(batch.tokens)
        rows = list(zip(batch.tokens.tolist(), batch.positions.tolist(), strict=True))
        self._x = [self._model.embed(*row) for row in rows]
        self._nan = [token in self._model.nan_hidden for token, _ in rows]
        self._layer = -1

    def _attend(self, layer: int) -> None:
        assert layer == self._layer + 1, "a layer was left out, or run twice"
        self._layer = layer
        self._shared_ran = False
        batch = self.batches[-1]
        self._inner.clear()  # what lacks its outer stage was given up
        self._routes, self._outputs = [], [{} for _ in self._x]
        for row, position in enumerate(batch.positions.tolist()):
            table = batch.tables[batch.sequences[row]].tolist()
            places = [(layer, table[p // self.block_tokens], p % self.block_tokens) for p in range(position + 1)]
            self._kv[places[-1]] = (self._x[row], self._nan[row])
            entries = [self._kv.get(place, (_GARBAGE, False)) for place in places]
            self._nan[row] = any(nan for _, nan in entries)
            self._x[row] = self._model.attend(layer, [x for x, _ in entries], self._x[row])
            self._routes.append(self._model.route(layer, self._x[row]))

    def _predict(self, layer: int) -> npt.NDArray[np.int32] | None:
        """Return what the router of a layer chooses for the rows as they are now; None after the last layer."""
        if layer == self._model.n_layers:
            return None
        return np.array([self._model.route(layer, x) for x in self._x], np.int32)

    async def _run_experts(self, layer: int, experts: Sequence[LoadedExpert], *, fails: bool) -> None:
        assert layer == self._layer
        assert len({loaded.expert for loaded in experts}) == len(experts), "an expert twice in a job"
        if fails:  # half-way through: some bytes are re-arranged, and some are not
            for loaded in experts[: len(experts) // 2 + 1]:
                for matrix in self._matrices(loaded.stage)[:2]:
                    self._arrange(layer, loaded, matrix)
            return
        for loaded in experts:
            for matrix in self._matrices(loaded.stage):
                if loaded.raw[matrix == self._model.n_matrices - 1]:
                    self._arrange(layer, loaded, matrix)
        crcs = [self._crcs(layer, loaded) for loaded in experts]
        halves = sum(1 if loaded.stage is not Stage.WHOLE else 2 for loaded in experts)
        await trio.sleep(self._cost.expert_s * halves / 2)
        assert crcs == [self._crcs(layer, loaded) for loaded in experts], "an expert's bytes changed during a job"
        for loaded, crc in zip(experts, crcs, strict=True):
            want = matrix_crcs(self._disk_seed, self._experts, layer, loaded.expert)
            assert crc == [want[matrix] for matrix in self._matrices(loaded.stage)], (
                f"the bytes of expert {loaded.expert} of layer {layer} are wrong, or arranged twice or not at all"
            )
            self._account(layer, loaded)
            if loaded.stage is Stage.INNER:
                continue
            self._n_runs += 1
            for x, route, outputs in zip(self._x, self._routes, self._outputs, strict=True):
                if loaded.expert in route:
                    assert loaded.expert not in outputs, f"expert {loaded.expert} of layer {layer} computed twice"
                    outputs[loaded.expert] = mix(x, mix(*want))

    def _account(self, layer: int, loaded: LoadedExpert) -> None:
        """Check that stages come in turn, and only in batches that may have them."""
        name = f"the {loaded.stage.value} stage of expert {loaded.expert} of layer {layer}"
        if loaded.stage is Stage.WHOLE:
            assert loaded.expert not in self._inner, f"{name} after its inner one"
            return
        pairs = len(self._x) * self._model.top_k
        assert pairs <= self.staged_pairs, f"{name} in a batch of {pairs} (token, choice) pairs"
        if loaded.stage is Stage.INNER:
            assert loaded.expert not in self._inner, f"{name} twice"
            computed = any(loaded.expert in outputs for outputs in self._outputs)
            assert not computed, f"{name} after the whole"
        else:
            assert loaded.expert in self._inner, f"{name} before its inner one"
        self._inner ^= {loaded.expert}

    def _run_shared(self, layer: int) -> None:
        """Run the shared network, whose result the layer's experts do not see: they read what the router read."""
        assert layer == self._layer
        assert layer in self._model.shared, "there is no shared network"
        assert not self._shared_ran, "a shared network twice"
        self._shared_ran = True

    def _combine(self, layer: int) -> None:
        assert layer == self._layer
        for row, (route, outputs) in enumerate(zip(self._routes, self._outputs, strict=True)):
            complete = all(expert in outputs for expert in route)
            x = self._model.share(layer, self._x[row])
            self._x[row] = mix(x, *(outputs[e] for e in route)) if complete else _GARBAGE

    def _project(self) -> npt.NDArray[np.float32]:
        assert self._layer == self._model.n_layers - 1, "layers are missing"
        batch = self.batches[-1]
        logits = np.stack([self._model.logits(self._x[row]) for row in batch.outputs.tolist()])
        for i, row in enumerate(batch.outputs.tolist()):
            if self._nan[row]:
                logits[i] = np.nan
            elif int(batch.tokens[row]) in self._model.nan_logits:
                logits[i, 3] = np.inf
        return logits

    def _damaged(self) -> npt.NDArray[np.int32]:
        router = [token in self._model.nan_router for token in self.batches[-1].tokens.tolist()]
        return np.flatnonzero(np.logical_or(self._nan, router)).astype(np.int32)

    def _matrices(self, stage: Stage) -> Sequence[int]:
        """Return the numbers of the matrices that a stage uses."""
        n = self._model.n_matrices
        return {Stage.WHOLE: range(n), Stage.INNER: range(n - 1), Stage.OUTER: range(n - 1, n)}[stage]

    def _view(self, layer: int, loaded: LoadedExpert, matrix: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of one of an expert's matrices where the scheduler says they lie."""
        part, address = self._experts.experts[layer][loaded.expert].parts[matrix], loaded.addresses[matrix]
        slot = bisect.bisect(self._slot_addresses, address) - 1
        begin = address - self._slot_addresses[slot]
        view = self._arena.view(slot)[begin : begin + part.n_bytes]
        assert len(view) == part.n_bytes
        return view

    def _arrange(self, layer: int, loaded: LoadedExpert, matrix: int) -> None:
        view = self._view(layer, loaded, matrix)
        view ^= _ARRANGED

    def _crcs(self, layer: int, loaded: LoadedExpert) -> list[int]:
        """Return the checksums of the matrices that an expert's stage uses, as they were before they were arranged."""
        views = [self._view(layer, loaded, matrix) for matrix in self._matrices(loaded.stage)]
        return [zlib.crc32((view ^ np.uint8(_ARRANGED)).data) for view in views]
