"""Plan of a device's own memory, and of the process's memory where there is a device."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import attrs

from mer.compute.cpu.biases import bias_bytes
from mer.compute.cpu.experts import expert_areas
from mer.compute.cpu.forward import matrix_types
from mer.compute.cpu.scratch import Limits
from mer.compute.cpu.weights import READ_BYTES, READS_AHEAD
from mer.compute.cuda import sizes
from mer.compute.cuda.sizes import VRAMClasses
from mer.config import EngineConfig
from mer.errors import ConfigError
from mer.model.loading import Model
from mer.plan.device import TORCH_CPU, DeviceChoice
from mer.plan.memory import MiB, Planner, compiler_bytes, describe_parts, largest, slot_order
from mer.units import format_bytes


@attrs.frozen(kw_only=True)
class VRAMPlan:
    """Division of the device's own memory."""

    budget_bytes: int
    budget_source: str  # "given", or how the default was found
    parts: Mapping[str, int]  # name -> bytes; their sum is at most the budget
    floor_bytes: int  # the smallest budget that works with these settings
    classes: VRAMClasses
    dense: str  # where attention, router, head and KV are: "device" or "cpu"
    dense_reason: str
    slot_counts: tuple[int, ...]  # of each class, to keep experts in; `parts` has those that they pass through

    @property
    def slots(self) -> int:
        """Slots of all classes that keep experts."""
        return sum(self.slot_counts)

    def describe(self) -> str:
        """Return the parts as lines of text."""
        return describe_parts(self.parts)


@attrs.frozen
class Plans:
    """The planners of both memories, once it is settled where the dense part is."""

    device: DevicePlanner
    host: Planner
    limits: Limits  # the largest batch
    host_slots: int
    device_slots: int

    def vram(self) -> VRAMPlan:
        """Return the plan of the device's memory."""
        planner = self.device
        return VRAMPlan(
            budget_bytes=planner.budget,
            budget_source=planner.source,
            parts=planner.parts(self.limits, self.device_slots),
            floor_bytes=planner.check(planner.source),
            classes=planner.device_classes,
            dense="device" if planner.dense else "cpu",
            dense_reason=planner.reason,
            slot_counts=planner.slot_counts(self.device_slots),
        )


def plan_device(model: Model, config: EngineConfig, device: DeviceChoice, budget: int, source: str) -> Plans:
    """Divide both memories: the dense part goes to the device if it fits there, else it stays with the processor.

    Args:
        model: the model.
        config: what the user has set.
        device: the device.
        budget: bytes of the process's memory.
        source: how that was found.

    Raises:
        NotEnoughMemory: one of the budgets is too small; the text names each part and the smallest budget that works.
        ConfigError: the settings contradict the model or each other.
    """
    on_device = DevicePlanner(model, config, device, dense=True)
    if on_device.fits:
        slots, limits = on_device.choose(on_device.check(on_device.source))
        host: Planner = HostPlanner(model, config, budget, limits)
        host_slots, _ = host.choose(host.check(source))
        return Plans(on_device, host, limits, host_slots, _capped(slots, config))
    apart = DevicePlanner(model, config, device, dense=False)
    apart.check(apart.source, what="VRAM", option="--vram")
    apart.reason = f"VRAM with it must be at least {format_bytes(on_device.least_bytes)}"
    host = Planner(model, config, budget)
    host.add_part("torch and CUDA", sizes.HOST_BYTES)
    host_slots, limits = host.choose(host.check(source))
    least = apart.parts(limits, apart.least_slots)
    if sum(least.values()) > apart.budget:
        limits = host.smallest
    return Plans(apart, host, limits, host_slots, _capped(apart.slots_beside(limits), config))


def _capped(slots: int, config: EngineConfig) -> int:
    return min(slots, config.vram_slots or slots)


