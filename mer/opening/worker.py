"""The compute worker that an engine uses, and what the rest of the engine must know of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import attrs
import numba

from mer.compute.cpu.forward import Forward, kv_layout, matrix_types, steps_for
from mer.compute.cpu.prepare import prepare_kernels
from mer.compute.cpu.weights import DenseWeights
from mer.compute.cpu.worker import CPUWorker
from mer.compute.cuda.sizes import kv_layout as device_kv_layout
from mer.compute.kernels.matmul import block_format
from mer.compute.kernels.target import FORM
from mer.compute.messages import ComputeWorker, Tier
from mer.compute.state import StateLayout
from mer.config import EngineConfig, Progress
from mer.errors import ConfigError
from mer.io.reader import Reader
from mer.model.loading import Model
from mer.plan.plan import MemoryPlan
from mer.sched.policies.registry import DEFAULT_POLICY, CacheShape, make_policy


class Worker(ComputeWorker, Protocol):
    """A compute worker with its own threads."""

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more; empty as long as it can."""

    def start_threads(self) -> None:
        """Start the threads."""

    def close(self) -> None:
        """Stop the threads."""

    def disown(self) -> None:
        """Compute nothing more, in a forked child: threads and memory are the parent's."""


@attrs.frozen(kw_only=True)
class Computing:
    """A worker that is ready to start, and what is in force in it."""

    worker: Worker
    tier: Tier | None
    kernels: str  # instruction-set form, or the form of the device's kernels
    activations: str  # precision of activations that meet the weights
    arithmetic: str  # what the numbers in KV blocks depend on
    kv_type: str  # how keys and values are kept
    state: StateLayout  # what of a KV block is each layer's
    pin: Callable[[int, int], str]  # pins an address and bytes for copies; returns what is in force


async def open_computing(config: EngineConfig, model: Model, plan: MemoryPlan, reader: Reader) -> Computing:
    """Compile the kernels, read the dense weights, and make the worker for the plan's device.

    If cancelled, reads in flight keep their memory until they land.

    Raises:
        ReadError: bytes could not be read.
        NotEnoughMemory: the device has not the memory that the plan counts on.
        ConfigError: the device cannot be used.
    """

    numba_config: Any = numba.config
    if numba_config.DISABLE_JIT:
        raise ConfigError("NUMBA_DISABLE_JIT is set, and nothing computes without compiled kernels; unset it")

    def on_read(done: int, total: int) -> None:
        config.on_progress(Progress("dense weights", done, total, "bytes"))

    if not plan.device.is_cpu:
        return await _open_device(config, model, plan, reader, on_read)
    steps = steps_for(matrix_types(model.dense.values(), model.experts), plan.limits.planes, plan.limits.kv_type)
    await prepare_kernels(steps, config.on_progress)
    weights = DenseWeights(model.dense, model.spec.norm_factors())
    await weights.load(reader, on_read)
    activations = activations_in_force(model, plan)
    return Computing(
        worker=CPUWorker(Forward(model.spec, plan.limits, weights, model.experts), plan.limits.threads),
        tier=None,
        kernels=FORM.value,
        activations=activations,
        arithmetic=activations,
        kv_type=plan.limits.kv_type,
        state=kv_layout(model.spec, plan.limits.kv_type),
        pin=lambda address, n_bytes: "not pinned: no device",
    )


async def _open_device(
    config: EngineConfig, model: Model, plan: MemoryPlan, reader: Reader, on_read: Callable[[int, int], None]
) -> Computing:
    """Make the CUDA worker; the only place that imports torch outside its package, and not before it is needed."""
    from mer.compute.cuda.opening import open_device

    assert plan.vram is not None
    shape = CacheShape(
        n_layers=model.spec.n_routed,
        n_experts=model.spec.n_experts,
        n_slots=plan.vram.slots,
        kinds=plan.vram.classes.kinds,
        slot_counts=plan.vram.slot_counts,
        expert_bytes=tuple(sum(e.n_bytes for e in layer) // len(layer) for layer in model.experts.experts),
    )
    name = config.policy or DEFAULT_POLICY
    policy = make_policy(DEFAULT_POLICY if name == "static" else name, shape)  # a heat profile ranks what is in memory
    on_cpu, hybrid = plan.vram.dense == "cpu", config.hybrid != "off" and bool(model.spec.routed)
    if on_cpu or hybrid:
        kinds = matrix_types(model.dense.values() if on_cpu else (), model.experts)
        await prepare_kernels(steps_for(kinds, plan.limits.planes, plan.limits.kv_type), config.on_progress)
    forward = None
    if on_cpu:
        weights = DenseWeights(model.dense, model.spec.norm_factors())
        await weights.load(reader, on_read)
        forward = Forward(model.spec, plan.limits, weights, model.experts)
    opened = await open_device(
        plan.device.name,
        spec=model.spec,
        limits=plan.limits,
        dense=model.dense,
        experts=model.experts,
        classes=plan.vram.classes,
        counts=plan.vram.slot_counts,
        policy=policy,
        reader=reader,
        on_read=on_read,
        arithmetic=plan.vram.describe(),
        hybrid=hybrid,
        forward=forward,
    )
    on_host = activations_in_force(model, plan)
    activations = opened.activations + (f", on the processor {on_host}" if on_cpu or hybrid else "")
    return Computing(
        worker=opened.worker,
        tier=opened.worker.tier,
        kernels=opened.kernels,
        activations=activations,
        arithmetic=_kv_arithmetic(opened.activations, on_host if on_cpu or hybrid else "", on_cpu=on_cpu),
        kv_type=plan.limits.kv_type,
        state=(kv_layout if on_cpu else device_kv_layout)(model.spec, plan.limits.kv_type),
        pin=opened.pin,
    )


def _kv_arithmetic(on_device: str, on_host: str, *, on_cpu: bool) -> str:
    """Return a short name of what KV depends on: where it is computed, and both sides' precision."""
    short = {"float32": "f32", "bfloat16": "bf16"}
    return "+".join(filter(None, (f"{'mix' if on_cpu else 'gpu'}-{short[on_device]}", short.get(on_host, on_host))))


def activations_in_force(model: Model, plan: MemoryPlan) -> str:
    """Return the precision of activations on the CPU worker."""
    if all(block_format(int(kind)) is None for kind in matrix_types(model.dense.values(), model.experts)):
        return "float32"
    return "int8" if plan.limits.planes == 1 else "int15"
