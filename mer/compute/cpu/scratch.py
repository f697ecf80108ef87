"""The memory that a batch works in: sizes first, so that the memory plan and the worker cannot disagree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import numpy as np

from mer.compute.cpu.matrix import FLOAT_BYTES, PackedArea, RawRoom, float_stride, raw_bytes
from mer.compute.cpu.program import Memory
from mer.compute.kernels.attention import split_bytes, split_tokens, thread_bytes
from mer.compute.kernels.entry import ENTRY_WORDS
from mer.compute.kernels.kv_layout import F16_KIND, F32_KIND, Q8_0_KIND, tile_bytes
from mer.compute.kernels.matmul import block_format
from mer.compute.kernels.tile import BlockFormat
from mer.config import KVType
from mer.io.extents import ExpertMap, round_up
from mer.io.ggml import GGMLType
from mer.model.spec import ModelSpec

RESIDENT_ROWS = 16
KV_KINDS: Mapping[KVType, int] = {"f32": F32_KIND, "f16": F16_KIND, "q8_0": Q8_0_KIND}


@attrs.frozen(kw_only=True)
class Limits:
    """The largest batch that a worker is made for."""

    batch_tokens: int  # T: rows of a batch
    outputs: int  # N: rows whose logits are wanted
    sequences: int  # S: sequences in a batch
    sequence_blocks: int  # KV blocks of the longest sequence
    kv_blocks: int  # KV blocks in all
    threads: int
    planes: int = 1  # int8 planes of an activation that meets quantized weights: 1 or 2
    kv_type: KVType = "f32"

    def resident_rows(self, spec: ModelSpec) -> int:
        """Rows of a batch up to which all layers may be one program; larger ones have more to do than setting it up."""
        return max(1, min(RESIDENT_ROWS, self.ffn_rows(spec) // spec.top_k))

    def ffn_rows(self, spec: ModelSpec) -> int:
        """Rows of gate and up computed at once: a whole batch on one expert, or one token on all of its experts."""
        return max(self.batch_tokens, spec.top_k)

    def split_tokens(self, spec: ModelSpec) -> int:
        """Rows of a batch up to which attention gives out spans of positions one by one."""
        return split_tokens(self.threads, spec.attention.n_kv_heads, self.batch_tokens)


def kv_block_bytes(spec: ModelSpec, kv_type: KVType) -> int:
    """Return the bytes of one KV block: K and V of all layers for 64 positions, heads padded to 32 values."""
    attention = spec.attention
    return spec.n_routed * 2 * attention.n_kv_heads * tile_bytes(KV_KINDS[kv_type], attention.head_dim)


def _formats(kinds: Iterable[GGMLType]) -> dict[int, BlockFormat]:
    formats = (block_format(int(kind)) for kind in kinds)
    return {fmt.block_weights: fmt for fmt in formats if fmt is not None}


def _raw_bytes(experts: ExpertMap) -> int:
    """Return the room that a thread needs to arrange any expert's matrix."""
    return max(raw_bytes(*shape) for shape in experts.formats)


def area_sizes(spec: ModelSpec, limits: Limits, experts: ExpertMap) -> dict[str, int]:
    """Return name and bytes of every scratch area, packed activations and KV cache excepted."""
    attention = spec.attention
    t, r = limits.batch_tokens, limits.ffn_rows(spec)
    d, heads = float_stride(spec.d_model), attention.n_heads * attention.head_dim
    kv_heads = attention.n_kv_heads * attention.head_dim
    return {
        "x": t * d,  # residual stream
        "h": max(t, limits.outputs) * d,  # normalized
        "q_raw": t * float_stride(heads),
        "k_raw": t * float_stride(kv_heads),
        "v_raw": t * float_stride(kv_heads),
        "q": t * attention.n_heads * float_stride(attention.head_dim),
        "attended": t * float_stride(heads),
        "angles": t * FLOAT_BYTES * max(attention.rope.dim, 1),
        "attention": limits.threads * thread_bytes(attention.n_heads, attention.n_kv_heads, attention.head_dim),
        "attention_parts": split_bytes(
            limits.split_tokens(spec),
            attention.n_heads,
            attention.n_kv_heads,
            attention.head_dim,
            limits.sequence_blocks,
        ),
        "router": t * float_stride(spec.n_experts),
        "expert_ids": t * FLOAT_BYTES * spec.top_k,
        "expert_weights": t * FLOAT_BYTES * spec.top_k,
        "next_h": t * d,  # normalized for the next layer's router
        "next_router": t * float_stride(spec.n_experts),
        "predicted_ids": t * FLOAT_BYTES * spec.top_k,
        "predicted_weights": t * FLOAT_BYTES * spec.top_k,
        "places": t * FLOAT_BYTES * spec.top_k,
        "order": t * FLOAT_BYTES * spec.top_k,
        "expert_ends": FLOAT_BYTES * spec.n_experts,
        "table_entries": 8 * ENTRY_WORDS * min(spec.n_experts, limits.resident_rows(spec) * spec.top_k),
        "table_missing": 8 * ENTRY_WORDS * min(spec.n_experts, limits.resident_rows(spec) * spec.top_k),
        "stop": 4 * 8,
        "routes": FLOAT_BYTES * spec.n_routed * limits.resident_rows(spec) * spec.top_k,
        "positions": t * FLOAT_BYTES,
        "sequences": t * FLOAT_BYTES,
        "outputs": limits.outputs * FLOAT_BYTES,
        "table": limits.sequences * limits.sequence_blocks * FLOAT_BYTES,
        "gathered": r * d,  # the rows of one group, for float weights
        "gate": r * float_stride(spec.d_ff),
        "up": r * float_stride(spec.d_ff),
        "y": t * spec.top_k * d,  # expert outputs, one row per (token, choice)
        "logits": limits.outputs * float_stride(spec.vocab_size),
        "damaged": t * FLOAT_BYTES,  # rows whose router logits were not finite
        "constants": 2 * FLOAT_BYTES,  # eps, attention scale
        "raw": limits.threads * _raw_bytes(experts),  # an expert's rows as they are in the file
    }


