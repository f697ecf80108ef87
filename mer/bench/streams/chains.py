"""Per-layer Markov chains with the routing statistics published for Mixtral 8x7B."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

N_LAYERS: Final = 32
N_EXPERTS: Final = 8
TOP_K: Final = 2
FIRST_REPEATS: Final = ((0, 0.017), (15, 0.154), (31, 0.12))
"""(layer, probability that the first choice is forced to be that of the token before), linear between them."""
SECOND_REPEATS: Final = ((0, 0.0), (15, 0.22), (31, 0.0))
"""(layer, probability that the second choice is forced to be one of the two of the token before)."""
_SLOPE: Final = 0.17  # weights of a layer's experts, from most to least popular, fall evenly from 1 + this to 1 - this


def mixtral_chains(n_tokens: int, *, seed: int = 0, n_layers: int = N_LAYERS) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield (layer, experts) events of `n_tokens` tokens, layer by layer; the first choice is named first.

    Every layer is a separate chain over ordered pairs. Both choices are drawn by popularity without replacement,
    except that the first is, with the layer's probability, the first choice of the token before, and the second, with
    another, one of the two experts of the token before (a free one, each as likely). Which experts are popular is
    shuffled for each layer by the seed. `n_layers` other than 32 stretches the profile over them.
    """
    rng = np.random.default_rng(seed)
    places = np.linspace(0, N_LAYERS - 1, n_layers)
    first_repeats, second_repeats = (
        np.interp(places, *np.transpose(points)).tolist() for points in (FIRST_REPEATS, SECOND_REPEATS)
    )
    weights = [rng.permutation(np.linspace(1 + _SLOPE, 1 - _SLOPE, N_EXPERTS)).tolist() for _ in range(n_layers)]
    before: list[tuple[int, int] | None] = [None] * n_layers
    for _ in range(n_tokens):
        draws = rng.random((n_layers, 4)).tolist()
        for layer, (repeat_first, pick_first, repeat_second, pick_second) in enumerate(draws):
            old = before[layer]
            if old is not None and repeat_first < first_repeats[layer]:
                first = old[0]
            else:
                first = _pick(weights[layer], range(N_EXPERTS), pick_first)
            if old is not None and repeat_second < second_repeats[layer]:
                free = [expert for expert in old if expert != first]
                second = free[int(pick_second * len(free))]
            else:
                second = _pick(weights[layer], [e for e in range(N_EXPERTS) if e != first], pick_second)
            before[layer] = first, second
            yield layer, (first, second)


def _pick(weights: list[float], experts: range | list[int], u: float) -> int:
    """Return one of the experts by weight, for `u` uniform in [0, 1)."""
    left = u * sum(weights[expert] for expert in experts)
    for expert in experts:
        left -= weights[expert]
        if left < 0:
            return expert
    return experts[-1]
