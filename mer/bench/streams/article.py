"""The clustered stream: experts come in clusters, and the next pick mostly stays in the cluster of the last."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Final

from mer.bench.streams.chacha import chacha12_u64, expand_seed

N_EXPERTS: Final = 256
TOP_K: Final = 2
SEED: Final = 12_648_430
_CLUSTERS: Final = 4  # the cluster of an expert is its number modulo this
_STAY: Final = 0.9  # probability of a pick inside the cluster


def article_stream(n_iterations: int, *, seed: int = SEED) -> Iterator[tuple[int, ...]]:
    """Yield the experts of each iteration, `TOP_K` different ones of `N_EXPERTS`, in the order they are picked.

    A pick follows the row of a Markov chain whose state is the first pick of the iteration before: `_STAY` is spread
    evenly over the cluster of the state, the rest over all others; the first row of all is uniform. Picks of one
    iteration are drawn without replacement.
    """
    uniform = chacha12_u64(expand_seed(seed))
    rows = [_normalized([_weight(cluster, expert) for expert in range(N_EXPERTS)]) for cluster in range(_CLUSTERS)]
    row = _normalized([1.0 / N_EXPERTS] * N_EXPERTS)
    for _ in range(n_iterations):
        weights, picks = row.copy(), []
        for number in islice(uniform, TOP_K):
            cumulative = list(accumulate(weights))
            u = (number >> 12) / 2.0**52 * cumulative[-1]
            picks.append(bisect_right(cumulative, u, hi=N_EXPERTS - 1))
            weights[picks[-1]] = 0.0
        yield tuple(picks)
        row = rows[picks[0] % _CLUSTERS]


def _weight(cluster: int, expert: int) -> float:
    inside = N_EXPERTS // _CLUSTERS
    return _STAY / inside if expert % _CLUSTERS == cluster else (1.0 - _STAY) / (N_EXPERTS - inside)


def _normalized(row: list[float]) -> list[float]:
    total = sum(row)
    return [weight / total for weight in row]