def packed_shapes(spec: ModelSpec, limits: Limits) -> dict[str, tuple[int, int]]:
    """Return name and (rows, cols) of the areas of packed activations."""
    attention = spec.attention
    r = max(limits.ffn_rows(spec), limits.outputs)
    return {"input": (r, max(spec.d_model, attention.n_heads * attention.head_dim)), "inner": (r, spec.d_ff)}


def scratch_bytes(spec: ModelSpec, limits: Limits, kinds: Iterable[GGMLType], experts: ExpertMap) -> int:
    """Return the bytes of all scratch areas, KV cache excepted."""
    kinds = set(kinds)
    total = sum(round_up(size, 64) for size in area_sizes(spec, limits, experts).values())
    for rows, cols in packed_shapes(spec, limits).values():
        for fmt in _formats(kinds).values():
            sizes = PackedArea.sizes(fmt, rows, round_up(cols, fmt.block_weights), limits.planes)
            total += sum(round_up(size, 64) for size in sizes)
    return total


class Scratch:
    """Every scratch area and the KV cache, in anonymous memory of their own."""

    def __init__(self, spec: ModelSpec, limits: Limits, kinds: Iterable[GGMLType], experts: ExpertMap) -> None:
        attention = spec.attention
        kinds = set(kinds)
        self.memory = Memory(scratch_bytes(spec, limits, kinds, experts))
        sizes = area_sizes(spec, limits, experts)
        self.address: Mapping[str, int] = {name: self.memory.cut(size) for name, size in sizes.items()}
        self.raw = RawRoom(self.address["raw"], _raw_bytes(experts))
        self.packed: Mapping[str, dict[int, PackedArea]] = {
            name: {
                size: PackedArea.cut(self.memory, fmt, rows, round_up(cols, size), limits.planes)
                for size, fmt in _formats(kinds).items()
            }
            for name, (rows, cols) in packed_shapes(spec, limits).items()
        }
        self.kv = Memory(limits.kv_blocks * kv_block_bytes(spec, limits.kv_type))
        t, k = limits.batch_tokens, spec.top_k
        self.expert_ids = self.memory.ints(self.address["expert_ids"], t * k)
        self.predicted_ids = self.memory.ints(self.address["predicted_ids"], t * k)
        self.places = self.memory.ints(self.address["places"], t * k)
        self.order = self.memory.ints(self.address["order"], t * k)
        self.stop = self.memory.view(self.address["stop"], 4 * 8).view(np.int64)
        self.routes = self.memory.ints(self.address["routes"], spec.n_routed * limits.resident_rows(spec) * k)
        self.positions = self.memory.ints(self.address["positions"], t)
        self.sequences = self.memory.ints(self.address["sequences"], t)
        self.outputs = self.memory.ints(self.address["outputs"], limits.outputs)
        self.table = self.memory.ints(self.address["table"], limits.sequences * limits.sequence_blocks)
        self.x = self.memory.floats(self.address["x"], t, float_stride(spec.d_model) // FLOAT_BYTES)
        self.logits = self.memory.floats(
            self.address["logits"], limits.outputs, float_stride(spec.vocab_size) // FLOAT_BYTES
        )
        self.angles = self.memory.floats(self.address["angles"], t * max(attention.rope.dim, 1))
        constants = self.memory.floats(self.address["constants"], 2)
        constants[:] = (spec.norm.eps, attention.head_dim**-0.5)
        self.eps, self.scale = self.address["constants"], self.address["constants"] + FLOAT_BYTES
        self.damaged = self.memory.ints(self.address["damaged"], t)
        dim = attention.rope.dim
        self.frequencies = attention.rope.base ** (-np.arange(0, dim, 2, dtype=np.float64) / max(dim, 1))
