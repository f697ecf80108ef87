"""Grouped-query attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from mer.compute.cpu.blocks.workspace import Workspace, addition_areas
from mer.compute.cpu.matrix import FLOAT_BYTES, Activations, float_stride
from mer.compute.cpu.program import Program
from mer.compute.cpu.scratch import Areas, Limits
from mer.compute.kernels.attention import ATTENTION, split_bytes, thread_bytes
from mer.compute.kernels.elementwise import normalize_heads
from mer.compute.kernels.gate import gate_heads
from mer.compute.kernels.kv_layout import F16_KIND, F32_KIND, Q8_0_KIND
from mer.compute.kernels.rope import ROPE_STORE
from mer.compute.kernels.step import Step
from mer.config import KVType
from mer.model.operators import Addition, Attention, HeadNorms, Linear, Norm, Rope, RopeStyle

KV_KINDS: Final[Mapping[KVType, int]] = {"f32": F32_KIND, "f16": F16_KIND, "q8_0": Q8_0_KIND}


class AttentionBlock:
    """x plus attention(norm(x)), with keys and values stored on the way.

    Args:
        record: the attention.
        norm: before it.
        addition: how its result is added to x.
        space: memory and weights.
        kv: address of the layer's state in the first KV block.
        block_bytes: from one KV block to the next.
        angles: name of the area with the rotation angles of the record's RoPE.
    """

    def __init__(
        self,
        record: Attention,
        norm: Norm,
        addition: Addition,
        space: Workspace,
        *,
        kv: int,
        block_bytes: int,
        angles: str,
    ) -> None:
        self._record, self._norm, self._addition, self._space = record, norm, addition, space
        self._kv, self._block_bytes, self._angles = kv, block_bytes, angles

    @staticmethod
    def areas(record: Attention, norm: Norm, addition: Addition, limits: Limits) -> Areas:
        """Return what it needs of the scratch memory; x, h, angles and the batch's tables are everybody's."""
        t, heads, kv_heads, c = limits.batch_tokens, record.n_heads, record.n_kv_heads, record.head_dim
        norms = [it.eps for it in (norm, record.q_norm, record.k_norm) if it is not None]
        v_eps = () if record.v_eps is None else (record.v_eps,)
        gates = {} if record.gate is None else {"head_gates": t * float_stride(record.gate.rows)}
        own = Areas(
            sizes={
                **gates,
                "q_raw": t * float_stride(heads * c),
                "k_raw": t * float_stride(kv_heads * c),
                "v_raw": t * float_stride(kv_heads * c),
                "q": t * heads * float_stride(c),
                "attended": t * float_stride(heads * c),
                "attention": limits.threads * thread_bytes(heads, kv_heads, c),
                "attention_parts": split_bytes(
                    limits.split_tokens(kv_heads), heads, kv_heads, c, limits.sequence_blocks
                ),
            },
            packed={"input": (t, max(record.q.cols, heads * c))},
            constants=(*norms, *v_eps, record.scale),
        )
        return Areas.union([own, addition_areas(addition, record.out.rows, limits)])

    @staticmethod
    def steps(kv_type: KVType) -> tuple[Step, ...]:
        """Return the steps that are its own."""
        return ROPE_STORE[KV_KINDS[kv_type]], ATTENTION[KV_KINDS[kv_type]]

    def add(self, program: Program, n: int, n_blocks: int) -> None:
        """Add the steps; see `Block`.

        Q, K and V are three products and not one of joined matrices: files keep them apart, and joining them in memory
        would need equal types.
        """
        record, space, s = self._record, self._space, self._space.scratch
        a, limits = s.address, space.limits
        kind = KV_KINDS[limits.kv_type]
        d, head_dim = float_stride(record.q.cols), record.head_dim
        q, k, v, o = map(space.matrix, (record.q, record.k, record.v, record.out))
        h = Activations(n, a["h"], d, s.packed["input"])  # [T, D]
        space.norm(program, self._norm, a["x"], n, a["h"])
        program.barrier()
        gate = set() if record.gate is None else {space.matrix(record.gate).type}
        h.pack(program, q.cols, {q.type, k.type, v.type} | gate)
        inputs: tuple[tuple[Linear, int], ...] = (
            (record.q, a["q_raw"]),
            (record.k, a["k_raw"]),
            (record.v, a["v_raw"]),
        )  # [T, H * C], [T, G * C] twice
        if record.gate is not None:
            inputs = *inputs, (record.gate, a["head_gates"])  # [T, H] or [T, H * C]
        for linear, out in inputs:
            space.seed(program, linear, n, out)
        program.barrier()
        for linear, out in inputs:
            space.multiply(program, linear, h, out, seeded=True)
        q_stride, kv_stride = float_stride(q.rows), float_stride(k.rows)
        program.barrier()
        if record.v_eps is not None:
            program.add(
                normalize_heads.row(
                    values=a["v_raw"],  # [T, G * C]
                    stride=kv_stride,
                    n=n,
                    heads=record.n_kv_heads,
                    c=head_dim,
                    eps=s.constant(record.v_eps),
                )
            )
            program.barrier()
        pairs = (record.q_norm, a["q_raw"]), (record.k_norm, a["k_raw"])
        norms = [0 if it is None else space.weights.vector(it.weight.name) for it, _ in pairs]
        if record.norms is HeadNorms.WHOLE:
            for norm, raw in pairs:
                if norm is not None:
                    space.norm(program, norm, raw, n, raw)
            program.barrier()
            norms = [0, 0]
        eps = s.constant((record.q_norm or record.k_norm or self._norm).eps)
        q_norm, k_norm = norms
        heads = record.n_heads << 32 | record.n_kv_heads
        program.add(
            ROPE_STORE[kind].row(
                q_raw=a["q_raw"],  # [T, H * C]
                k_raw=a["k_raw"],  # [T, G * C]
                v_raw=a["v_raw"],  # [T, G * C]
                q_raw_stride=q_stride,
                kv_raw_stride=kv_stride,
                q=a["q"],  # [T, H, C padded to 16]
                n=n,
                heads=heads,
                c=head_dim,
                rope=record.rope.dim << 32 | _pair_distance(record.rope),
                angles=a[self._angles],  # [T, 2, rope_dim / 2]
                q_norm=q_norm,  # [C]
                k_norm=k_norm,  # [C]
                eps=eps,
                kv=self._kv,
                block_bytes=self._block_bytes,
                positions=a["positions"],  # [T]
                sequences=a["sequences"],  # [T]
                table=a["table"],  # [S, n_blocks]
                max_blocks=n_blocks,
                norms_last=int(record.norms is HeadNorms.AFTER),
            )
        )
        program.barrier()
        program.add(
            ATTENTION[kind].row(
                q=a["q"],  # [T, H, C padded to 16]
                n=n,
                heads=heads,
                c=head_dim,
                scale=s.constant(record.scale),
                kv=self._kv,
                block_bytes=self._block_bytes,
                positions=a["positions"],  # [T]
                sequences=a["sequences"],  # [T]
                table=a["table"],  # [S, n_blocks]
                max_blocks=n_blocks,
                out=a["attended"],  # [T, H * C]
                out_stride=q_stride,
                scratch=a["attention"],
                scratch_stride=thread_bytes(record.n_heads, record.n_kv_heads, head_dim),
                window=record.window or 0,
                split=limits.split_tokens(record.n_kv_heads),
                counters=a["attention_parts"],
                sinks=0 if record.sinks is None else space.weights.vector(record.sinks.name),  # [H]
            )
        )
        program.barrier()
        if record.gate is not None:
            program.add(
                gate_heads.row(
                    values=a["attended"],  # [T, H * C]
                    stride=q_stride,
                    n=n,
                    n_gates=record.gate.rows,
                    width=q.rows // record.gate.rows,
                    gates=a["head_gates"],  # [T, H] or [T, H * C]
                    gates_stride=float_stride(record.gate.rows),
                )
            )
            program.barrier()
        attended = Activations(n, a["attended"], q_stride, s.packed["input"])  # [T, H * C]
        attended.pack(program, o.cols, {o.type})
        plain = self._addition.plain
        out = a["x"] if plain else a["half"]
        space.seed(program, record.out, n, out, add=plain)
        program.barrier()
        space.multiply(program, record.out, attended, out, add=plain, seeded=True)  # [T, D]
        program.barrier()
        if not plain:
            space.add(program, self._addition, a["x"], n, out)
            program.barrier()


def _pair_distance(rope: Rope) -> int:
    """Return how far apart the elements lie that are rotated together."""
    return 1 if rope.style is RopeStyle.INTERLEAVED else rope.dim // 2


def angle_bytes(rope: Rope, limits: Limits) -> int:
    """Return the bytes of the cosines and sines of a batch."""
    return limits.batch_tokens * FLOAT_BYTES * max(rope.dim, 1)
