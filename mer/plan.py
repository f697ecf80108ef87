"""The memory plan: every part of the process's memory, computed before anything of the model is read."""

from __future__ import annotations

import itertools
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
DEFAULT_SEQUENCES = 8
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
    """Divide the budget among the parts; what the user leaves open is chosen to fit, what is set is kept to.

    Raises:
        NotEnoughMemory: the budget is too small; the text names each part and the smallest budget that works.
        ConfigError: the settings contradict the model or each other.
    """
    spec = model.spec
    budget, source = (config.memory, "given") if config.memory is not None else default_budget()
    planner = _Planner(model, config, budget)
    floor_parts = planner.parts(planner.smallest, 1)
    floor = sum(floor_parts.values())
    if budget < floor:
        raise NotEnoughMemory(_refusal(budget, source, floor, floor_parts), budget_bytes=budget, needed_bytes=floor)
    limits = planner.choose_limits()
    slots = planner.choose_slots(limits)
    if slots == planner.total_experts:
        limits = planner.spend_on_kv(limits, slots)
    slots = min(slots, config.slots or slots)
    embedding = model.dense["token_embd.weight"]
    touched = sum(t.n_bytes for t in model.dense.values())
    if not spec.tied_head:
        touched -= embedding.n_bytes - embedding.n_bytes // spec.vocab_size
    context = config.context or min(limits.sequence_blocks * KV_TILE, spec.context_length)
    return MemoryPlan(
        budget_bytes=budget,
        budget_source=source,
        parts=planner.parts(limits, slots),
        floor_bytes=floor,
        slots=slots,
        slot_bytes=planner.layout.slot_bytes,
        layout=planner.layout,
        limits=limits,
        context=context,
        total_experts=planner.total_experts,
        expert_bytes_per_token=spec.n_layers * spec.top_k * (model.experts.total_bytes // planner.total_experts),
        dense_bytes_per_token=touched,
    )


class _Planner:
    """The arithmetic of one plan."""

    def __init__(self, model: Model, config: EngineConfig, budget: int) -> None:
        self._spec, self._experts, self._config, self._budget = model.spec, model.experts, config, budget
        spec = model.spec
        if config.context is not None and config.context > spec.context_length:
            raise ConfigError(f"context is {config.context}; the model was trained for {spec.context_length} positions")
        self.layout = model.experts.slot_layout(PAGE_BYTES)
        self.total_experts = spec.n_layers * spec.n_experts
        self._threads = config.threads or default_threads()
        self._kinds = matrix_types(model.dense.values(), model.experts)
        self._fixed = {
            "interpreter and libraries": max(INTERPRETER_BYTES, private_bytes()),
            "kernel compiler": COMPILER_BYTES + len(self._kinds) * COMPILER_BYTES_PER_TYPE,
            "tokenizer": TOKENIZER_BYTES + spec.vocab_size * TOKENIZER_BYTES_PER_TOKEN,
            "header metadata": model.gguf.header_bytes * HEADER_FACTOR,
            "thread stacks": (self._threads + config.io_threads + 2) * STACK_BYTES,
            "dense weights": dense_bytes(model.dense),
        }
        fine = config.activations == "int15" or (config.activations == "auto" and spec.d_model < SMALL_MODEL)
        self._planes = 2 if fine else 1
        self._batches = self._batch_candidates()
        contexts = _CONTEXTS if config.context is None else (config.context,)
        self._contexts = tuple(dict.fromkeys(min(context, spec.context_length) for context in contexts))
        self.smallest = self._limits(self._batches[-1], self._contexts[-1], self._contexts[-1])
        self._room = budget - sum(self._fixed.values())

    def _batch_candidates(self) -> tuple[int, ...]:
        """Return the prefill chunks to choose from, largest first: with room for a prompt beside all that decode."""
        config = self._config
        least = 2 * config.max_sequences if config.max_sequences is not None and config.max_sequences > 1 else 1
        if config.batch_tokens is None:
            return tuple(batch for batch in _BATCHES if batch >= least) or (least,)
        if config.batch_tokens < least:
            raise ConfigError(
                f"max_sequences is {config.max_sequences} and batch_tokens {config.batch_tokens}; a batch must have "
                f"two rows for each sequence, here {least}, so that prompts get on beside what decodes"
            )
        return (config.batch_tokens,)

    def _limits(self, batch: int, context: int, kv_tokens: int) -> Limits:
        sequences = self._config.max_sequences or min(DEFAULT_SEQUENCES, max(1, batch // 2))
        return Limits(
            batch_tokens=batch,
            outputs=sequences,
            sequences=sequences,
            sequence_blocks=-(-context // KV_TILE),
            kv_blocks=-(-kv_tokens // KV_TILE),
            threads=self._threads,
            planes=self._planes,
        )

    def parts(self, limits: Limits, slots: int) -> dict[str, int]:
        """Return every part with its bytes."""
        slot_bytes = slots * self.layout.slot_bytes
        buffers = min((READS_AHEAD + 1) * READ_BYTES, self._fixed["dense weights"])
        parts = self._fixed | {
            "KV cache": limits.kv_blocks * kv_block_bytes(self._spec),
            "scratch": scratch_bytes(self._spec, limits, self._kinds, self._experts),
            "load buffers": max(0, buffers - slot_bytes),  # gone when the slots fill
            "expert slots": slot_bytes,
        }
        return parts | {"page tables": sum(parts.values()) // 512 + MiB}

    def _fits(self, limits: Limits, slots: int) -> bool:
        return sum(self.parts(limits, slots).values()) <= self._budget

    def choose_limits(self) -> Limits:
        """Return the largest context, number of KV tokens and prefill chunk within their shares of the room."""
        share = self._room // _SHARE
        limits = self.smallest
        sequences = limits.sequences
        for context, many in itertools.product(self._contexts, (sequences, 2, 1)):
            candidate = self._limits(self._batches[-1], context, many * context)
            if candidate.kv_blocks * kv_block_bytes(self._spec) <= share and self._fits(candidate, 1):
                limits = candidate
                break
        for batch in self._batches:
            candidate = attrs.evolve(
                self._limits(batch, self._contexts[-1], 1),
                sequence_blocks=limits.sequence_blocks,
                kv_blocks=limits.kv_blocks,
            )
            scratch = scratch_bytes(self._spec, candidate, self._kinds, self._experts)
            if scratch <= share and self._fits(candidate, 1):
                return candidate
        return limits

    def choose_slots(self, limits: Limits) -> int:
        """Return how many slots the rest of the budget holds, at most one for each expert."""
        low, high = 1, self.total_experts
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(limits, middle) else (low, middle - 1)
        return low

    def spend_on_kv(self, limits: Limits, slots: int) -> Limits:
        """Return limits with a longer context and more KV blocks, up to the context for every sequence.

        For when all experts have their slots and need no more memory.
        """
        for context in self._contexts:
            blocks = -(-context // KV_TILE)
            candidate = attrs.evolve(limits, sequence_blocks=blocks, kv_blocks=max(limits.kv_blocks, blocks))
            if self._fits(candidate, slots):
                limits = candidate
                break
        low, high = limits.kv_blocks, max(limits.kv_blocks, limits.sequences * limits.sequence_blocks)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._fits(attrs.evolve(limits, kv_blocks=middle), slots)
            low, high = (middle, high) if fits else (low, middle - 1)
        return attrs.evolve(limits, kv_blocks=low)


def _refusal(budget: int, source: str, floor: int, parts: Mapping[str, int]) -> str:
    lines = [f"{name:>28}  {format_bytes(size)}" for name, size in parts.items() if size]
    return "\n".join(
        [
            f"a memory budget of {format_bytes(budget)} ({source}) is too small by {format_bytes(floor - budget)}; "
            f"the smallest that works is {floor} bytes (--memory {-(-floor // MiB)}MiB):",
            *lines,
        ]
    )