def default_vram(device: DeviceChoice) -> tuple[int, str]:
    """Return the budget for a device's own memory, and how it was found: what is free less a reserve for others."""
    reserve = max(device.free_bytes // 20, 256 * MiB) if device.total_bytes else 0
    return max(0, device.free_bytes - reserve), f"free on {device.label}, less {format_bytes(reserve)}"


class DevicePlanner(Planner):
    """The arithmetic of the device's own memory: the same division among other parts, of other sizes.

    Args:
        model: the model.
        config: what the user has set.
        device: the device.
        dense: whether the dense part and its KV are there.
    """

    def __init__(self, model: Model, config: EngineConfig, device: DeviceChoice, *, dense: bool) -> None:
        self.budget, self.source = (config.vram, "given") if config.vram is not None else default_vram(device)
        super().__init__(model, attrs.evolve(config, slots=None), self.budget)
        self.dense, self.reason = dense, "they fit"
        self._hybrid = config.hybrid != "off" and bool(model.spec.routed)
        classes = self.device_classes = sizes.vram_classes(model.experts)
        self.least_slots = len(classes.slot_bytes)
        if config.vram_slots is not None and config.vram_slots < self.least_slots:
            listed = ", ".join(map(format_bytes, classes.slot_bytes))
            raise ConfigError(
                f"vram_slots is {config.vram_slots}; the model's experts come in {self.least_slots} sizes ({listed}) "
                f"and need a slot of each, so at least {self.least_slots}"
            )
        self._order = slot_order(classes.n_experts, model.spec.top_k)
        self._bytes_of_slots = [0, *itertools.accumulate(classes.slot_bytes[kind] for kind in self._order)]
        self._fixed = {
            "CUDA and libraries": 0 if device.name == TORCH_CPU else sizes.CONTEXT_BYTES,
            "dense weights": sizes.dense_bytes(model.dense) if dense else 0,
            "passing experts": sizes.STAGING_SLOTS * sum(classes.slot_bytes),
        }
        biases = 0 if dense else bias_bytes(model.spec.expert_weights)
        if biases:
            self._fixed["expert biases"] = biases

    @property
    def least_bytes(self) -> int:
        """The smallest budget that works."""
        return sum(self.parts(self.smallest, self.least_slots).values())

    @property
    def fits(self) -> bool:
        """Whether the budget is at least as large."""
        return self.budget >= self.least_bytes

    def slots_beside(self, limits: Limits) -> int:
        """Return the number of slots that fit with all other parts, for batches of these limits."""
        scratch = self._scratch_bytes(limits)
        return largest(self.least_slots, self.total_experts, lambda n: self._fits(0, scratch, n))

    def _parts(self, kv_bytes: int, scratch: int, slots: int) -> dict[str, int]:
        return self._fixed | {"KV cache": kv_bytes, "scratch": scratch, "expert slots": self._bytes_of_slots[slots]}

    def _kv_bytes(self, blocks: int) -> int:
        return blocks * sizes.kv_layout(self._spec, self._kv_type).block_bytes if self.dense else 0

    def _scratch_bytes(self, limits: Limits) -> int:
        return sizes.scratch_bytes(self._spec, limits, self._experts, dense=self.dense, hybrid=self._hybrid)


class HostPlanner(Planner):
    """The arithmetic of the process's memory where a device has the dense part and settles the batches.

    Args:
        model: the model.
        config: what the user has set.
        budget: bytes.
        limits: the largest batch.
    """

    def __init__(self, model: Model, config: EngineConfig, budget: int, limits: Limits) -> None:
        super().__init__(model, config, budget)
        self.smallest = limits
        self._hybrid = config.hybrid != "off" and bool(model.spec.routed)
        self._kinds = matrix_types((), model.experts)
        compiler = compiler_bytes(self._kinds) if self._hybrid else 0
        self._fixed |= {"torch and CUDA": sizes.HOST_BYTES, "kernel compiler": compiler, "dense weights": 0}
        self._load_bytes = min((READS_AHEAD + 1) * READ_BYTES, sum(t.n_bytes for t in model.dense.values()))

    def _kv_bytes(self, blocks: int) -> int:
        return 0

    def _scratch_bytes(self, limits: Limits) -> int:
        n_bytes = sizes.host_bytes(self._spec, limits)
        if self._hybrid:
            areas = expert_areas(self._experts, self._spec.expert_weights, self._spec.top_k, limits)
            n_bytes += areas.n_bytes(self._kinds, limits.planes) + bias_bytes(self._spec.expert_weights)
        return n_bytes

    def choose(self, floor: int) -> tuple[int, Limits]:
        """Return the number of slots that fit, and the limits."""
        scratch = self._scratch_bytes(self.smallest)
        slots = largest(self.least_slots, self.total_experts, lambda n: self._fits(0, scratch, n))
        return slots, self.smallest
