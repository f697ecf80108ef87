"""Figures of a whole-model benchmark: rounds, their mean and standard deviation, and the limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from mer.bench.cases import Case

BACKEND: Final = "CPU"


@attrs.frozen(kw_only=True)
class Counts:
    """What has been counted up to a moment, or between two; shares of a batch make fractions."""

    time_s: float = 0.0
    batches: float = 0
    hits: float = 0
    misses: float = 0
    bytes_read: float = 0
    reading_s: float = 0.0  # in which at least one read was in flight
    stalled_s: float = 0.0  # in which the scheduler waited for experts and had nothing to compute
    compute_s: float = 0.0

    def since(self, earlier: Counts) -> Counts:
        """Return what came between an earlier moment and this one."""
        return Counts(**{name: value - getattr(earlier, name) for name, value in attrs.asdict(self).items()})

    def towards(self, later: Counts, share: float) -> Counts:
        """Return the moment that lies a share of the way from this one to a later one."""
        between = attrs.asdict(later.since(self))
        return Counts(**{name: value + share * between[name] for name, value in attrs.asdict(self).items()})


@attrs.frozen(kw_only=True)
class Round:
    """One round of one case."""

    n_tokens: int
    first_token_s: float  # from submission to the first token; the tokens at the depth included
    counts: Counts  # while the tokens that are measured were computed

    @property
    def tokens_per_s(self) -> float:
        """The tokens by the time they took."""
        return self.n_tokens / max(self.counts.time_s, 1e-9)


@attrs.frozen(kw_only=True)
class Limits:
    """What the machine gives to the plainest work, in bytes per second: probed before all cases, and after."""

    memory_bytes_per_s: tuple[float, ...] = ()
    disk_bytes_per_s: tuple[float, ...] = ()


@attrs.frozen(kw_only=True)
class Setup:
    """What the rounds ran on."""

    model: str
    path: str
    size_bytes: int  # of all tensors
    kernels: str
    threads: int
    memory_bytes: int
    lookup_bytes: float  # of one expert
    dense_bytes: int  # that every batch touches
    compile_s: float  # compiling kernels, or loading those compiled before
    load_s: float  # from opening to ready, compile_s included
    settings: Mapping[str, Any]


@attrs.define(kw_only=True)
class Measured:
    """A case and its rounds so far."""

    case: Case
    setup: Setup
    rounds: list[Round] = attrs.Factory(list)


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation, which one value alone does not have."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def describe(measured: Measured, limits: Limits, *, interrupted: bool = False) -> dict[str, Any]:
    """Return the figures of one case as JSON-ready values; it has at least one round.

    Rates of bytes and shares are over all rounds together; what was not measured is None.
    """
    case, setup, rounds = measured.case, measured.setup, measured.rounds
    counts = [one.counts for one in rounds]
    mean, sd = mean_sd([one.tokens_per_s for one in rounds])
    took_s, hits = sum(one.time_s for one in counts), sum(one.hits for one in counts)
    lookups = hits + sum(one.misses for one in counts)
    read, reading_s = sum(one.bytes_read for one in counts), sum(one.reading_s for one in counts)
    touched_per_s = sum(weights_bytes(one, setup) for one in counts) / max(took_s, 1e-9)
    read_per_s = _ratio(read, reading_s) if read else None
    memory_rate = statistics.fmean(limits.memory_bytes_per_s) if limits.memory_bytes_per_s else None
    disk_rate = statistics.fmean(limits.disk_bytes_per_s) if limits.disk_bytes_per_s else None
    return {
        "program": "mer",
        "model": setup.model,
        "path": setup.path,
        "size_bytes": setup.size_bytes,
        "backend": BACKEND,
        "kernels": setup.kernels,
        "threads": setup.threads,
        "memory_bytes": setup.memory_bytes,
        "test": case.name,
        "depth": case.depth,
        "n_tokens": case.n_tokens,
        "tokens_per_s": mean,
        "tokens_per_s_sd": sd,
        "weights_bytes_per_s": touched_per_s,
        "memory_rate_share": _ratio(touched_per_s, memory_rate),
        "hit_rate": _ratio(hits, lookups),
        "read_bytes_per_token": read / (case.n_tokens * len(rounds)),
        "read_bytes_per_s": read_per_s,
        "disk_rate_share": None if read_per_s is None else _ratio(read_per_s, disk_rate),
        "first_token_s": statistics.fmean(one.first_token_s for one in rounds),
        "compile_s": setup.compile_s,
        "load_s": setup.load_s,
        "memory_bytes_per_s": list(limits.memory_bytes_per_s),
        "disk_bytes_per_s": list(limits.disk_bytes_per_s),
        "interrupted": interrupted,
        "rounds": [
            {"tokens_per_s": one.tokens_per_s, "first_token_s": one.first_token_s}
            | attrs.asdict(one.counts)
            | {"weights_bytes": weights_bytes(one.counts, setup)}
            for one in rounds
        ],
        "settings": dict(setup.settings),
    }


def weights_bytes(counts: Counts, setup: Setup) -> float:
    """Return the bytes of weights that were touched: those of every expert looked up, and the dense ones per batch."""
    return (counts.hits + counts.misses) * setup.lookup_bytes + counts.batches * setup.dense_bytes
