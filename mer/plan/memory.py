"""Arithmetic of a memory plan: its parts, the bytes of each, and the choices that fit a budget."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from mer.compute.cpu.forward import kv_layout, matrix_types, scratch_areas
from mer.compute.cpu.scratch import Limits
from mer.compute.cpu.weights import READ_BYTES, READS_AHEAD, dense_bytes
from mer.compute.kernels.kv_layout import BLOCK, KV_TILE
from mer.compute.kernels.target import FORM, Form
from mer.config import SMALL_MODEL, EngineConfig, KVType, default_threads
from mer.errors import ConfigError, NotEnoughMemory
from mer.io.arena import PAGE_BYTES
from mer.io.chunks import DEFAULT_THREADS
from mer.io.extents import ExpertMap, SlotClasses
from mer.io.ggml import GGMLType
from mer.io.gguf import GGUFFile, TensorInfo
from mer.model.loading import Model
from mer.model.spec import ModelSpec
from mer.sched.predictors.markov import MarkovPredictor
from mer.system import private_bytes
from mer.text.renderer import MAX_TEMPLATE_CHARS, plan_bytes
from mer.units import format_bytes

MiB = 1 << 20
INTERPRETER_BYTES = 96 * MiB  # Python with numpy, numba, LLVM, tokenizers and loaded kernels: 69 MiB measured
COMPILER_BYTES = 56 * MiB  # what compiling the kernels of every model adds and keeps, 18 MiB of it those of job reads
# And for each weight type more, by the weights in a block: without those of job reads 38 MiB measured for Q4_0, 53 for
# Q5_K, 91 for four types, 237 for all sixteen; in the portable form 57 for Q5_0, 92 for Q5_K; in the AVX2 form, which
# has more code, 37 for Q4_0, 71 for Q5_K. Blocks of 64 weights are not measured, and have as much as the largest.
COMPILER_BYTES_PER_TYPE = {1: 8 * MiB, 32: 14 * MiB, 64: 26 * MiB, 256: 26 * MiB}
FORM_FACTORS = {Form.AVX512_VNNI: 1.0, Form.AVX_VNNI: 1.8, Form.AVX2: 1.8, Form.PORTABLE: 2.5}
TOKENIZER_BYTES = 6 * MiB  # modules, words known already, and what encoding a piece of a text takes
TOKENIZER_BYTES_PER_TOKEN = 320  # 140 to 160 measured, while it is built 250
TOKENIZER_BYTES_PER_MERGE = 160  # 90 measured
HEADER_FACTOR = 6  # Python objects of the header's metadata, per byte of the header: 3.5 to 5.3 measured
STACK_BYTES = MiB // 2  # touched stack and interpreter state of a thread
DEFAULT_SEQUENCES = 8
_BATCHES = range(16, 512 + 1, 16)
_LEAST_CONTEXT, _MOST_CONTEXT = 512, 4096
_KV_SHARE = 12  # of what a budget has beyond the floor, the KV cache is given 1 / 12,
_SCRATCH_SHARE = 8  # and scratch 1 / 8, up to what they have use for, where the user sets nothing


def default_kv_type(dense: Iterable[TensorInfo], experts: ExpertMap) -> KVType:
    """Return how keys and values are kept unless that is set: as float32 if all matrices are F32, else as F16."""
    return "f32" if matrix_types(dense, experts) == {GGMLType.F32} else "f16"


def kv_type_in_force(model: Model, config: EngineConfig) -> KVType:
    """Return how keys and values are kept.

    Raises:
        ConfigError: the model's heads are no whole blocks of the type that is set.
    """
    if config.kv_type is None:
        return default_kv_type(model.dense.values(), model.experts)
    odd = [layer.mixer.head_dim for layer in model.spec.layers if layer.mixer.head_dim % BLOCK]
    if config.kv_type == "q8_0" and odd:
        raise ConfigError(
            f"kv_type is q8_0, which rounds blocks of {BLOCK} values, and the model's heads have {odd[0]}; "
            "f16 and f32 work"
        )
    return config.kv_type


class Planner:
    """The arithmetic of one plan."""

    classes: SlotClasses

    def __init__(self, model: Model, config: EngineConfig, budget: int) -> None:
        self._spec, self._experts, self._config, self._budget = model.spec, model.experts, config, budget
        spec = model.spec
        if config.context is not None and config.context > spec.context_length:
            raise ConfigError(f"context is {config.context}; the model was trained for {spec.context_length} positions")
        self.classes = model.experts.slot_classes(PAGE_BYTES)
        self.least_slots = len(self.classes.slot_bytes)  # an expert can only go into a slot of its class
        if config.slots is not None and config.slots < self.least_slots:
            sizes = ", ".join(map(format_bytes, self.classes.slot_bytes))
            raise ConfigError(
                f"slots is {config.slots}; the model's experts come in {self.least_slots} sizes ({sizes}) and need a "
                f"slot of each, so at least {self.least_slots}"
            )
        self._order = slot_order(self.classes.n_experts, spec.top_k)
        self._bytes_of_slots = [0, *itertools.accumulate(self.classes.slot_bytes[kind] for kind in self._order)]
        self.total_experts = spec.n_routed * spec.n_experts
        self._threads = config.threads or default_threads()
        self._kinds = matrix_types(model.dense.values(), model.experts)
        self._fixed: dict[str, int] = {
            "interpreter and libraries": max(INTERPRETER_BYTES, private_bytes()),
            "kernel compiler": compiler_bytes(self._kinds),
            "tokenizer": tokenizer_bytes(model.gguf, spec.vocab_size),
            "prefetch predictor": _predictor_bytes(spec) if config.prefetch in ("markov", "auto") else 0,
            "chat template": _template_bytes(model.gguf),
            "header metadata": model.gguf.header_bytes * HEADER_FACTOR,
            "thread stacks": (self._threads + (config.io_threads or DEFAULT_THREADS) * (1 + len(config.mirrors)) + 2)
            * STACK_BYTES,
            "dense weights": dense_bytes(model.dense),
        }
        self._load_bytes = min((READS_AHEAD + 1) * READ_BYTES, self._fixed["dense weights"])
        fine = config.activations == "int15" or (config.activations == "auto" and spec.d_model < SMALL_MODEL)
        self._planes = 2 if fine else 1
        self._kv_type = kv_type_in_force(model, config)
        self._batches = self._batch_candidates()
        contexts = (config.context or _LEAST_CONTEXT, config.context or _MOST_CONTEXT)
        self._blocks = [-(-min(context, spec.context_length) // KV_TILE) for context in contexts]  # least, most
        self.smallest = self._limits(self._batches[0], self._blocks[0], self._blocks[0])

    def _batch_candidates(self) -> tuple[int, ...]:
        """Return the prefill chunks to choose from, rising: with room for a prompt while all sequences decode."""
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

    def _limits(self, batch: int, sequence_blocks: int, kv_blocks: int) -> Limits:
        sequences = self._config.max_sequences or min(DEFAULT_SEQUENCES, max(1, batch // 2))
        return Limits(
            batch_tokens=batch,
            outputs=sequences,
            sequences=sequences,
            sequence_blocks=sequence_blocks,
            kv_blocks=kv_blocks,
            threads=self._threads,
            planes=self._planes,
            kv_type=self._kv_type,
        )

    def check(self, source: str, *, what: str = "memory", option: str = "--memory") -> int:
        """Return the smallest budget that works.

        Args:
            source: how the budget was found.
            what: the budget is of.
            option: that sets it.

        Raises:
            NotEnoughMemory: the budget is below it; the text names each part.
        """
        parts = self.parts(self.smallest, self.least_slots)
        floor = sum(parts.values())
        if self._budget < floor:
            text = _refusal(self._budget, source, floor, parts, what=what, option=option)
            raise NotEnoughMemory(text, budget_bytes=self._budget, needed_bytes=floor)
        return floor

    def parts(self, limits: Limits, slots: int) -> dict[str, int]:
        """Return every part with its bytes."""
        return self._parts(self._kv_bytes(limits.kv_blocks), self._scratch_bytes(limits), slots)

    def _parts(self, kv_bytes: int, scratch: int, slots: int) -> dict[str, int]:
        slot_bytes = self._bytes_of_slots[slots]
        parts = self._fixed | {
            "KV cache": kv_bytes,
            "scratch": scratch,
            "load buffers": max(0, self._load_bytes - slot_bytes),  # gone when the slots fill
            "expert slots": slot_bytes,
        }
        return parts | {"page tables": sum(parts.values()) // 512 + MiB}

    def _kv_bytes(self, blocks: int) -> int:
        return blocks * kv_layout(self._spec, self._kv_type).block_bytes

    def _scratch_bytes(self, limits: Limits) -> int:
        return scratch_areas(self._spec, limits, self._experts).n_bytes(self._kinds, limits.planes)

    def _fits(self, kv_bytes: int, scratch: int, slots: int) -> bool:
        return sum(self._parts(kv_bytes, scratch, slots).values()) <= self._budget

    def add_part(self, name: str, n_bytes: int) -> None:
        """Take something more into account."""
        self._fixed[name] = n_bytes

    def slot_counts(self, slots: int) -> tuple[int, ...]:
        """Return how many slots of each class so many slots are."""
        counts = Counter(self._order[:slots])
        return tuple(counts[kind] for kind in range(self.least_slots))

    def choose(self, floor: int) -> tuple[int, Limits]:
        """Return the number of slots, and the largest context, prefill chunk and number of KV blocks that fit too.

        KV cache and scratch get fixed shares of what the budget has beyond the floor; the slots get the rest. What the
        shares and the last slot leave over goes to KV blocks, and to the context when all experts have their slots.
        """
        # KV cache and scratch are not each made as large as fits, with the slots last: a step of theirs could then cost
        # slots. The shares grow smoothly, so that more memory never means fewer slots nor a shorter context.
        least, most = self._blocks
        sequences, spare = self.smallest.sequences, self._budget - floor

        def scratch_of(batch: int, sequence_blocks: int) -> int:
            return self._scratch_bytes(self._limits(batch, sequence_blocks, sequence_blocks))

        scratch_room = scratch_of(self._batches[0], least) + spare // _SCRATCH_SHARE
        scratch_room = min(scratch_room, scratch_of(self._batches[-1], most))
        kv_room = min(self._kv_bytes(least) + spare // _KV_SHARE, self._kv_bytes(sequences * most))
        slots = largest(self.least_slots, self.total_experts, lambda n: self._fits(kv_room, scratch_room, n))

        def context_fits(blocks: int) -> bool:
            kv_bytes = self._kv_bytes(blocks)
            spared = slots == self.total_experts and self._fits(kv_bytes, scratch_room, slots)
            return (kv_bytes <= kv_room or spared) and scratch_of(self._batches[0], blocks) <= scratch_room

        blocks = largest(least, most, context_fits)
        batch = self._batches[
            largest(0, len(self._batches) - 1, lambda i: scratch_of(self._batches[i], blocks) <= scratch_room)
        ]
        scratch = scratch_of(batch, blocks)
        kv_blocks = largest(blocks, sequences * blocks, lambda n: self._fits(self._kv_bytes(n), scratch, slots))
        return slots, self._limits(batch, blocks, kv_blocks)


def slot_order(n_experts: Sequence[int], first: int) -> list[int]:
    """Return the class of each slot in the order in which growing memory buys them, until every expert has one.

    However many slots there are, each class has some, and up to `first` of them before others have more: experts that
    one token uses need not wait for each other. Further slots keep the shares of the classes' experts alike: next is
    always the slot whose middle comes first when each class's slots are spread evenly from 0 to 1 (Webster's method).

    Args:
        n_experts: experts of each class.
        first: slots of each class that come before all others, or its number of experts if that is less.
    """
    ranked = sorted(
        (number - first if number < first else (number + 0.5) / n, kind)
        for kind, n in enumerate(n_experts)
        for number in range(n)
    )
    return [kind for _, kind in ranked]


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from low to high that fits, or low if none does; what fits, fits when smaller."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def tokenizer_bytes(gguf: GGUFFile, vocab_size: int) -> int:
    """Return the bytes of a file's tokenizer without its metadata, however long the texts of its tokens are."""
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    n_merges = len(merges) if isinstance(merges, list) else 0  # Another type is refused by the tokenizer.
    return TOKENIZER_BYTES + vocab_size * TOKENIZER_BYTES_PER_TOKEN + n_merges * TOKENIZER_BYTES_PER_MERGE


