"""The memory plan: every part of the process's memory, computed before anything of the model is read."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mer.compute.forward import matrix_types
from mer.compute.kernels.attention import KV_TILE
from mer.compute.scratch import Limits, kv_block_bytes, scratch_bytes
from mer.compute.weights import READ_BYTES, READS_AHEAD, dense_bytes
from mer.config import SMALL_MODEL, EngineConfig, default_threads
from mer.errors import ConfigError, NotEnoughMemory
from mer.io.arena import PAGE_BYTES
from mer.io.extents import ExpertMap, SlotLayout, map_experts
from mer.io.gguf import GGUFFile, TensorInfo
from mer.model.dense import dense_tensors
from mer.model.registry import model_spec
from mer.model.spec import ModelSpec
from mer.system import default_budget, private_bytes
from mer.units import format_bytes

MiB = 1 << 20
INTERPRETER_BYTES = 96 * MiB  # Python with numpy, numba, LLVM, tokenizers and loaded kernels: 69 MiB measured
COMPILER_BYTES = 24 * MiB  # what compiling the kernels of every model adds and keeps, and for each weight type more:
COMPILER_BYTES_PER_TYPE = 16 * MiB  # 44 MiB for two types, 112 MiB for all seven measured
TOKENIZER_BYTES = 2 * MiB
TOKENIZER_BYTES_PER_TOKEN = 512  # 330 to 400 measured
HEADER_FACTOR = 6  # Python objects of the header's metadata, per byte of the header: 3.5 to 5.3 measured
STACK_BYTES = MiB // 2  # touched stack and interpreter state of a thread
_BATCHES = (512, 256, 128, 64, 32, 16)
_CONTEXTS = (4096, 2048, 1024, 512)
_SHARE = 8  # scratch and KV cache may each take 1 / 8 of what the fixed parts leave, where the user sets nothing


@attrs.frozen(kw_only=True)
class Model:
    """A model file, understood and checked, with nothing but its header read."""

    gguf: GGUFFile
    spec: ModelSpec
    dense: Mapping[str, TensorInfo]
    experts: ExpertMap


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """How a memory budget is spent."""

    budget_bytes: int
    budget_source: str  # "given", or how the default was found
    parts: Mapping[str, int]  # name -> bytes; their sum is at most the budget
    floor_bytes: int  # the smallest budget that works with these settings
    slots: int  # expert slots
    slot_bytes: int
    layout: SlotLayout
    limits: Limits
    context: int  # positions of the longest sequence
    total_experts: int  # routed experts in the model
    expert_bytes_per_token: int  # bytes of experts a token touches
    dense_bytes_per_token: int  # bytes of dense weights a token touches

    @property
    def used_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def resident_share(self) -> float:
        """Share of the routed experts that fits the slots."""
        return self.slots / self.total_experts

    @property
    def expected_read_bytes_per_token(self) -> int:
        """Bytes read per decoded token if routing had no locality: every expert as likely as any other."""
        return round(self.expert_bytes_per_token * (1 - self.resident_share))


def load_model(config: EngineConfig) -> Model:
    """Read and check a model's header.

    Raises:
        ModelFileError: the file is malformed or not supported.
    """
    from mer.io.gguf import read_gguf

    gguf = read_gguf(config.path)
    spec = model_spec(gguf)
    experts = map_experts(gguf, n_layers=spec.n_layers, n_experts=spec.n_experts, d_model=spec.d_model, d_ff=spec.d_ff)
    return Model(gguf=gguf, spec=spec, dense=dense_tensors(spec, gguf), experts=experts)


def plan_memory(model: Model, config: EngineConfig) -> MemoryPlan:
    """Divide the budget among the parts; what the user leaves open is chosen to fit.

    Raises:
        NotEnoughMemory: the budget is too small; the text names each part and the smallest budget that works.
        ConfigError: the settings contradict the model.
    """
    spec = model.spec
    budget, source = (config.memory, "given") if config.memory is not None else default_budget()
    if config.context is not None and config.context > spec.context_length:
        raise ConfigError(f"context is {config.context}; the model was trained for {spec.context_length} positions")
    layout = model.experts.slot_layout(PAGE_BYTES)
    total_experts = spec.n_layers * spec.n_experts
    threads = config.threads or default_threads()
    kinds = matrix_types(model.dense.values(), model.experts)
    fixed = {
        "interpreter and libraries": max(INTERPRETER_BYTES, private_bytes()),
        "kernel compiler": COMPILER_BYTES + len(kinds) * COMPILER_BYTES_PER_TYPE,
        "tokenizer": TOKENIZER_BYTES + spec.vocab_size * TOKENIZER_BYTES_PER_TOKEN,
        "header metadata": model.gguf.header_bytes * HEADER_FACTOR,
        "thread stacks": (threads + config.io_threads + 2) * STACK_BYTES,
        "dense weights": dense_bytes(model.dense),
    }
    fine = config.activations == "int15" or (config.activations == "auto" and spec.d_model < SMALL_MODEL)
    planes = 2 if fine else 1
    slot_cost = layout.slot_bytes

    def parts_for(limits: Limits, slots: int) -> dict[str, int]:
        buffers = (READS_AHEAD + 1) * READ_BYTES
        parts = fixed | {
            "KV cache": limits.kv_blocks * kv_block_bytes(spec),
            "scratch": scratch_bytes(spec, limits, kinds, model.experts),
            "load buffers": max(0, min(buffers, fixed["dense weights"]) - slots * slot_cost),  # gone when slots fill
            "expert slots": slots * slot_cost,
        }
        return parts | {"page tables": sum(parts.values()) // 512 + MiB}

    def limits_for(batch: int, context: int, kv_tokens: int) -> Limits:
        sequences = min(config.max_sequences, max(1, batch // 2))
        return Limits(
            batch_tokens=batch,
            outputs=sequences,
            sequences=sequences,
            sequence_blocks=-(-context // KV_TILE),
            kv_blocks=-(-kv_tokens // KV_TILE),
            threads=threads,
            planes=planes,
        )

    batches = (config.batch_tokens,) if config.batch_tokens else _BATCHES
    contexts = (config.context,) if config.context else tuple({min(c, spec.context_length): None for c in _CONTEXTS})
    smallest = limits_for(batches[-1], contexts[-1], contexts[-1])
    floor_parts = parts_for(smallest, 1)
    floor = sum(floor_parts.values())
    if budget < floor:
        raise NotEnoughMemory(_refusal(budget, source, floor, floor_parts), budget_bytes=budget, needed_bytes=floor)

    room = budget - sum(fixed.values())
    limits = smallest
    for context in contexts:
        for kv_tokens in (config.max_sequences * context, 2 * context, context):
            candidate = limits_for(batches[-1], context, kv_tokens)
            if candidate.kv_blocks * kv_block_bytes(spec) <= room // _SHARE and _fits(parts_for(candidate, 1), budget):
                limits = candidate
                break
        else:
            continue
        break
    kv_tokens, context = limits.kv_blocks * KV_TILE, limits.sequence_blocks * KV_TILE
    for batch in batches:
        candidate = limits_for(batch, context, kv_tokens)
        if scratch_bytes(spec, candidate, kinds, model.experts) <= room // _SHARE and _fits(
            parts_for(candidate, 1), budget
        ):
            limits = candidate
            break
    slots = 1
    while slots < total_experts and _fits(parts_for(limits, slots * 2), budget):
        slots *= 2
    step = slots
    while step:
        if slots + step <= total_experts and _fits(parts_for(limits, slots + step), budget):
            slots += step
        else:
            step //= 2
    slots = min(slots, total_experts, config.slots or total_experts)
    per_expert = model.experts.total_bytes // total_experts
    embedding = model.dense["token_embd.weight"]
    touched = sum(t.n_bytes for t in model.dense.values())
    if not spec.tied_head:
        touched -= embedding.n_bytes - embedding.n_bytes // spec.vocab_size
    return MemoryPlan(
        budget_bytes=budget,
        budget_source=source,
        parts=parts_for(limits, slots),
        floor_bytes=floor,
        slots=slots,
        slot_bytes=slot_cost,
        layout=layout,
        limits=limits,
        context=min(context, spec.context_length),
        total_experts=total_experts,
        expert_bytes_per_token=spec.n_layers * spec.top_k * per_expert,
        dense_bytes_per_token=touched,
    )


def _fits(parts: Mapping[str, int], budget: int) -> bool:
    return sum(parts.values()) <= budget


def _refusal(budget: int, source: str, floor: int, parts: Mapping[str, int]) -> str:
    lines = [f"{name:>28}  {format_bytes(size)}" for name, size in parts.items() if size]
    return "\n".join(
        [
            f"a memory budget of {format_bytes(budget)} ({source}) is too small by {format_bytes(floor - budget)}; "
            f"the smallest that works is {floor} bytes (--memory {-(-floor // MiB)}MiB):",
            *lines,
        ]
    )
