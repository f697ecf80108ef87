"""Settings in force."""

from __future__ import annotations

from mer.compute.kernels.kv_layout import KV_TILE
from mer.compute.kernels.step import kernel_cache
from mer.compute.kernels.target import WIDE_VECTORS
from mer.config import EngineConfig
from mer.io.arena import Arena
from mer.io.open_reader import OpenReader
from mer.model.loading import Model
from mer.opening.prefetching import prefetch_mode
from mer.opening.worker import Computing
from mer.plan.plan import MemoryPlan
from mer.plan.vram import VRAMPlan
from mer.sched.cache import ExpertCache
from mer.stats import Settings, VRAMSettings
from mer.system import usable_cpus


def settings_in_force(
    config: EngineConfig,
    plan: MemoryPlan,
    model: Model,
    computing: Computing,
    pinned: str,
    arena: Arena,
    opened: OpenReader,
    cache: ExpertCache,
    job_reads: str,
) -> Settings:
    """Return the settings as they are in force, with what they were chosen by."""
    types: dict[str, int] = {}
    for tensor in model.gguf.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.n_bytes
    return Settings(
        memory_bytes=plan.budget_bytes,
        memory_source=plan.budget_source,
        threads=plan.limits.threads,
        threads_source=usable_cpus()[1] if config.threads is None else "as set",
        io_threads=opened.reader.depth,
        io_engine=opened.reader.engine,
        io_reason=opened.reason,
        job_reads=job_reads,
        mirrors=tuple(map(str, config.mirrors)),
        slots=plan.slots,
        slot_counts=plan.slot_counts,
        slot_bytes=plan.classes.slot_bytes,
        context=plan.context,
        kv_tokens=plan.limits.kv_blocks * KV_TILE,
        prefix_reuse=config.prefix_reuse,
        stream_dense="on" if model.spec.streams_dense else "off",
        max_sequences=plan.limits.sequences,
        batch_tokens=plan.limits.batch_tokens,
        max_waiting=config.max_waiting,
        device=plan.device.label,
        device_reason=plan.device.reason,
        vram=None if plan.vram is None else _vram_settings(plan.vram, config.hybrid, pinned),
        kernels=computing.kernels,
        wide_vectors=WIDE_VECTORS,
        kernel_cache=kernel_cache(),
        activations=computing.activations,
        kv_type=computing.kv_type,
        policy=cache.statistics().policy if model.spec.routed else "no",
        prefetch=prefetch_mode(config, plan),
        heat=None if config.heat is None else str(config.heat),
        trace=None if config.trace is None else str(config.trace),
        io_modes=opened.reader.modes,
        huge_pages=arena.huge_pages,
        types=types,
    )


def _vram_settings(vram: VRAMPlan, hybrid: str, pinned: str) -> VRAMSettings:
    return VRAMSettings(
        budget_bytes=vram.budget_bytes,
        budget_source=vram.budget_source,
        parts=dict(vram.parts),
        slots=vram.slots,
        slot_counts=vram.slot_counts,
        slot_bytes=vram.classes.slot_bytes,
        dense=vram.dense,
        dense_reason=vram.dense_reason,
        hybrid=hybrid,
        pinned=pinned,
    )
