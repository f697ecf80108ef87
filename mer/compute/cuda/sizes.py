"""Bytes of the device's memory, computed before torch is imported: plan and worker cannot disagree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

import attrs

from mer.compute.cpu.scratch import Limits
from mer.compute.cuda.layout import file_layout, tile_layout
from mer.compute.kernels.kv_layout import BLOCK, KV_TILE
from mer.compute.state import StateLayout, state_layout
from mer.config import KVType
from mer.io.extents import ExpertMap, round_up
from mer.io.gguf import TensorInfo
from mer.model.operators import Attention, Experts, FeedForward
from mer.model.spec import ModelSpec

MiB = 1 << 20
FLOAT_BYTES = 4
CONTEXT_BYTES = 600 * MiB  # CUDA context, libraries and cuBLAS workspace on the device; an estimate, see docs/cuda.md
HOST_BYTES = 400 * MiB  # torch in the process's memory: 160 MiB measured on its CPU build, and an estimate for CUDA
CHUNK_WEIGHTS = 16 << 20  # weights that are dequantized at once
CHUNK_BYTES = 12  # of device memory for each of them: float32 twice, and the form that the product takes
STAGING_SLOTS = 2  # of each class: experts pass through them that are used once and not kept


@attrs.frozen(kw_only=True)
class VRAMClasses:
    """The sizes of the experts on the device, largest first; each expert has a slot of exactly its size."""

    slot_bytes: tuple[int, ...]
    n_experts: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]  # [layer][expert]: the number of its class

    def kind_of(self, layer: int, expert: int) -> int:
        """Return the number of the class whose slots an expert goes into."""
        return self.kinds[layer][expert]


def vram_classes(experts: ExpertMap) -> VRAMClasses:
    """Return the sizes of slots on the device that a model's experts need."""
    needs = [[file_layout(extents.parts).n_bytes for extents in layer] for layer in experts.experts]
    counts = Counter(itertools.chain.from_iterable(needs))
    sizes = sorted(counts, reverse=True)
    return VRAMClasses(
        slot_bytes=tuple(sizes),
        n_experts=tuple(counts[size] for size in sizes),
        kinds=tuple(tuple(sizes.index(need) for need in layer) for layer in needs),
    )


def dense_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Return the bytes that the dense weights take on the device: those of the file, in whole allocations."""
    return sum(round_up(tensor.n_bytes, 512) for tensor in tensors.values())


def kv_layout(spec: ModelSpec, kv_type: KVType) -> StateLayout:
    """Return how a KV block on the device is divided."""

    def head_bytes(head_dim: int) -> int:
        n_bytes = {"f32": FLOAT_BYTES * head_dim, "f16": 2 * head_dim}
        n_bytes["q8_0"] = head_dim + 2 * (head_dim // BLOCK)  # int8, and a half float for each block
        return KV_TILE * n_bytes[kv_type]

    return state_layout(spec, head_bytes, KV_TILE)


def scratch_bytes(spec: ModelSpec, limits: Limits, experts: ExpertMap, *, dense: bool, hybrid: bool) -> int:
    """Return the bytes that a batch works in.

    Args:
        spec: the model.
        limits: the largest batch.
        experts: types and shapes of the routed experts.
        dense: whether attention and head are computed on the device too.
        hybrid: whether the processor may have re-arranged experts, which are then brought back on the device.
    """
    t, k, d = limits.batch_tokens, spec.top_k, spec.d_model
    floats = 3 * t * d + t * k * (d + 3 * spec.d_ff)  # x, h and the experts' input; their outputs; gate, up, SwiGLU
    sizes = (part.rows * part.cols for layer in experts.experts for e in layer for part in e.parts)
    largest = max(sizes, default=0)
    if dense:
        floats += max(_attention_floats(layer.mixer, limits) for layer in spec.distinct_layers)
        floats += max(_ffn_floats(layer.ffn, limits) for layer in spec.distinct_layers)
        floats += 2 * limits.outputs * spec.vocab_size
        largest = max(largest, spec.vocab_size * d)
    tiles = [tile_layout(e.parts).n_bytes for layer in experts.experts for e in layer]
    room = 3 * max(tiles, default=0) if hybrid else 0
    return FLOAT_BYTES * floats + CHUNK_BYTES * min(largest, CHUNK_WEIGHTS) + room


def _attention_floats(record: Attention, limits: Limits) -> int:
    t, positions = limits.batch_tokens, limits.sequence_blocks * KV_TILE
    heads, kv_heads = record.n_heads * record.head_dim, record.n_kv_heads * record.head_dim
    floats = t * (4 * heads + 4 * kv_heads)
    floats += 2 * record.n_heads * t * positions  # scores, if no fused attention takes them
    floats += 4 * limits.sequences * positions * kv_heads  # K and V, gathered
    if record.sinks is not None:  # one more position, and a mask for each head
        floats += 2 * record.n_heads * t * (positions + 1) + 2 * limits.sequences * (positions + 1) * kv_heads
    return floats


def _ffn_floats(record: FeedForward | Experts, limits: Limits) -> int:
    """Return the floats of a network of dense weights, or of a router and the network that its experts share."""
    if isinstance(record, Experts):
        shared = 0 if record.shared is None else _ffn_floats(record.shared, limits)
        return shared + 4 * limits.batch_tokens * record.n
    return limits.batch_tokens * (3 * record.down.cols + record.down.rows)


def host_bytes(spec: ModelSpec, limits: Limits) -> int:
    """Return the bytes of pinned memory that what goes to the device and comes back passes through."""
    t, angles = limits.batch_tokens, sum({layer.mixer.rope: layer.mixer.rope.dim for layer in spec.layers}.values())
    down = FLOAT_BYTES * t * (angles + 16) + 8 * limits.sequences * limits.sequence_blocks
    back = FLOAT_BYTES * (limits.outputs * spec.vocab_size + t * spec.n_routed * spec.top_k)
    return 2 * (down + back)  # torch keeps buffers of powers of two
