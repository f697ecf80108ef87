"""Drawing the next token from logits."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from mer.config import Sampling
from mer.errors import RequestError


class Sampler:
    """Draws tokens for one sequence; the draws depend on its seed and its logits alone.

    One uniform number of NumPy's PCG64 is used per drawn token; greedy sampling uses none.

    Args:
        sampling: the parameters.
        banned: tokens that are never drawn.
    """

    def __init__(self, sampling: Sampling, banned: Iterable[int] = ()) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._banned = np.fromiter(banned, np.int64)
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the next token for finite logits [V]; ties of the greedy choice go to the lower number.

        Raises:
            RequestError: every token is banned.
        """
        s = self.sampling
        if self._banned.size:
            logits = logits.copy()
            logits[self._banned] = -np.inf
            if not np.isfinite(logits).any():
                raise RequestError(f"all {len(logits)} tokens of the vocabulary are banned; none is left to draw")
        if s.temperature == 0:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")
        if s.top_k:
            order = order[: s.top_k]
        below = logits[order].astype(np.float64) - logits[order[0]]  # before dividing: no temperature overflows 0
        with np.errstate(over="ignore"):
            p = np.exp(below / s.temperature)
        p /= p.sum()
        kept = int(np.searchsorted(np.cumsum(p), s.top_p)) + 1 if s.top_p < 1 else len(p)
        kept = min(kept, int(np.count_nonzero(p >= s.min_p * p[0])))
        cumulative = np.cumsum(p[:kept])
        index = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(order[min(index, kept - 1)])
