"""`mer bench stream`: makes the data, lets the policies take turns, and prints figures with the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import numpy as np
import trio

from mer.bench.datafile import DataFile, DataPlan, make_data, open_data, plan_data
from mer.bench.geometry import parse_geometry
from mer.bench.probe import disk_bytes_per_s
from mer.bench.results import Measured, bounds, describe, ratios
from mer.bench.stream import StreamRun, Task, check_task, count, reading
from mer.bench.workload import load_workload
from mer.cli.console import Bars, load_reporter, note
from mer.cli.exits import Exit
from mer.cli.interrupt import Interrupt
from mer.config import default_threads
from mer.errors import ConfigError, GGUFError
from mer.json_text import json_text
from mer.paths import cache_folder
from mer.sched.policies.registry import DEFAULT_POLICY
from mer.units import format_bytes, format_duration

MAX_ROUNDS: Final = 1000
MAX_THREADS: Final = 4096
SEVERAL_ROUNDS: Final = 3


@attrs.frozen(kw_only=True)
class StreamOptions:
    """What the command line says."""

    stream: str
    iterations: int | None
    policies: tuple[str, ...]
    slots: int
    geometry: str
    weights: str
    data: Path | None
    simulate: bool
    rounds: int | None
    threads: int | None
    as_json: bool


def bench_stream(options: StreamOptions) -> Exit:
    """Run the benchmark and print its figures; return the exit code.

    Raises:
        MerError: an option makes no sense, the data file cannot be made or read, or a run failed.
    """
    policies = list(options.policies or (DEFAULT_POLICY,))
    check_task(policies, options.slots)
    rounds = _in_range("--rounds", options.rounds, MAX_ROUNDS, 1 if len(policies) == 1 else SEVERAL_ROUNDS)
    threads = _in_range("--threads", options.threads, MAX_THREADS, default_threads())
    geometry = parse_geometry(options.geometry, options.weights)
    workload = load_workload(options.stream, options.iterations)
    if workload.lost_bytes:
        note(f"mer: {workload.name}: the last {workload.lost_bytes} bytes are an unfinished block and were left out")
    plan = plan_data(cache_folder() / "bench", geometry, workload.n_layers, workload.n_experts, path=options.data)
    task = Task(workload=workload, data=plan, n_slots=options.slots, threads=threads)
    if options.simulate:
        results = [Measured(policy=name, tallies=[count(task, name)], in_force=None) for name in policies]
        _print(results, task, as_json=options.as_json, several=len(policies) > 1, interrupted=False)
        return Exit.OK
    with Bars() as bars:
        data = _existing(plan, is_own=options.data is None) or _make(plan, bars)
        extents = [data.extent(*key) for key in np.ndindex(workload.n_layers, workload.n_experts)]
        interrupted = False
        before = _probe(task, policies, extents)
        with Interrupt() as interrupt:
            runs = trio.run(partial(_take_turns, task, data, policies, rounds, bars, interrupt))
            interrupted = interrupt.pressed
    after: dict[str, float] = {}
    if not interrupted:
        try:
            after = _probe(task, policies, extents)
        except KeyboardInterrupt:
            interrupted = True
    results = []
    for name in policies:
        tallies = [run.tally for run in runs if run.policy == name and run.complete]
        # Of a policy that was not run to the end, what there is of its first run.
        tallies = tallies or [run.tally for run in runs if run.policy == name and run.tally.iterations][:1]
        in_force = next((run.in_force for run in runs if run.policy == name), None)
        if tallies:
            rates = tuple(probe[name] for probe in (before, after) if name in probe)
            results.append(Measured(policy=name, tallies=tallies, in_force=in_force, disk_bytes_per_s=rates))
    if results:
        _print(results, task, as_json=options.as_json, several=len(policies) > 1, interrupted=interrupted)
    else:
        note("interrupted before the first iteration")
    return Exit.INTERRUPTED if interrupted else Exit.OK


def _in_range(option: str, value: int | None, most: int, default: int) -> int:
    if value is None:
        return default
    if not 1 <= value <= most:
        raise ConfigError(f"{option} {value}: write a number from 1 to {most}")
    return value


def _existing(plan: DataPlan, *, is_own: bool) -> DataFile | None:
    """Return the data file that is there; one of mer's own that is damaged counts as none.

    Raises:
        GGUFError: a file that the user has named holds something else.
    """
    try:
        return open_data(plan)
    except GGUFError as error:
        if not is_own:
            raise
        note(f"mer: {error}; making it again")
        return None


def _make(plan: DataPlan, bars: Bars) -> DataFile:
    """Make the data file, and say first what that takes."""
    experts = f"{plan.n_layers * plan.n_experts} experts of {format_bytes(plan.geometry.expert_bytes)}"
    note(f"making {plan.path}: {format_bytes(plan.n_bytes)} of disk space for {experts}; it is kept for the next run")
    make_data(plan, lambda done, total: bars.show("writing experts", done, total, "bytes"))
    bars.clear()
    data = open_data(plan)
    assert data is not None
    return data


def _probe(task: Task, policies: Sequence[str], extents: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return what the disk gives to reads as each policy makes them, in bytes per second."""
    rates = {}
    for name in policies:
        how = reading(task, name)
        rates[name] = disk_bytes_per_s(task.data.path, extents, chunk_bytes=how.chunk_bytes, depth=how.io_threads)
    return rates


