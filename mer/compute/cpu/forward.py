"""One model's arithmetic as programs of kernel steps: the blocks of its layers, strung together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.blocks.attention import KV_KINDS, AttentionBlock, angle_bytes
from mer.compute.cpu.blocks.feed_forward import FeedForwardBlock
from mer.compute.cpu.blocks.head import HeadBlock
from mer.compute.cpu.blocks.router import RouterBlock
from mer.compute.cpu.blocks.total import TotalBlock
from mer.compute.cpu.blocks.workspace import Block, Workspace
from mer.compute.cpu.experts import RoutedExperts
from mer.compute.cpu.matrix import FLOAT_BYTES, float_stride, is_tiled
from mer.compute.cpu.program import Memory, Program
from mer.compute.cpu.scratch import Areas, Limits, Scratch
from mer.compute.cpu.weights import DenseWeights
from mer.compute.kernels.dispatch import dispatch
from mer.compute.kernels.elementwise import (
    activate,
    add_bias,
    add_gated,
    add_rows,
    cap_rows,
    clear_rows,
    combine,
    fill_entries,
    fill_rows,
    gather,
    normalize_heads,
    rms_norm,
)
from mer.compute.kernels.gate import gate_heads
from mer.compute.kernels.job_reads import await_reads, begin_reads, next_turn
from mer.compute.kernels.kv_layout import KV_TILE, tile_bytes
from mer.compute.kernels.matmul import INTERLEAVE_STEPS, matmul_step
from mer.compute.kernels.pack import pack
from mer.compute.kernels.router import route, route_by_score
from mer.compute.kernels.step import Step
from mer.compute.messages import Batch, Float32Array, Int32Array, Int64Array, LoadedExpert, Uint8Array
from mer.compute.state import StateLayout, state_layout
from mer.config import KVType
from mer.errors import ComputeError
from mer.io.extents import ExpertMap
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.io.loan.loan import Loan
from mer.limits import MAX_MATRICES
from mer.model.operators import Experts, Rope
from mer.model.rope import Rotation
from mer.model.spec import ModelSpec

_NO_ROWS = np.zeros(0, np.int32)
_NO_ROWS.flags.writeable = False
_FEW_ROWS = 32
_PHASES = 20  # of a layer
# A thread that finds fewer bytes of weights in a phase comes for nothing: one core hands the other what they share in
# some 0.5 us, in which it reads about as much.
_THREAD_BYTES = 16 << 10
_KEPT_SHAPES = 8  # numbers of tokens for which the steps up to each router and of the output head are kept


class Forward:
    """Adds steps to programs; keeps the batch that is under way.

    Args:
        spec: the model.
        limits: the largest batch.
        weights: the dense weights.
        experts: types and shapes of the routed experts.
    """

    def __init__(self, spec: ModelSpec, limits: Limits, weights: DenseWeights, experts: ExpertMap) -> None:
        self._spec, self._limits, self._weights = spec, limits, weights
        self._top_k = spec.top_k
        kinds = weights.types | matrix_types((), experts)
        self.scratch = Scratch(scratch_areas(spec, limits, experts), kinds, limits.planes)
        self._layout = kv_layout(spec, limits.kv_type)
        self._kv = Memory(limits.kv_blocks * self._layout.block_bytes)
        self._batch: Batch | None = None
        self._routed_experts: RoutedExperts | None = None
        if spec.routed:
            self._routed_experts = RoutedExperts(
                experts, spec.expert_weights, weights.vector, spec.top_k, limits, self.scratch
            )
        self._ropes = _ropes(spec)
        self._between: list[list[Block]] = [[]]  # what runs up to each router, and after the last one
        self._routers: list[RouterBlock] = []
        self._totals: list[TotalBlock] = []
        self._make_blocks()
        token_bytes = weights.used_bytes(tied_head=spec.tied_head)
        if spec.routed:
            token_bytes += experts.total_bytes * spec.top_k // spec.n_experts
        self._threads_per_row = token_bytes / (_PHASES * len(spec.layers) * _THREAD_BYTES)
        self._predicts = False  # whether the last `advance` did
        # all layers' steps for one place of the experts, number of tokens, and blocks
        self._resident_rows: tuple[Int64Array, tuple[int, int, int], list[int], npt.NDArray[np.int64]] | None = None
        self._routed_from = 0  # routed layer that the last run_resident began with
        # up to a router, by (its number, tokens, blocks, predict), and of the output head, by (rows asked for,)
        self._kept_rows: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}
        s = self.scratch
        self._damaged, self._positions, self._sequences = map(s.ints, ("damaged", "positions", "sequences"))
        self._table, self._outputs = s.ints("table"), s.ints("outputs")
        if spec.routed:  # views that every token looks at: making one takes as long as copying what is in it
            self._ids, self._predicted_ids, self._routes = map(s.ints, ("expert_ids", "predicted_ids", "routes"))
            self._stop = s.words("stop")
        self._rotations: list[Rotation] = []  # of `_ropes`, made once the weights are there
        self._angles = [s.floats(area) for area in self._ropes.values()]
        self._x = s.floats("x").reshape(limits.batch_tokens, -1)
        self._logits = s.floats("logits").reshape(limits.outputs, -1)

    def _make_blocks(self) -> None:
        spec = self._spec
        space = Workspace(self._limits, self.scratch, self._weights, spec.d_model)
        for layer, offset in zip(spec.layers, self._layout.offsets, strict=True):
            mixer = AttentionBlock(
                layer.mixer,
                layer.mixer_norm,
                layer.mixer_add,
                space,
                kv=self._kv.address + offset,
                block_bytes=self._layout.block_bytes,
                angles=self._ropes[layer.mixer.rope],
            )
            self._between[-1].append(mixer)
            if isinstance(layer.ffn, Experts):
                assert self._routed_experts is not None
                number = len(self._routers)
                self._routers.append(RouterBlock(layer.ffn, layer.ffn_norm, space, self._routed_experts, number))
                self._totals.append(TotalBlock(layer.ffn, layer.ffn_add, space))
                self._between.append([])
            else:
                self._between[-1].append(FeedForwardBlock(layer.ffn, layer.ffn_norm, layer.ffn_add, space))
        self._head = HeadBlock(spec.head, spec.norm, spec.softcap, space)
        self._shared_ran = False  # in the routed layer under way

    @property
    def shared_layers(self) -> frozenset[int]:
        """See `ComputeWorker`."""
        return self._spec.shared_layers

    @property
    def n_routed(self) -> int:
        """Routed layers."""
        return len(self._routers)

    @property
    def staged_pairs(self) -> int:
        """See `ComputeWorker`."""
        return 0 if self._routed_experts is None else self._routed_experts.staged_pairs

    @property
    def resident_rows(self) -> int:
        """See `ComputeWorker`."""
        experts = self._routed_experts
        return self._limits.resident_rows(self._top_k) if experts is not None and experts.alike else 0

    @property
    def threads(self) -> int:
        """How many threads the batch under way has work for; more would wait longer than they compute."""
        return max(1, min(self._limits.threads, int(self._threads_per_row * len(self.batch.tokens))))

    @property
    def batch(self) -> Batch:
        """The batch under way."""
        if self._batch is None:
            raise RuntimeError("no batch has begun")
        return self._batch

    def begin(self, batch: Batch) -> None:
        """Take over a batch: positions, KV tables, rotation angles, and the token embeddings as residual stream."""
        n, tables = len(batch.tokens), batch.tables.size
        if n > self._limits.batch_tokens or len(batch.outputs) > self._limits.outputs or tables > self._table.size:
            raise RuntimeError(f"a batch of {n} tokens exceeds {self._limits}")
        self._batch = batch
        if self._routed_experts is not None:
            self._routed_experts.begin(n)
        self._damaged[:n] = 0
        self._positions[:n], self._sequences[:n] = batch.positions, batch.sequences
        self._table[:tables] = batch.tables.ravel()
        self._outputs[: len(batch.outputs)] = batch.outputs
        if not self._rotations:
            self._rotations = [Rotation(rope, self._weights.floats) for rope in self._ropes]
        for rotation, area in zip(self._rotations, self._angles, strict=True):
            both = rotation.angles(batch.positions)
            area[: both.size] = both.swapaxes(0, 1).ravel()  # [T, 2, dim / 2]
        embeddings = self._weights.rows(self._spec.embedding.name, batch.tokens)
        np.multiply(embeddings, self._spec.embedding_scale, out=self._x[:n, : self._spec.d_model], casting="same_kind")

    def advance(self, program: Program, to: int, *, predict: bool = False) -> None:
        """Add everything up to and with a router, or after the last one, to the logits; see `Advance`."""
        n, n_blocks = len(self.batch.tokens), self.batch.tables.shape[1]
        if to == len(self._routers):
            if self._between[to]:
                self._add_kept(program, (to, n, n_blocks, 0), lambda built: self._run_up(built, to))
            rows = len(self.batch.outputs)
            self._add_kept(program, (rows,), lambda built: self._head.add(built, rows))
            return
        predict = predict and to + 1 < len(self._routers)
        self._predicts = predict
        self._shared_ran = False
        assert self._routed_experts is not None
        self._routed_experts.begin_layer()

        def build(built: Program) -> None:
            self._run_up(built, to)
            self._routers[to].add(built, n, self._routers[to + 1] if predict else None)

        self._add_kept(program, (to, n, n_blocks, predict), build)

    def _run_up(self, program: Program, to: int) -> None:
        """Add the blocks between one router and the next."""
        for block in self._between[to]:
            block.add(program, len(self.batch.tokens), self.batch.tables.shape[1])

    def _add_kept(self, program: Program, key: tuple[int, ...], build: Callable[[Program], None]) -> None:
        """Add steps that are the same whenever the key is, building them the first time."""
        rows = self._kept_rows.get(key)
        if rows is None:
            built = Program()
            build(built)
            rows = built.rows[: built.length]
            if len(self._kept_rows) >= _KEPT_SHAPES * (len(self._between) + 1):
                self._kept_rows.clear()
            self._kept_rows[key] = rows
        program.extend(rows)

    def floats(self, name: str) -> Float32Array:
        """Return a dense tensor of float32 by its name."""
        return self._weights.floats(name)

    def read_block(self, block: int) -> Uint8Array:
        """Return the KV of a block of all layers, read-only and in place: it lasts while nobody writes to the block."""
        kv = self._block(block).view()
        kv.flags.writeable = False
        return kv

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put KV that `read_block` once gave into a block."""
        self._block(block)[:] = kv

    def _block(self, block: int) -> Uint8Array:
        n_bytes = self._layout.block_bytes
        return self._kv.view(self._kv.address + block * n_bytes, n_bytes)

    def damaged(self) -> Int32Array:
        """Return the batch rows for which a router logit was not finite so far; read-only."""
        damaged = self._damaged[: len(self.batch.tokens)]
        # looking at a few rows takes Python less time than setting up NumPy's `any`
        found = any(damaged.data) if len(damaged) <= _FEW_ROWS else damaged.any()
        return np.flatnonzero(damaged).astype(np.int32) if found else _NO_ROWS

    @property
    def n_logits(self) -> int:
        """How many logits the batch asks for, N * V."""
        return len(self.batch.outputs) * self._spec.vocab_size

    def logits(self) -> Float32Array:
        """Return the logits [N, V] of the rows that the batch asked for, once `advance` has come to them."""
        return self._logits[: len(self.batch.outputs), : self._spec.vocab_size].copy()

    def routed(self) -> Int32Array:
        """Return the router's choice [T, K] once `advance` has run, and sort the (token, choice) pairs by expert."""
        assert self._routed_experts is not None
        n, k = len(self.batch.tokens), self._top_k
        ids = self._ids[: n * k]
        self._routed_experts.assign(ids)
        return ids.reshape(n, k).copy()

    def predicted(self) -> Int32Array | None:
        """Return the next router's predicted choice [T, K] after `advance` with `predict`; None without."""
        if not self._predicts:
            return None
        n, k = len(self.batch.tokens), self._top_k
        return self._predicted_ids[: n * k].reshape(n, k).copy()

    def run_experts(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None:
        """Add the feed-forward networks of loaded experts of a routed layer, or stages of them.

        Raises:
            ComputeError: a stage that the batch is too large for, or that comes out of turn.
        """
        assert self._routed_experts is not None
        self._routed_experts.run(program, layer, experts)

    def run_shared(self, program: Program, layer: int) -> None:
        """Add the network that a routed layer's experts share, if it has one and has not run yet."""
        if not self._shared_ran:
            self._totals[layer].add_shared(program, len(self.batch.tokens))
            self._shared_ran = True

    def run_resident(self, program: Program, layer: int, addresses: Int64Array, reads: Loan | None = None) -> None:
        """Add all layers from the experts of this one on, to follow its `advance`; see `RunResident`.

        Raises:
            ComputeError: the batch is too large for it, or experts of a layer differ in types.
        """
        n = len(self.batch.tokens)
        if n > self.resident_rows:
            raise ComputeError(
                f"a batch of {n} rows cannot run all layers at once, only one of at most {self.resident_rows}; "
                "run layer by layer"
            )
        control = 0 if reads is None else reads.address
        key = n, self.batch.tables.shape[1], control
        kept = self._resident_rows
        if kept is None or kept[0] is not addresses or kept[1] != key:
            built, starts, place = Program(), [], int(addresses.ctypes.data)
            for number in range(len(self._routers)):
                starts.append(built.length)
                self._dispatch(built, number, place, control)
                self._shared_ran = False
                self.combine(built, number)
                if number + 1 < len(self._routers):
                    self.advance(built, number + 1)
            kept = self._resident_rows = addresses, key, starts, built.rows[: built.length]
        self._shared_ran = False  # a program that ends early has not come to it
        _, _, starts, rows = kept
        program.extend(rows[starts[layer] :])
        self._stop[:] = 0
        self._routed_from = layer

    def _dispatch(self, program: Program, layer: int, addresses: int, reads: int) -> None:
        """Add the experts of a layer that the router has chosen, or the end of the program if one cannot be had."""
        spec, a, experts = self._spec, self.scratch.address, self._routed_experts
        assert experts is not None
        # Tables whose lengths the job finds out, and not steps for each expert of which most would do nothing: there
        # would be E times as many rows, and every thread would claim from each.
        pairs = len(self.batch.tokens) * spec.top_k
        log = a["routes"] + FLOAT_BYTES * pairs * layer
        stop, end, skip, again = (a["stop"] + 8 * word for word in range(4))
        steps, missing = experts.table_steps(layer), a["table_missing"]
        addresses += 8 * MAX_MATRICES * spec.n_experts * layer
        program.add(
            dispatch.row(
                ids=a["expert_ids"],  # [T, K]
                n_pairs=pairs,
                k=spec.top_k,
                n_experts=spec.n_experts,
                addresses=addresses,  # [E, MAX_MATRICES]
                ends=a["expert_ends"],  # [E]
                table=a["table_entries"],
                missing=missing,
                steps=steps,
                places=a["places"],  # [T, K]
                order=a["order"],  # [T * K]
                log=log,  # [T, K]
                stop=stop,
                layer=layer,
                end=end,
                skip=skip,
                reads=reads,
            )
        )
        program.barrier(end)
        program.add(begin_reads.row(control=reads))
        experts.run_table(program, layer)
        program.barrier(skip)
        program.add(await_reads.row(control=reads, end=end, stop=stop, layer=layer, table=missing, steps=steps))
        program.barrier(end)
        program.add(next_turn.row(again=again))
        experts.run_table(program, layer)
        program.barrier(again)

    def routes(self) -> tuple[Int32Array, bool]:
        """Return the choices [layers, T, K] of the routers that `run_resident` has come to, and whether it is through.

        If it is not, the batch's next step is the experts of the last of these layers.
        """
        n, k, n_layers = len(self.batch.tokens), self._top_k, len(self._routers)
        every = self._routes[: n_layers * n * k].reshape(-1, n, k)
        stop = int(self._stop[0])
        return every[self._routed_from : stop or n_layers].copy(), not stop

    def combine(self, program: Program, layer: int) -> None:
        """Add the shared network of a routed layer, unless it has run, and then its experts' weighted outputs."""
        self.run_shared(program, layer)
        self._totals[layer].add(program, len(self.batch.tokens))


def kv_layout(spec: ModelSpec, kv_type: KVType) -> StateLayout:
    """Return how the CPU worker divides a KV block: heads are padded to 32 elements."""
    return state_layout(spec, lambda head_dim: tile_bytes(KV_KINDS[kv_type], head_dim), KV_TILE)


def scratch_areas(spec: ModelSpec, limits: Limits, experts: ExpertMap) -> Areas:
    """Return the scratch memory of a whole model: what its blocks share, and the union of what each needs."""
    t, d = limits.batch_tokens, float_stride(spec.d_model)
    common = {
        "x": t * d,  # residual stream
        "h": max(t, limits.outputs) * d,  # normalized
        "positions": t * FLOAT_BYTES,
        "sequences": t * FLOAT_BYTES,
        "outputs": limits.outputs * FLOAT_BYTES,
        "table": limits.sequences * limits.sequence_blocks * FLOAT_BYTES,
        "damaged": t * FLOAT_BYTES,  # rows whose router logits were not finite
        **{area: angle_bytes(rope, limits) for rope, area in _ropes(spec).items()},
    }
    parts = [Areas(common), HeadBlock.areas(spec.head, spec.norm, spec.softcap, limits)]
    for layer in spec.distinct_layers:
        ffn, ffn_norm = layer.ffn, layer.ffn_norm
        parts.append(AttentionBlock.areas(layer.mixer, layer.mixer_norm, layer.mixer_add, limits))
        if isinstance(ffn, Experts):
            parts.append(RouterBlock.areas(ffn, ffn_norm, limits))
            parts.append(TotalBlock.areas(ffn, layer.ffn_add, limits))
        else:
            parts.append(FeedForwardBlock.areas(ffn, ffn_norm, layer.ffn_add, limits))
    if spec.routed:
        parts.append(RoutedExperts.areas(experts, spec.expert_weights, spec.top_k, limits))
    return Areas.union(parts)


def _ropes(spec: ModelSpec) -> dict[Rope, str]:
    """Return the ways in which layers rotate their heads, and the area of each one's angles."""
    return {rope: f"angles{number}" for number, rope in enumerate(spec.ropes)}


def matrix_types(dense: Iterable[TensorInfo], experts: ExpertMap) -> set[GGMLType]:
    """Return the types of all weight matrices, dense and routed."""
    types = {tensor.type for tensor in dense if len(tensor.shape) == 2}
    return types | {p.type for layer in experts.experts for e in layer for p in e.parts}


def steps_for(kinds: Collection[GGMLType], planes: int, kv_type: KVType) -> list[Step]:
    """Return every kernel step that a model of these weight types uses, with activations of so many planes."""
    steps = [matmul_step(int(kind), planes) for kind in kinds]
    steps += [INTERLEAVE_STEPS[int(kind)] for kind in kinds if is_tiled(kind)]
    steps += AttentionBlock.steps(kv_type)
    steps += [pack, rms_norm, gather, activate, add_bias, add_gated, fill_entries, fill_rows, combine, route]
    steps += [route_by_score, dispatch, add_rows, cap_rows, clear_rows, normalize_heads, gate_heads]
    return [*steps, begin_reads, await_reads, next_turn]
