"""The skewed stream: a few experts are far more popular than the rest, and sets repeat."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

N_EXPERTS: Final = 256
TOP_K: Final = 2
SEED: Final = 42
_EXPONENT: Final = 1.2  # of Zipf's law
_REPEAT: Final = 0.7  # probability that an iteration repeats the set before it
_MASK: Final = (1 << 64) - 1


def splitmix64(seed: int) -> Iterator[int]:
    """Yield the 64-bit numbers of SplitMix64 (G. L. Steele et al., "Fast splittable generators", 2014), without end."""
    state = seed & _MASK
    while True:
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
        yield z ^ z >> 31


def skewed_stream(n_iterations: int, *, seed: int = SEED) -> Iterator[tuple[int, ...]]:
    """Yield the experts of each iteration, `TOP_K` different ones of `N_EXPERTS`, in the order they are picked.

    With probability `_REPEAT` an iteration repeats the one before it. Otherwise ranks are drawn after Zipf's law until
    they are different; which expert has which rank is shuffled by the seed.
    """
    ids = _shuffled(splitmix64(seed ^ 0xD1B54A32D192ED03))
    weights = [1.0 / (rank + 1) ** _EXPONENT for rank in range(N_EXPERTS)]
    total = sum(weights)
    cumulative = list(accumulate(weight / total for weight in weights))
    uniform = ((number >> 11) / 2.0**53 for number in splitmix64(seed + 0x12345678))
    picks: tuple[int, ...] = ()
    for _ in range(n_iterations):
        if not picks or next(uniform) >= _REPEAT:
            fresh: list[int] = []
            while len(fresh) < TOP_K:
                expert = ids[bisect_left(cumulative, next(uniform), hi=N_EXPERTS - 1)]
                if expert not in fresh:
                    fresh.append(expert)
            picks = tuple(fresh)
        yield picks


def _shuffled(numbers: Iterator[int]) -> list[int]:
    """Return all expert numbers in an order that `numbers` decide (Fisher-Yates, from the last place down)."""
    ids = list(range(N_EXPERTS))
    for last in range(N_EXPERTS - 1, 0, -1):
        other = next(numbers) % (last + 1)
        ids[last], ids[other] = ids[other], ids[last]
    return ids
