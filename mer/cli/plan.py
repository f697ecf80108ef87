"""`mer plan`: what a budget is spent on, what a token costs, and what will bind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mer.cli.options import EngineOptions
from mer.cli.rates import disk_bytes_per_s, memory_bytes_per_s
from mer.compute.kernels.kv_layout import KV_TILE
from mer.config import EngineConfig, default_threads
from mer.json_text import json_text
from mer.plan.plan import MemoryPlan, load_and_plan
from mer.plan.vram import VRAMPlan
from mer.units import format_bytes, format_slots


def plan(path: Path, options: EngineOptions, *, as_json: bool) -> None:
    """Print the memory plan of a model and a forecast from quick measurements of disk and memory.

    Raises:
        ModelFileError: the file is malformed or not supported.
        NotEnoughMemory: the budget is too small.
        ConfigError: the settings contradict the model or each other.
    """
    config = EngineConfig(path=path, **options.arguments())
    model, memory_plan = load_and_plan(config)
    threads = config.threads or default_threads()
    report = describe(memory_plan) | {"stream_dense": model.spec.streams_dense}
    report |= forecast(memory_plan, disk_bytes_per_s(model.gguf, model.experts), memory_bytes_per_s(threads))
    if as_json:
        print(json_text(report))
    else:
        _print(report)


def describe(memory_plan: MemoryPlan) -> dict[str, Any]:
    """Return the plan as JSON-ready values; sizes in bytes."""
    return {
        "budget_bytes": memory_plan.budget_bytes,
        "budget_source": memory_plan.budget_source,
        "floor_bytes": memory_plan.floor_bytes,
        "parts": dict(memory_plan.parts),
        "unused_bytes": memory_plan.budget_bytes - memory_plan.used_bytes,
        "slots": memory_plan.slots,
        "slot_counts": list(memory_plan.slot_counts),
        "slot_bytes": list(memory_plan.classes.slot_bytes),
        "slot_waste": memory_plan.slot_waste,
        "experts": memory_plan.total_experts,
        "context": memory_plan.context,
        "kv_tokens": memory_plan.limits.kv_blocks * KV_TILE,
        "kv_type": memory_plan.limits.kv_type,
        "max_sequences": memory_plan.limits.sequences,
        "batch_tokens": memory_plan.limits.batch_tokens,
        "threads": memory_plan.limits.threads,
        "expert_bytes_per_token": memory_plan.expert_bytes_per_token,
        "dense_bytes_per_token": memory_plan.dense_bytes_per_token,
        "expected_read_bytes_per_token": memory_plan.expected_read_bytes_per_token,
        "device": memory_plan.device.label,
        "device_reason": memory_plan.device.reason,
        "vram": None if memory_plan.vram is None else _describe_vram(memory_plan.vram),
    }


def _describe_vram(vram: VRAMPlan) -> dict[str, Any]:
    """Return the plan of the device's own memory as JSON-ready values; sizes in bytes."""
    return {
        "budget_bytes": vram.budget_bytes,
        "budget_source": vram.budget_source,
        "floor_bytes": vram.floor_bytes,
        "parts": dict(vram.parts),
        "unused_bytes": vram.budget_bytes - sum(vram.parts.values()),
        "dense": vram.dense,
        "dense_reason": vram.dense_reason,
        "slots": vram.slots,
        "slot_counts": list(vram.slot_counts),
        "slot_bytes": list(vram.classes.slot_bytes),
    }


def forecast(memory_plan: MemoryPlan, disk_rate: float, memory_rate: float) -> dict[str, Any]:
    """Return the limit of decoding one sequence: the slower of reading missed experts and touching all weights.

    `limit = 1 / max(missed bytes / disk rate, touched bytes / memory rate)`, with reads and arithmetic overlapped
    perfectly; rates in bytes per second.
    """
    touched_bytes = memory_plan.expert_bytes_per_token + memory_plan.dense_bytes_per_token
    disk_s = memory_plan.expected_read_bytes_per_token / disk_rate
    memory_s = touched_bytes / memory_rate
    return {
        "disk_bytes_per_s": disk_rate,
        "memory_bytes_per_s": memory_rate,
        "disk_s_per_token": disk_s,
        "memory_s_per_token": memory_s,
        "limit_tokens_per_s": 1 / max(disk_s, memory_s),
        "binds": "disk" if disk_s > memory_s else "memory",
    }


def _print(report: dict[str, Any]) -> None:
    """Print a plan and its forecast for a person."""
    print(f"device {report['device']} ({report['device_reason']})")
    if (vram := report["vram"]) is not None:
        print(f"VRAM {format_bytes(vram['budget_bytes'])} ({vram['budget_source']}); ", end="")
        print(f"the smallest that works is {_mebibytes_up(vram['floor_bytes'])}")
        _print_parts(vram)
        print(f"dense weights, KV and attention on the {vram['dense']} ({vram['dense_reason']})")
        slots = format_slots(vram["slot_counts"], vram["slot_bytes"])
        if report["experts"]:
            print(f"{slots} for {report['experts']} experts: {vram['slots'] / report['experts']:.0%} stay there")
    print(f"budget {format_bytes(report['budget_bytes'])} ({report['budget_source']}); ", end="")
    print(f"the smallest that works is {_mebibytes_up(report['floor_bytes'])}")
    _print_parts(report)
    slots = format_slots(report["slot_counts"], report["slot_bytes"])
    if report["experts"]:
        what = "feed-forward networks of a dense model" if report["stream_dense"] else "experts"
        print(f"{slots} for {report['experts']} {what}: {report['slots'] / report['experts']:.0%} stay in memory")
    else:
        print("a dense model: no experts, and nothing is read after it has been opened")
    if len(report["slot_bytes"]) > 1 or report["slot_waste"] >= 0.001:
        print(f"as experts differ in size, {report['slot_waste']:.1%} of the slots' memory stays unused")
    print(f"context {report['context']} tokens, up to {report['max_sequences']} sequences at once ", end="")
    print(f"with {report['kv_tokens']} tokens together in {report['kv_type']}, ", end="")
    print(f"prefill chunk {report['batch_tokens']}, ", end="")
    print(f"{report['threads']} threads")
    dense = f"{format_bytes(report['dense_bytes_per_token'])} of dense weights"
    if report["experts"]:
        print(f"a token uses {format_bytes(report['expert_bytes_per_token'])} of experts and {dense}")
        expected = format_bytes(report["expected_read_bytes_per_token"])
        print(f"expected to be read per token: {expected} (if every expert were as likely as any other)")
    else:
        print(f"a token uses {dense}")
    rates = [format_bytes(report[f"{name}_bytes_per_s"]) for name in ("disk", "memory")]
    print(f"measured here: disk {rates[0]}/s, memory {rates[1]}/s")
    limit = report["limit_tokens_per_s"]
    print(f"the {report['binds']} binds: at most {limit:{',.0f' if limit >= 100 else '.3g'}} tokens/s")


def _print_parts(report: dict[str, Any]) -> None:
    """Print the parts of a budget and what is left of it."""
    for name, n_bytes in (report["parts"] | {"unused": report["unused_bytes"]}).items():
        if n_bytes:
            print(f"  {name:<26} {format_bytes(n_bytes):>9}")


def _mebibytes_up(n_bytes: int) -> str:
    """Return a size that is not below what it stands for, so that it can be given as a budget."""
    return f"{-(-n_bytes // (1 << 20))} MiB"