def _predictor_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the Markov chains' counts; memory is taken only as they fill."""
    return 0 if not spec.routed else MarkovPredictor(spec.n_routed, spec.n_experts, spec.top_k).n_bytes


def _template_bytes(gguf: GGUFFile) -> int:
    """Return the bytes of the process that renders the file's chat template, if it has one."""
    template = gguf.metadata.get("tokenizer.chat_template")
    return plan_bytes(min(len(template), MAX_TEMPLATE_CHARS)) if isinstance(template, str) else 0


def compiler_bytes(kinds: Iterable[GGMLType]) -> int:
    """Return what compiling the kernels for these weight types adds and keeps."""
    return COMPILER_BYTES + int(FORM_FACTORS[FORM] * sum(COMPILER_BYTES_PER_TYPE[kind.block_size] for kind in kinds))


def _refusal(
    budget: int, source: str, floor: int, parts: Mapping[str, int], *, what: str = "memory", option: str = "--memory"
) -> str:
    return "\n".join(
        [
            f"a {what} budget of {format_bytes(budget)} ({source}) is too small by {format_bytes(floor - budget)}; "
            f"the smallest that works is {floor} bytes ({option} {-(-floor // MiB)}MiB):",
            describe_parts(parts),
        ]
    )


def describe_parts(parts: Mapping[str, int]) -> str:
    """Return the parts of a plan as lines of text."""
    return "\n".join(f"{name:>28}  {format_bytes(size)}" for name, size in parts.items() if size)
