"""One model's arithmetic as programs of kernel steps, after the model's layer plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.kernels.attention import attention, rope_store
from mer.compute.kernels.elementwise import combine, gather, rms_norm, swiglu
from mer.compute.kernels.interleave import FIELDS, field_table, interleave
from mer.compute.kernels.matmul import matmul_step
from mer.compute.kernels.pack import pack
from mer.compute.kernels.router import route
from mer.compute.kernels.step import Step
from mer.compute.matrix import FLOAT_BYTES, Activations, Matrix, float_stride, multiply
from mer.compute.program import Program
from mer.compute.scratch import Limits, Scratch, kv_block_bytes, tile_scratch_bytes
from mer.compute.weights import DenseWeights
from mer.compute.worker import Batch, Float32Array, Int32Array, LoadedExpert, Stage, Uint8Array
from mer.errors import ComputeError
from mer.io.extents import ExpertMap
from mer.io.ggml import GGMLType
from mer.io.gguf import TensorInfo
from mer.model.spec import ModelSpec, RopeStyle

_KEPT_SHAPES = 8  # numbers of tokens for which a layer's attention steps are kept


@attrs.frozen
class _Group:
    """The rows of one expert in the batch, as they lie in `order`."""

    loaded: LoadedExpert
    parts: tuple[Matrix, ...]  # gate, up, down
    start: int
    count: int
    row: int  # first of its rows in `gate`, `up` and the packed inner activations


class Forward:
    """Adds steps to programs; keeps the batch that is under way.

    Args:
        spec: the model.
        limits: the largest batch.
        weights: the dense weights.
        experts: types and shapes of the routed experts.
    """

    def __init__(self, spec: ModelSpec, limits: Limits, weights: DenseWeights, experts: ExpertMap) -> None:
        self._spec, self._limits, self._weights, self._experts = spec, limits, weights, experts
        self.scratch = Scratch(spec, limits, weights.types | matrix_types((), experts), experts)
        self._layer_kv_bytes = kv_block_bytes(spec) // spec.n_layers
        self._tile_bytes = tile_scratch_bytes(experts)
        self._fields = {kind: field_table(kind) for kind in FIELDS}
        self._batch: Batch | None = None
        self._starts = np.zeros(spec.n_experts + 1, np.int64)
        self._predicts = False  # whether the last Attend did
        self._inner: set[int] = set()  # experts of the layer under way whose INNER has run, and not their OUTER
        # {(layer, tokens, blocks, predict): steps}
        self._attend_rows: dict[tuple[int, int, int, bool], npt.NDArray[np.int64]] = {}

    @property
    def staged_pairs(self) -> int:
        """See `ComputeWorker`."""
        return self._limits.ffn_rows(self._spec)

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
        s.damaged[:n] = 0
        s.positions[:n], s.sequences[:n] = batch.positions, batch.sequences
        s.table[:tables] = batch.tables.ravel()
        s.outputs[: len(batch.outputs)] = batch.outputs
        angle = batch.positions[:, None] * self._spec.rope_scale * s.frequencies
        both = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        s.angles[: both.size] = both.ravel()
        s.x[:n, : self._spec.d_model] = self._weights.rows("token_embd.weight", batch.tokens)

    def attend(self, program: Program, layer: int, *, predict: bool = False) -> None:
        """Add attention and router of a layer, and the next layer's router with `predict`, if there is one."""
        predict = predict and layer + 1 < self._spec.n_layers
        key = layer, len(self.batch.tokens), self.batch.tables.shape[1], predict
        rows = self._attend_rows.get(key)
        if rows is None:
            built = Program()
            self._attend(built, layer, predict)
            rows = built.rows[: built.length]
            if len(self._attend_rows) >= _KEPT_SHAPES * self._spec.n_layers:
                self._attend_rows.clear()
            self._attend_rows[key] = rows
        self._predicts = predict
        self._inner.clear()
        program.extend(rows)

    def _attend(self, program: Program, layer: int, predict: bool) -> None:
        spec, s, a = self._spec, self.scratch, self.scratch.address
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
        norms = [self._weights.vector(f"blk.{layer}.attn_{x}_norm.weight") if spec.qk_norm else 0 for x in "qk"]
        heads = spec.n_heads << 32 | spec.n_kv_heads
        pair = 1 if spec.rope_style is RopeStyle.INTERLEAVED else spec.rope_dim // 2
        kv = s.kv.address + layer * self._layer_kv_bytes
        block_bytes = kv_block_bytes(spec)
        max_blocks = self.batch.tables.shape[1]
        where = (a["positions"], a["sequences"], a["table"], max_blocks)
        program.add(
            rope_store, a["q_raw"], a["k_raw"], a["v_raw"], q_stride, kv_stride, a["q"], n, heads, spec.head_dim,
            spec.rope_dim << 32 | pair, a["angles"], *norms, eps, kv, block_bytes, *where,
        )  # fmt: skip
        program.barrier()
        scratch_stride = FLOAT_BYTES * 64 + float_stride(spec.head_dim)
        program.add(
            attention, a["q"], n, heads, spec.head_dim, s.scale, kv, block_bytes, *where, a["attended"], q_stride,
            a["scores"], scratch_stride,
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
        spec, a, n = self._spec, self.scratch.address, len(self.batch.tokens)
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
            multiply(program, gate, Activations(n, h, d, {}), logits, router_stride, self._limits.threads)
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
        n_bytes = kv_block_bytes(self._spec)
        return self.scratch.kv.view(self.scratch.kv.address + block * n_bytes, n_bytes)

    def damaged(self) -> Int32Array:
        """Return the batch rows for which a router logit was not finite so far."""
        return np.flatnonzero(self.scratch.damaged[: len(self.batch.tokens)]).astype(np.int32)

    def logits(self) -> Float32Array:
        """Return the logits [N, V] of the rows that the batch asked for, once `project` has run."""
        return self.scratch.logits[: len(self.batch.outputs), : self._spec.vocab_size].copy()

    def routed(self) -> Int32Array:
        """Return the router's choice [T, K] once `attend` has run, and sort the (token, choice) pairs by expert."""
        s, n, k = self.scratch, len(self.batch.tokens), self._spec.top_k
        ids = s.expert_ids[: n * k]
        order = np.argsort(ids, kind="stable")
        s.places[order] = np.arange(n * k, dtype=np.int32)
        s.order[: n * k] = order // k
        self._starts = np.searchsorted(ids[order], np.arange(self._spec.n_experts + 1))
        return ids.reshape(n, k).copy()

    def predicted(self) -> Int32Array | None:
        """Return the next layer's predicted choice [T, K] once `attend` has run with `predict`; None if it has not."""
        if not self._predicts:
            return None
        n, k = len(self.batch.tokens), self._spec.top_k
        return self.scratch.predicted_ids[: n * k].reshape(n, k).copy()

    def run_experts(self, program: Program, layer: int, experts: Sequence[LoadedExpert]) -> None:
        """Add the feed-forward networks of loaded experts, or stages of them, in groups that fit the scratch rows.

        Raises:
            ComputeError: a stage that the batch is too large for, or that comes out of turn.
        """
        rows, pairs = self.staged_pairs, len(self.batch.tokens) * self._spec.top_k
        staged = pairs <= rows
        for expert in experts:
            self._check(expert, layer, staged, pairs)
            self._interleave(program, layer, expert)
        program.barrier()
        groups: list[_Group] = []
        filled = 0
        for expert in experts:
            start, end = int(self._starts[expert.expert]), int(self._starts[expert.expert + 1])
            if not staged and filled + end - start > rows:
                self._run_groups(program, groups)
                groups, filled = [], 0
            if end > start:
                row = start if staged else filled
                groups.append(_Group(expert, self._parts(layer, expert), start, end - start, row))
                filled += end - start
        if groups:
            self._run_groups(program, groups)

    def _check(self, expert: LoadedExpert, layer: int, staged: bool, pairs: int) -> None:
        """Refuse a stage that cannot be computed, and keep account of those that can."""
        number, stage = expert.expert, expert.stage
        if stage is Stage.WHOLE:
            return
        if not staged:
            raise ComputeError(
                f"a batch of {pairs} (token, choice) pairs cannot run stages of experts, only one of at most "
                f"{self.staged_pairs}; run expert {number} of layer {layer} whole"
            )
        if (stage is Stage.INNER) == (number in self._inner):
            turn = "comes twice" if stage is Stage.INNER else "comes before its inner stage"
            raise ComputeError(f"the {stage.value} stage of expert {number} of layer {layer} {turn}")
        self._inner ^= {number}

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

    def _parts(self, layer: int, expert: LoadedExpert) -> tuple[Matrix, ...]:
        parts = self._experts.experts[layer][expert.expert].parts
        return tuple(Matrix(p.type, p.rows, p.cols, at) for p, at in zip(parts, expert.addresses, strict=True))

    def _interleave(self, program: Program, layer: int, expert: LoadedExpert) -> None:
        """Add the re-arranging of what is fresh and used by the expert's stage."""
        inner = expert.fresh[0] and expert.stage is not Stage.OUTER
        outer = expert.fresh[1] and expert.stage is not Stage.INNER
        for matrix, due in zip(self._parts(layer, expert), (inner, inner, outer), strict=True):
            kind = int(matrix.type)
            if due and kind in FIELDS:
                program.add(
                    interleave, matrix.address, matrix.address, matrix.rows, matrix.n_blocks, matrix.type.block_bytes,
                    int(self._fields[kind].ctypes.data), len(FIELDS[kind]), self.scratch.address["tile"],
                    self._tile_bytes,
                )  # fmt: skip

    def _run_groups(self, program: Program, groups: Sequence[_Group]) -> None:
        """Add gate, up, SwiGLU and down of groups whose rows together fit the scratch rows."""
        d = float_stride(self._spec.d_model)
        self._run_inner(program, [g for g in groups if g.loaded.stage is not Stage.OUTER])
        for g in groups:
            if g.loaded.stage is not Stage.INNER:
                y = self.scratch.address["y"] + g.start * d
                multiply(program, g.parts[2], self._inner_activations(g), y, d, self._limits.threads)
        program.barrier()

    def _run_inner(self, program: Program, groups: Sequence[_Group]) -> None:
        """Add gate, up and SwiGLU of groups, and the packing of what their down matrices multiply."""
        spec, s, a = self._spec, self.scratch, self.scratch.address
        threads = self._limits.threads
        d, f = float_stride(spec.d_model), float_stride(spec.d_ff)
        one_token = len(self.batch.tokens) == 1
        inputs: list[Activations] = []
        for g in groups:
            gate, up, _ = g.parts
            kinds = {gate.type, up.type}
            if one_token:  # every group is the same row
                x = Activations(1, a["h"], d, s.packed["input"])
                if g is groups[0]:
                    x.pack(program, spec.d_model, {m.type for group in groups for m in group.parts[:2]})
            else:
                index = a["order"] + FLOAT_BYTES * g.start
                packed = {size: area.offset(g.row, spec.d_model) for size, area in s.packed["input"].items()}
                x = Activations(g.count, a["gathered"] + g.row * d, d, packed)
                if any(int(kind) not in FIELDS for kind in kinds):
                    program.add(gather, a["h"], d, index, g.count, d, x.address, d)
                x.pack(program, spec.d_model, kinds, source=a["h"], index=index)
            inputs.append(x)
        program.barrier()
        for g, x in zip(groups, inputs, strict=True):
            gate, up, _ = g.parts
            multiply(program, gate, x, a["gate"] + g.row * f, f, threads)
            multiply(program, up, x, a["up"] + g.row * f, f, threads)
        program.barrier()
        for g in groups:
            program.add(swiglu, a["gate"] + g.row * f, a["up"] + g.row * f, g.count * f // FLOAT_BYTES)
        program.barrier()
        for g in groups:
            self._inner_activations(g).pack(program, spec.d_ff, {g.parts[2].type})
        program.barrier()

    def _inner_activations(self, group: _Group) -> Activations:
        """Return what a group's down matrix multiplies."""
        f = float_stride(self._spec.d_ff)
        packed = {size: area.offset(group.row, self._spec.d_ff) for size, area in self.scratch.packed["inner"].items()}
        return Activations(group.count, self.scratch.address["gate"] + group.row * f, f, packed)


def matrix_types(dense: Iterable[TensorInfo], experts: ExpertMap) -> set[GGMLType]:
    """Return the types of all weight matrices, dense and routed."""
    types = {tensor.type for tensor in dense if len(tensor.shape) == 2}
    return types | {p.type for layer in experts.experts for e in layer for p in e.parts}


def steps_for(kinds: Iterable[GGMLType], planes: int) -> list[Step]:
    """Return every kernel step that a model of these weight types uses with activations of so many planes."""
    steps = [matmul_step(int(kind), planes) for kind in kinds]
    return [*steps, interleave, pack, rms_norm, gather, swiglu, combine, rope_store, attention, route]