async def _take_turns(
    task: Task, data: DataFile, policies: Sequence[str], rounds: int, bars: Bars, interrupt: Interrupt
) -> list[StreamRun]:
    """Run every policy once per round, one after the other, until all are done or ctrl-C is pressed."""
    report = load_reporter(bars)
    runs: list[StreamRun] = []
    for number in range(1, rounds + 1):
        for name in policies:
            run = StreamRun(task, data, name)
            stage = name if rounds == 1 else f"{name}, round {number} of {rounds}"
            run.tally.on_iteration = partial(_show, bars, stage, len(task.workload.events))
            runs.append(run)
            with interrupt.stopping():
                await run.run(report)
            if interrupt.pressed:
                return runs
    return runs


def _show(bars: Bars, stage: str, total: int, done: int) -> None:
    bars.show(stage, done, total, "iterations")


def _print(results: Sequence[Measured], task: Task, *, as_json: bool, several: bool, interrupted: bool) -> None:
    """Print a table or JSON: of one policy its object, of several {"results": [...], "iterations_per_s_ratios"}."""
    bound = bounds(task.workload, task.n_slots)
    described = [describe(result, task, bound) | {"interrupted": interrupted} for result in results]
    compared = ratios(results)
    if as_json:
        print(json_text({"results": described, "iterations_per_s_ratios": compared} if several else described[0]))
        return
    workload, geometry = task.workload, task.data.geometry
    print(f"{workload.name}: {len(workload.events)} iterations, {workload.lookups} lookups of ", end="")
    print(f"{workload.n_layers} x {workload.n_experts} experts; {task.n_slots} slots")
    print(f"experts: {geometry.name}, d_model {geometry.d_model}, d_ff {geometry.d_ff}, {geometry.type.name}, ", end="")
    print(f"{format_bytes(geometry.expert_bytes)} each\n")
    columns = [_column(one) for one in described]
    print(f"| policy | {' | '.join(result.policy for result in results)} |")
    print(f"| --- |{' ---: |' * len(results)}")
    for row in columns[0]:
        print(f"| {row} | {' | '.join(column[row] for column in columns)} |")
    print(f"\nLRU hits {bound.lru:.2%} of these lookups, Belady's oracle {bound.belady:.2%}")
    for pair, ratio in compared.items():
        print(f"iterations/s, {pair}: {ratio:.3f}")
    if interrupted:
        print("interrupted: these are the figures so far")


def _column(one: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows of one policy's column: {name: text}."""
    rows = {
        "iterations": str(one["iterations"]),
        "iterations/s": _or_dash(one["iterations_per_s"], "{:.3g}"),
        "hits": f"{one['hit_rate']:.2%}",
        "experts read": str(one["reads"]),
        "prefetches: issued, used, wasted": (
            f"{one['prefetches']}, {one['prefetches_used']}, {one['prefetches_wasted']}"
        ),
        "bytes read": format_bytes(one["bytes_read"]),
    }
    if one["simulated"]:
        return rows
    settings = one["settings"]
    mode = settings["io_mode"]
    return rows | {
        "time": format_duration(one["wall_s"]),
        "read of an expert: p50, p95, p99": ", ".join(_duration(one[f"read_p{q}_s"]) for q in (50, 95, 99)),
        "compute of an iteration: p50": _duration(one["compute_p50_s"]),
        "read rate": f"{one['bytes_per_s'] / 1e9:.2f} GB/s",
        "disk limit, probed": ", ".join(f"{rate / 1e9:.2f}" for rate in one["disk_bytes_per_s"]) + " GB/s",
        "share of the disk limit": f"{one['disk_share']:.0%}",
        "read as": f"{settings['io_threads']} at once of up to {format_bytes(settings['chunk_bytes'])}, "
        + ("direct" if mode["direct"] else "buffered"),
        "buffers": f"{settings['buffers']} of {format_bytes(settings['buffer_bytes'])}",
        "compute": f"{settings['threads']} threads, {settings['kernels']}",
        "outputs, SHA-256": one["output_sha256"][:16],
    }


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else format_duration(seconds)
