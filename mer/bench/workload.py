"""Workloads of the streaming benchmark: a synthetic stream, or a recorded routing trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import attrs

from mer.bench.streams import article, skewed
from mer.errors import ConfigError
from mer.sched.simulate import Event
from mer.sched.trace import TraceReader

DEFAULT_ITERATIONS: Final = 500
MAX_ITERATIONS: Final = 1_000_000

_STREAMS: Final[dict[str, tuple[Callable[[int], Iterator[tuple[int, ...]]], int]]] = {
    "article": (article.article_stream, article.N_EXPERTS),
    "skewed": (skewed.skewed_stream, skewed.N_EXPERTS),
}
"""{name: (generator, number of experts)}"""


@attrs.frozen(kw_only=True)
class Workload:
    """A sequence of iterations, each of which uses some experts of one layer."""

    name: str  # of a synthetic stream, or the path of a trace
    n_layers: int  # L; 1 for the synthetic streams, whose experts are one flat list
    n_experts: int  # E, per layer
    events: tuple[Event, ...]  # one per iteration, at least one
    lost_bytes: int = 0  # of an unfinished block at the end of a trace

    @property
    def lookups(self) -> int:
        """Experts looked up in all iterations."""
        return sum(len(experts) for _, experts in self.events)

    @property
    def widest(self) -> int:
        """The most experts that one iteration uses."""
        return max(len(experts) for _, experts in self.events)

    def flat(self) -> Iterator[tuple[int, ...]]:
        """Yield the experts of each iteration as numbers in one list of L x E, layer after layer."""
        for layer, experts in self.events:
            yield tuple(layer * self.n_experts + expert for expert in experts)


def load_workload(stream: str, n_iterations: int | None) -> Workload:
    """Return a workload by the name of a synthetic stream, or by the path of a routing trace.

    Args:
        stream: "article", "skewed", or a path.
        n_iterations: how many; by default 500 of a synthetic stream and all of a trace. A shorter trace is
            replayed once, to its end.

    Raises:
        ConfigError: `n_iterations` is out of range, there is neither such a stream nor such a file, or a trace is
            empty.
        TraceError: the file is no routing trace, or is damaged.
    """
    if n_iterations is not None and not 1 <= n_iterations <= MAX_ITERATIONS:
        raise ConfigError(f"--iterations {n_iterations}: write a number from 1 to {MAX_ITERATIONS}")
    if stream in _STREAMS:
        generator, n_experts = _STREAMS[stream]
        sets = generator(n_iterations or DEFAULT_ITERATIONS)
        return Workload(name=stream, n_layers=1, n_experts=n_experts, events=tuple((0, ids) for ids in sets))
    return _load_trace(stream, n_iterations or MAX_ITERATIONS)


def _load_trace(stream: str, most: int) -> Workload:
    try:
        is_file = Path(stream).is_file()
    except (OSError, ValueError):  # no file can have such a name
        is_file = False
    if not is_file:
        raise ConfigError(
            f"--stream {stream!r} is neither the path of a routing trace nor one of {', '.join(_STREAMS)}; "
            "`mer run --trace FILE` records a trace"
        )
    with TraceReader(stream) as reader:
        events: tuple[Event, ...] = tuple((event.layer, event.experts) for event in islice(reader, most))
        header, lost_bytes = reader.header, reader.lost_bytes
    if not events:
        raise ConfigError(f"--stream {stream!r}: this trace has no events; record one of at least one token")
    return Workload(
        name=stream, n_layers=header.n_layers, n_experts=header.n_experts, events=events, lost_bytes=lost_bytes
    )
