"""Figures of a streaming benchmark: medians over rounds, the limits, and ratios between policies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import attrs

from mer.bench.stream import InForce, Task
from mer.bench.tally import Tally, quantile
from mer.bench.workload import Workload
from mer.sched.belady import simulate_belady
from mer.sched.policies.layer_lru import LayerLRU
from mer.sched.simulate import Event, simulate


@attrs.frozen(kw_only=True)
class Bounds:
    """Hit rates of the same lookups, one expert after the other."""

    lru: float  # least recently used, per layer
    belady: float  # the future known


def bounds(workload: Workload, n_slots: int) -> Bounds:
    """Return what LRU and an oracle would hit, with every iteration's experts looked up in the order it names them.

    Looked up all at once, as the policies do it, the oracle gains a little: 0.1 points on the article's stream.
    """
    events: list[Event] = [(layer, (expert,)) for layer, experts in workload.events for expert in experts]
    layers = workload.n_layers
    return Bounds(
        lru=simulate(events, LayerLRU(layers, n_slots), n_slots, n_layers=layers).hit_rate,
        belady=simulate_belady(events, n_slots, n_layers=layers).hit_rate,
    )


@attrs.frozen(kw_only=True)
class Measured:
    """The rounds of one policy."""

    policy: str
    tallies: Sequence[Tally]  # one per round, at least one
    in_force: InForce | None  # None: nothing was read or computed
    disk_bytes_per_s: tuple[float, ...] = ()  # probed before, and after

    @property
    def wall_s(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(tally.wall_s for tally in self.tallies) if self.in_force is not None else None

    @property
    def iterations_per_s(self) -> float | None:
        """At the median time."""
        return self.tallies[0].iterations / self.wall_s if self.wall_s else None

    @property
    def disk_share(self) -> float | None:
        """Share of the run that the disk would have needed at the rate probed."""
        if not self.wall_s or not self.disk_bytes_per_s:
            return None
        return self.tallies[0].bytes_transferred / self.wall_s / statistics.mean(self.disk_bytes_per_s)


def describe(measured: Measured, task: Task, bound: Bounds) -> dict[str, Any]:
    """Return the figures of one policy as JSON-ready values; counts are those of one round.

    Times that were not measured are None. Latencies are over the reads and iterations of all rounds.
    """
    tally, in_force, geometry = measured.tallies[0], measured.in_force, task.data.geometry
    read_s = [second for one in measured.tallies for second in one.read_s]
    compute_s = [second for one in measured.tallies for second in one.compute_s]
    return {
        "policy": measured.policy,
        "stream": task.workload.name,
        "simulated": in_force is None,
        "rounds": len(measured.tallies),
        "iterations": tally.iterations,
        "lookups": tally.lookups,
        "hits": tally.hits,
        "hit_rate": tally.hit_rate,
        "lru_hit_rate": bound.lru,
        "belady_hit_rate": bound.belady,
        "reads": tally.reads,
        "prefetches": tally.prefetches,
        "prefetches_used": tally.prefetches_used,
        "prefetches_wasted": tally.prefetches - tally.prefetches_used,
        "expert_bytes": geometry.expert_bytes,
        "bytes_read": tally.bytes_read,
        "bytes_transferred": None if in_force is None else tally.bytes_transferred,
        "wall_s": measured.wall_s,
        "wall_s_of_rounds": None if in_force is None else [one.wall_s for one in measured.tallies],
        "iterations_per_s": measured.iterations_per_s,
        "read_p50_s": quantile(read_s, 0.50),
        "read_p95_s": quantile(read_s, 0.95),
        "read_p99_s": quantile(read_s, 0.99),
        "compute_p50_s": quantile(compute_s, 0.50),
        "bytes_per_s": tally.bytes_transferred / measured.wall_s if measured.wall_s else None,
        "disk_bytes_per_s": list(measured.disk_bytes_per_s) or None,
        "disk_share": measured.disk_share,
        "output_sha256": None if in_force is None else tally.outputs.hexdigest(),
        "settings": {
            "slots": task.n_slots,
            "geometry": geometry.name,
            "d_model": geometry.d_model,
            "d_ff": geometry.d_ff,
            "type": geometry.type.name,
            "layers": task.workload.n_layers,
            "experts_per_layer": task.workload.n_experts,
            "data": None if in_force is None else str(task.data.path),
            **({} if in_force is None else attrs.asdict(in_force)),
        },
    }


def ratios(results: Sequence[Measured]) -> dict[str, float]:
    """Return {"first/other": ratio of iterations per second at the median times} for every policy but the first.

    Policies that have run other numbers of iterations, because they were interrupted, are left out.
    """
    first = results[0]
    return {
        f"{first.policy}/{other.policy}": first.iterations_per_s / other.iterations_per_s
        for other in results[1:]
        if first.iterations_per_s and other.iterations_per_s
        if first.tallies[0].iterations == other.tallies[0].iterations
    }
