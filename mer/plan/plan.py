"""The memory plan: every part of the process's memory, computed before anything of the model is read."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from mer.compute.cpu.scratch import Limits
from mer.compute.kernels.kv_layout import KV_TILE
from mer.config import EngineConfig
from mer.errors import ConfigError, NotEnoughMemory
from mer.io.extents import SlotClasses
from mer.model.loading import Model, check_model, load_model
from mer.plan.device import DeviceChoice, choose_device
from mer.plan.memory import Planner
from mer.plan.vram import VRAMPlan, plan_device
from mer.system import default_budget


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """Division of a memory budget."""

    budget_bytes: int
    budget_source: str  # "given", or how the default was found
    parts: Mapping[str, int]  # name -> bytes; their sum is at most the budget
    floor_bytes: int  # the smallest budget that works with these settings
    classes: SlotClasses
    slot_counts: tuple[int, ...]  # expert slots of each class
    limits: Limits
    context: int  # positions of the longest sequence
    total_experts: int  # routed experts in the model
    expert_bytes_per_token: int  # bytes of experts a token touches
    dense_bytes_per_token: int  # bytes of dense weights a token touches
    device: DeviceChoice
    vram: VRAMPlan | None  # how the device's own memory is spent; None on the CPU

    @property
    def used_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def slots(self) -> int:
        """Expert slots of all classes."""
        return sum(self.slot_counts)

    @property
    def slot_waste(self) -> float:
        """Share of the slots' memory that is lost because experts of several sizes share a class."""
        return self.classes.waste(self.slot_counts)

    @property
    def resident_share(self) -> float:
        """Share of the routed experts that fits the slots."""
        return self.slots / self.total_experts if self.total_experts else 1.0

    @property
    def expected_read_bytes_per_token(self) -> int:
        """Bytes read per decoded token if routing had no locality: every expert as likely as any other."""
        return round(self.expert_bytes_per_token * (1 - self.resident_share))


def load_and_plan(config: EngineConfig) -> tuple[Model, MemoryPlan]:
    """Read a model's header and plan its memory; a dense model may stream where it is too large, see `stream_dense`.

    Raises:
        ModelFileError: the file is malformed or not supported.
        NotEnoughMemory: the budget is too small.
        ConfigError: the settings contradict the model or each other.
    """
    model = load_model(config)
    if model.spec.routed and config.stream_dense == "on":
        raise ConfigError("stream_dense is on, and the model has experts, which stream anyway; drop it")
    if config.stream_dense != "on":
        try:
            return model, plan_memory(model, config)
        except NotEnoughMemory:
            if model.spec.routed or config.stream_dense == "off":
                raise
    model = check_model(model.gguf, stream_dense=True)
    return model, plan_memory(model, config)


def plan_memory(model: Model, config: EngineConfig) -> MemoryPlan:
    """Divide the budget among the parts; what the user leaves open is chosen to fit, what is set is kept to.

    Raises:
        NotEnoughMemory: the budget is too small; the text names each part and the smallest budget that works.
        ConfigError: the settings contradict the model or each other.
    """
    spec = model.spec
    device = choose_device(config.device)
    if config.vram is not None and device.is_cpu:
        raise ConfigError(f"vram is set, and the device is {device.label} ({device.reason}); drop it or set a device")
    budget, source = (config.memory, "given") if config.memory is not None else default_budget()
    vram = None
    if device.is_cpu:
        planner = Planner(model, config, budget)
        floor = planner.check(source)
        slots, limits = planner.choose(floor)
    else:
        plans = plan_device(model, config, device, budget, source)
        planner, slots, limits, vram = plans.host, plans.host_slots, plans.limits, plans.vram()
        floor = planner.check(source)
    slots = min(slots, config.slots or slots)
    embedding = model.dense["token_embd.weight"]
    touched = sum(t.n_bytes for t in model.dense.values())
    if not spec.tied_head:
        touched -= embedding.n_bytes - embedding.n_bytes // spec.vocab_size
    mean_bytes = model.experts.total_bytes // max(1, planner.total_experts)  # of an expert
    context = config.context or min(limits.sequence_blocks * KV_TILE, spec.context_length)
    return MemoryPlan(
        budget_bytes=budget,
        budget_source=source,
        parts=planner.parts(limits, slots),
        floor_bytes=floor,
        classes=planner.classes,
        slot_counts=planner.slot_counts(slots),
        limits=limits,
        context=context,
        total_experts=planner.total_experts,
        expert_bytes_per_token=spec.n_routed * spec.top_k * mean_bytes,
        dense_bytes_per_token=touched,
        device=device,
        vram=vram,
    )
