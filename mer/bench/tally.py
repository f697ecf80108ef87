"""Counts of a run of the streaming benchmark so far."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from mer.compute.messages import Float32Array


def _ignore(_iterations: int) -> None:
    pass


@attrs.define(kw_only=True, eq=False)
class Tally:
    """Counts and times of all iterations that have ended; kept up to date, so that an interrupted run has one, too."""

    iterations: int = 0
    lookups: int = 0
    hits: int = 0
    reads: int = 0  # experts whose reads have begun, prefetched ones included
    prefetches: int = 0  # of them
    prefetches_used: int = 0  # hit before they were evicted
    bytes_read: int = 0  # of weights
    bytes_transferred: int = 0  # with what alignment adds to both ends of a read
    wall_s: float = 0.0
    read_s: list[float] = attrs.Factory(list)  # of each expert read: from its start to its last byte
    compute_s: list[float] = attrs.Factory(list)  # of each iteration
    on_iteration: Callable[[int], None] = _ignore  # called with the iterations so far, after each
    outputs: Any = attrs.Factory(hashlib.sha256)  # of the outputs of all iterations, float32 little-endian

    def end_iteration(self, output: Float32Array, compute_s: float, wall_s: float) -> None:
        """Count an iteration whose output is there."""
        self.iterations += 1
        self.outputs.update(output.astype("<f4").tobytes())
        self.compute_s.append(compute_s)
        self.wall_s = wall_s
        self.on_iteration(self.iterations)

    @property
    def hit_rate(self) -> float:
        """Hits per lookup, 0 without lookups."""
        return self.hits / self.lookups if self.lookups else 0.0


def quantile(values: Sequence[float], q: float) -> float | None:
    """Return the smallest value that at least a share `q` of the values does not exceed, 0 < q <= 1; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
