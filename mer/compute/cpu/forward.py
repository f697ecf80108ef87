"""One model's arithmetic as programs of kernel steps, after the model's layer plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from mer.compute.cpu.experts import RoutedExperts
from mer.compute.cpu.matrix import FLOAT_BYTES, Activations, Matrix, float_stride, is_tiled, multiply
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import KV_KINDS, Limits, Scratch, kv_block_bytes
from mer.compute.cpu.weights import DenseWeights
from mer.compute.kernels.attention import ATTENTION, thread_bytes
from mer.compute.kernels.dispatch import dispatch
from mer.compute.kernels.elementwise import combine, gather, rms_norm, swiglu
from mer.compute.kernels.job_reads import await_reads, begin_reads, next_turn
from mer.compute.kernels.matmul import INTERLEAVE_STEPS, matmul_step
from mer.compute.kernels.pack import pack
from mer.compute.kernels.rope import ROPE_STORE
from mer.compute.kernels.router import route
from mer.compute.kernels.step import Step
from mer.compute.messages import Batch, Float32Array, Int32Array, Int64Array, LoadedExpert, Uint8Array
from mer.config import KVType
from mer.errors import ComputeError
from mer.io.extents import ExpertMap
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.io.job_reads import JobReads
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec

_NO_ROWS = np.zeros(0, np.int32)
_NO_ROWS.flags.writeable = False
_FEW_ROWS = 32
_PHASES = 20  # of a layer
# A thread that finds fewer bytes of weights in a phase comes for nothing: one core hands the other what they share in
# some 0.5 us, in which it reads about as much.
_THREAD_BYTES = 16 << 10
_KEPT_SHAPES = 8  # numbers of tokens for which the steps of a layer's attention and of the output head are kept


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
        self.scratch = Scratch(spec, limits, weights.types | matrix_types((), experts), experts)
        self._kv_block_bytes = kv_block_bytes(spec, limits.kv_type)
        self._kv_kind = KV_KINDS[limits.kv_type]
        token_bytes = weights.used_bytes(tied_head=spec.tied_head) + experts.total_bytes * spec.top_k // spec.n_experts
        self._threads_per_row = token_bytes / (_PHASES * spec.n_routed * _THREAD_BYTES)
        self._batch: Batch | None = None
        self._routed_experts = RoutedExperts(spec, limits, self.scratch, experts)
        self._predicts = False  # whether the last Attend did
        # all layers' steps for one place of the experts, number of tokens, and blocks
        self._resident_rows: tuple[Int64Array, tuple[int, int, int], list[int], npt.NDArray[np.int64]] | None = None
        self._routed_from = 0  # layer that the last run_resident began with
        # of attention, by (layer, tokens, blocks, predict), and of the output head, by (rows asked for,)
        self._kept_rows: dict[tuple[int, ...], npt.NDArray[np.int64]] = {}

    @property
    def staged_pairs(self) -> int:
        """See `ComputeWorker`."""
        return self._routed_experts.staged_pairs

    @property
    def resident_rows(self) -> int:
        """See `ComputeWorker`."""
        return self._limits.resident_rows(self._spec) if self._routed_experts.alike else 0

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
        s, n = self.scratch, len(batch.tokens)
        tables = batch.tables.size
        if n > self._limits.batch_tokens or len(batch.outputs) > self._limits.outputs or tables > s.table.size:
            raise RuntimeError(f"a batch of {n} tokens exceeds {self._limits}")
        self._batch = batch
        self._routed_experts.begin(n)
        s.damaged[:n] = 0
        s.positions[:n], s.sequences[:n] = batch.positions, batch.sequences
        s.table[:tables] = batch.tables.ravel()
        s.outputs[: len(batch.outputs)] = batch.outputs
        angle = batch.positions[:, None] * self._spec.attention.rope.scale * s.frequencies
        both = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        s.angles[: both.size] = both.ravel()
        s.x[:n, : self._spec.d_model] = self._weights.rows("token_embd.weight", batch.tokens)

    def attend(self, program: Program, layer: int, *, predict: bool = False) -> None:
        """Add attention and router of a layer, and the next layer's router with `predict`, if there is one."""
        predict = predict and layer + 1 < self._spec.n_routed
        self._predicts = predict
        self._routed_experts.begin_layer()
        key = layer, len(self.batch.tokens), self.batch.tables.shape[1], predict
        self._add_kept(program, key, lambda built: self._attend(built, layer, predict))

    def _add_kept(self, program: Program, key: tuple[int, ...], build: Callable[[Program], None]) -> None:
        """Add steps that are the same whenever the key is, building them the first time."""
        rows = self._kept_rows.get(key)
        if rows is None:
            built = Program()
            build(built)
            rows = built.rows[: built.length]
            if len(self._kept_rows) >= _KEPT_SHAPES * (self._spec.n_routed + 1):
                self._kept_rows.clear()
            self._kept_rows[key] = rows
        program.extend(rows)

    def _attend(self, program: Program, layer: int, predict: bool) -> None:
        spec, s, a = self._spec, self.scratch, self.scratch.address
        attention = spec.attention
        n, threads = len(self.batch.tokens), self._limits.threads
        d, eps = float_stride(spec.d_model), s.eps
        q, k, v, o = (self._matrix(layer, f"attn_{name}") for name in ("q", "k", "v", "output"))
        h = Activations(n, a["h"], d, s.packed["input"])
        self._norm(program, f"blk.{layer}.attn_norm.weight", a["x"], 0, n, a["h"])
        program.barrier()
        h.pack(program, spec.d_model, {q.type, k.type, v.type})
        program.barrier()
        q_stride, kv_stride = float_stride(q.rows), float_stride(k.rows)
        multiply(program, q, h, a["q_raw"], q_stride, threads)
        multiply(program, k, h, a["k_raw"], kv_stride, threads)
        multiply(program, v, h, a["v_raw"], kv_stride, threads)
        program.barrier()
        normed = attention.q_norm is not None
        norms = [self._weights.vector(f"blk.{layer}.attn_{x}_norm.weight") if normed else 0 for x in "qk"]
        heads = attention.n_heads << 32 | attention.n_kv_heads
        pair = 1 if attention.rope.style is RopeStyle.INTERLEAVED else attention.rope.dim // 2
        kv = s.kv.address + layer * (self._kv_block_bytes // spec.n_routed)
        block_bytes = self._kv_block_bytes
        max_blocks = self.batch.tables.shape[1]
        where = (a["positions"], a["sequences"], a["table"], max_blocks)
        program.add(
            ROPE_STORE[self._kv_kind], a["q_raw"], a["k_raw"], a["v_raw"], q_stride, kv_stride, a["q"], n, heads,
            attention.head_dim, attention.rope.dim << 32 | pair, a["angles"], *norms, eps, kv, block_bytes, *where,
        )  # fmt: skip
        program.barrier()
        scratch_stride = thread_bytes(attention.n_heads, attention.n_kv_heads, attention.head_dim)
        program.add(
            ATTENTION[self._kv_kind], a["q"], n, heads, attention.head_dim, s.scale, kv, block_bytes, *where,
            a["attended"], q_stride, a["attention"], scratch_stride, attention.window or 0,
            self._limits.split_tokens(spec), a["attention_parts"],
        )  # fmt: skip
        program.barrier()
        attended = Activations(n, a["attended"], q_stride, s.packed["input"])
        attended.pack(program, o.cols, {o.type})
        program.barrier()
        multiply(program, o, attended, a["x"], d, threads, add=True)
        program.barrier()
        self._route(program, layer, predict)

    def _route(self, program: Program, layer: int, predict: bool) -> None:
        """Add the norm before the experts and the router, and side by side with them those of the next layer."""
        spec, a, n, threads = self._spec, self.scratch.address, len(self.batch.tokens), self._limits.threads
        d, router_stride = float_stride(spec.d_model), float_stride(spec.n_experts)
        targets = [
            (layer, a["h"], a["router"], (a["expert_ids"], a["expert_weights"], a["damaged"])),
            (layer + 1, a["next_h"], a["next_router"], (a["predicted_ids"], a["predicted_weights"], 0)),
        ][: 1 + predict]
        for at, h, _, _ in targets:
            self._norm(program, f"blk.{at}.ffn_norm.weight", a["x"], 0, n, h)
        program.barrier()
        for at, h, logits, _ in targets:
            gate = self._matrix(at, "ffn_gate_inp")
            multiply(program, gate, Activations(n, h, d, {}), logits, router_stride, threads)
        self._routed_experts.prepare_token(program, layer)
        program.barrier()
        for _, _, logits, results in targets:
            program.add(route, logits, router_stride, n, spec.n_experts, spec.top_k, *results)
        program.barrier()

    def read_block(self, block: int) -> Uint8Array:
        """Return the KV of a block of all layers, read-only and in place: it lasts while nobody writes to the block."""
        kv = self._block(block).view()
        kv.flags.writeable = False
        return kv

    def write_block(self, block: int, kv: Uint8Array) -> None:
        """Put KV that `read_block` once gave into a block."""
        self._block(block)[:] = kv

    def _block(self, block: int) -> Uint8Array:
        n_bytes = self._kv_block_bytes
        return self.scratch.kv.view(self.scratch.kv.address + block * n_bytes, n_bytes)

    def damaged(self) -> Int32Array:
        """Return the batch rows for which a router logit was not finite so far; read-only."""
        damaged = self.scratch.damaged[: len(self.batch.tokens)]
        # looking at a few rows takes Python less time than setting up NumPy's `any`
        found = any(damaged.data) if len(damaged) <= _FEW_ROWS else damaged.any()
        return np.flatnonzero(damaged).astype(np.int32) if found else _NO_ROWS

    @property
    def n_logits(self) -> int:
        """How many logits the batch asks for, N * V."""
        return len(self.batch.outputs) * self._spec.vocab_size

    def logits(self) -> Float32Array:
        """Return the logits [N, V] of the rows that the batch asked for, once `project` has run."""
        return self.scratch.logits[: len(self.batch.outputs), : self._spec.vocab_size].copy()

    def routed(self) -> Int32Array:
        """Return the router's choice [T, K] once `attend` has run, and sort the (token, choice) pairs by expert."""
        s, n, k = self.scratch, len(self.batch.tokens), self._spec.top_k
        ids = s.expert_ids[: n * k]
        self._routed_experts.assign(ids)
        return ids.reshape(n, k).copy()

    def predicted(self) -> Int32Array | None:
        """Return the next layer's predicted choice [T, K] once `attend` has run with `predict`; None if it has not."""
        if not self._predicts:
            return None
        n, k = len(self.batch.tokens), self._spec.top_k
        return self.scratch.predicted_ids[: n * k].reshape(n, k).copy()

    def run_experts(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None:
        """Add the feed-forward networks of loaded experts, or stages of them.

        Raises:
            ComputeError: a stage that the batch is too large for, or that comes out of turn.
        """
        self._routed_experts.run(program, layer, experts)

    def run_resident(self, program: Program, layer: int, addresses: Int64Array, reads: JobReads | None = None) -> None:
        """Add all layers from the experts of this one on, to follow its `attend`; see `RunResident`.

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
            for number in range(self._spec.n_routed):
                starts.append(built.length)
                self._dispatch(built, number, place, control)
                self.combine(built)
                if number + 1 < self._spec.n_routed:
                    self.attend(built, number + 1)
            kept = self._resident_rows = addresses, key, starts, built.rows[: built.length]
        _, _, starts, rows = kept
        program.extend(rows[starts[layer] :])
        self.scratch.stop[:] = 0
        self._routed_from = layer

    def _dispatch(self, program: Program, layer: int, addresses: int, reads: int) -> None:
        """Add the experts of a layer that the router has chosen, or the end of the program if one cannot be had."""
        spec, a, experts = self._spec, self.scratch.address, self._routed_experts
        pairs = len(self.batch.tokens) * spec.top_k
        log = a["routes"] + FLOAT_BYTES * pairs * layer
        stop, end, skip, again = (a["stop"] + 8 * word for word in range(4))
        steps, missing = experts.table_steps(layer), a["table_missing"]
        program.add(
            dispatch, a["expert_ids"], pairs, spec.top_k, spec.n_experts, addresses + 24 * spec.n_experts * layer,
            a["expert_ends"], a["table_entries"], missing, steps, a["places"], a["order"], log, stop, layer, end, skip,
            reads,
        )  # fmt: skip
        program.barrier(end)
        program.add(begin_reads, reads)
        experts.run_table(program, layer)
        program.barrier(skip)
        program.add(await_reads, reads, end, stop, layer, missing, steps)
        program.barrier(end)
        program.add(next_turn, again)
        experts.run_table(program, layer)
        program.barrier(again)

    def routes(self) -> tuple[Int32Array, bool]:
        """Return the choices [layers, T, K] of the routers that `run_resident` has come to, and whether it is through.

        If it is not, the batch's next step is the experts of the last of these layers.
        """
        n, k = len(self.batch.tokens), self._spec.top_k
        every = self.scratch.routes[: self._spec.n_routed * n * k].reshape(-1, n, k)
        stop = int(self.scratch.stop[0])
        return every[self._routed_from : stop or self._spec.n_routed].copy(), not stop

    def combine(self, program: Program) -> None:
        """Add the step that adds the weighted expert outputs to the residual stream."""
        a, d = self.scratch.address, float_stride(self._spec.d_model)
        program.add(
            combine, a["x"], d, len(self.batch.tokens), d // FLOAT_BYTES, a["y"], a["expert_weights"], a["places"],
            self._spec.top_k,
        )  # fmt: skip
        program.barrier()

    def project(self, program: Program) -> None:
        """Add final norm and output head for the rows that the batch asked for."""
        self._add_kept(program, (len(self.batch.outputs),), self._project)

    def _project(self, program: Program) -> None:
        spec, s, a = self._spec, self.scratch, self.scratch.address
        n = len(self.batch.outputs)
        head = self._weights.matrix("token_embd.weight" if spec.tied_head else "output.weight")
        self._norm(program, "output_norm.weight", a["x"], a["outputs"], n, a["h"])
        program.barrier()
        h = Activations(n, a["h"], float_stride(spec.d_model), s.packed["input"])
        h.pack(program, spec.d_model, {head.type})
        program.barrier()
        multiply(program, head, h, a["logits"], float_stride(spec.vocab_size), self._limits.threads)
        program.barrier()

    def _matrix(self, layer: int, name: str) -> Matrix:
        return self._weights.matrix(f"blk.{layer}.{name}.weight")

    def _norm(self, program: Program, name: str, x: int, index: int, n: int, out: int) -> None:
        stride = float_stride(self._spec.d_model)
        weight = self._weights.vector(name)
        program.add(rms_norm, x, stride, index, n, self._spec.d_model, weight, self.scratch.eps, out, stride)


def matrix_types(dense: Iterable[TensorInfo], experts: ExpertMap) -> set[GGMLType]:
    """Return the types of all weight matrices, dense and routed."""
    types = {tensor.type for tensor in dense if len(tensor.shape) == 2}
    return types | {p.type for layer in experts.experts for e in layer for p in e.parts}


def steps_for(kinds: Collection[GGMLType], planes: int, kv_type: KVType) -> list[Step]:
    """Return every kernel step that a model of these weight types uses, with activations of so many planes."""
    steps = [matmul_step(int(kind), planes) for kind in kinds]
    steps += [INTERLEAVE_STEPS[int(kind)] for kind in kinds if is_tiled(kind)]
    steps += [ROPE_STORE[KV_KINDS[kv_type]], ATTENTION[KV_KINDS[kv_type]]]
    return [*steps, pack, rms_norm, gather, swiglu, combine, route, dispatch, begin_reads, await_reads, next_turn]
