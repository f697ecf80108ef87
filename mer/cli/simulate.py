"""`mer simulate`: a routing trace replayed through cache policies, with the offline bound."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

from mer.cli.console import note
from mer.errors import ConfigError
from mer.json_text import json_text
from mer.sched.belady import simulate_belady
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy
from mer.sched.simulate import EventList, Simulation, simulate
from mer.sched.trace import TraceHeader, TraceReader
from mer.units import format_bytes

ALL = "all"


def simulate_trace(
    path: Path,
    *,
    policy: str,
    slots: str,
    heat: Path | None,
    save_heat: Path | None,
    bypass: bool,
    as_json: bool,
) -> None:
    """Print the hits of one policy or of all, for each number of slots, and Belady's.

    Raises:
        ConfigError: there is no such policy, or `slots` are no numbers above 0 or shares.
        TraceError: the trace is malformed or damaged.
        ProfileError: the heat profile is malformed or belongs to another model.
        OSError: a file cannot be read or written.
    """
    if policy != ALL and policy not in POLICIES:
        raise ConfigError(f"no policy is named {policy!r}; there are {', '.join(POLICIES)}, and {ALL}")
    with TraceReader(path) as reader:
        header = reader.header
        sizes = _parse_slots(slots, header.n_layers * header.n_experts)
        events = EventList((event.layer, event.experts) for event in reader)
        lost_bytes = reader.lost_bytes
    if lost_bytes:
        note(f"mer: {path}: the last {lost_bytes} bytes are an unfinished block and were left out")
    own_heat = HeatProfile.count(header.fingerprint, header.n_layers, header.n_experts, events)
    if save_heat is not None:
        own_heat.save(save_heat)
    profile = own_heat if heat is None else _load(heat, header)
    names = [policy] if policy != ALL else [name for name in POLICIES if name != "cost" or _sizes_differ(header)]
    runs = []
    for n_slots in sizes:
        shape = CacheShape(
            n_layers=header.n_layers,
            n_experts=header.n_experts,
            n_slots=n_slots,
            expert_bytes=header.expert_bytes,
            profile=profile,
        )
        results = [
            simulate(events, make_policy(name, shape), n_slots, n_layers=header.n_layers, bypass=bypass)
            for name in names
        ]
        runs.append([*results, simulate_belady(events, n_slots, n_layers=header.n_layers)])
    if as_json:
        report = {
            "trace": str(path),
            "layers": header.n_layers,
            "experts_per_layer": header.n_experts,
            "top_k": header.top_k,
            "fingerprint": header.fingerprint.hex(),
            "events": len(events),
            "lost_bytes": lost_bytes,
            "bypass": bypass,
            "results": [_describe(result, header) for run in runs for result in run],
        }
        print(json_text(report))
    else:
        _print(header, len(events), runs)


def _parse_slots(text: str, n_experts: int) -> list[int]:
    """Return the numbers of a comma-separated list; those with a percent sign are shares of `n_experts`.

    Raises:
        ConfigError: it is none, or a number is not above 0, or a share above 100 %.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)(%?)\s*", part, re.ASCII)
        number = Fraction(match[1]) if match else Fraction()
        if match and match[2] and 0 < number <= 100:
            sizes.append(max(1, int(number * n_experts / 100)))
        elif match and not match[2] and number > 0 and number.denominator == 1:
            sizes.append(int(number))
        else:
            raise ConfigError(f"--slots {text!r}: write numbers above 0, or shares of all experts, such as 16,32,25%")
    return sizes


def _load(heat: Path, header: TraceHeader) -> HeatProfile:
    return HeatProfile.load(heat, fingerprint=header.fingerprint, n_layers=header.n_layers, n_experts=header.n_experts)


def _describe(result: Simulation, header: TraceHeader) -> dict[str, Any]:
    """Return a result as JSON-ready values."""
    known = all(header.expert_bytes)
    return {
        "policy": result.policy,
        "slots": result.n_slots,
        "lookups": result.lookups,
        "hits": result.hits,
        "misses": result.lookups - result.hits,
        "hit_rate": result.hit_rate,
        "missed_bytes": result.missed_bytes(header.expert_bytes) if known else None,
        "layer_hits": result.layer_hits,
        "layer_lookups": result.layer_lookups,
    }


def _sizes_differ(header: TraceHeader) -> bool:
    """Return whether a miss of one layer is known to cost more than one of another."""
    return all(header.expert_bytes) and len(set(header.expert_bytes)) > 1


def _print(header: TraceHeader, n_events: int, runs: list[list[Simulation]]) -> None:
    """Print tables for a person: a row for each number of slots, a column for each policy."""
    experts = header.n_layers * header.n_experts
    print(f"{n_events} events, {header.n_layers} layers of {header.n_experts} experts, top {header.top_k}", end="")
    if all(header.expert_bytes):
        print(f", experts of {format_bytes(sum(header.expert_bytes) / header.n_layers)}", end="")
    print(f"; {runs[0][0].lookups} lookups; hits in %")
    _print_table(experts, runs, lambda result: f"{100 * result.hit_rate:.2f}")
    if _sizes_differ(header):
        print("\nbytes missed")
        _print_table(experts, runs, lambda result: format_bytes(result.missed_bytes(header.expert_bytes)))


def _print_table(experts: int, runs: list[list[Simulation]], cell: Callable[[Simulation], str]) -> None:
    width = max(9, *(len(result.policy) for result in runs[0])) + 2
    print(f"{'slots':>7} {'share':>6}" + "".join(f"{result.policy:>{width}}" for result in runs[0]))
    for run in runs:
        n_slots = run[0].n_slots
        row = "".join(f"{cell(result):>{width}}" for result in run)
        print(f"{n_slots:>7} {min(1.0, n_slots / experts):>6.0%}{row}")
