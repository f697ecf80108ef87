"""Drawing the next token from logits."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final, Literal

import attrs
import numpy as np
import numpy.typing as npt

from mer.config import Sampling
from mer.errors import RequestError

_FEW: Final = 256  # tokens that are all sorted
_HEAD: Final = 4096  # of more, those with this part of the mass or more are sorted: they are at most as many
_SHIFT: Final = 17  # bits of a float32 number below a class: without them exponent and 6 bits of the mantissa are left
_CLASSES: Final = (127 << 23 >> _SHIFT) + 1  # of the numbers from 0 to 1
_PIECE: Final = 1 << 14  # tokens whose weights are counted at once

_Tokens = npt.NDArray[np.int64]
_Float32s = npt.NDArray[np.float32]
_Float64s = npt.NDArray[np.float64]


@attrs.frozen(eq=False)
class Draw:
    """All that one draw depends on, so that any thread may compute it, in whatever batch."""

    logits: _Float32s  # [V], finite; not changed
    sampling: Sampling
    banned: _Tokens  # tokens that are never drawn
    uniform: float  # from 0 to before 1; a greedy draw does not look at it

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is drawn."""
        return self.sampling.temperature == 0

    def compute(self) -> Drawn:
        """Draw; ties of the greedy choice go to the lower number.

        Raises:
            RequestError: every token is banned.
        """
        logits = self.logits
        if self.banned.size:
            logits = logits.copy()
            logits[self.banned] = -np.inf
            if not np.isfinite(logits).any():
                raise RequestError(f"all {len(logits)} tokens of the vocabulary are banned; none is left to draw")
        return Drawn(int(np.argmax(logits)) if self.greedy else _sample(logits, self.sampling, self.uniform))


@attrs.frozen
class Drawn:
    """Result of a draw."""

    token: int


class Sampler:
    """Asks for the draws of one sequence; they depend on its seed and its logits alone.

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
        self._uniform: float | None = None  # of the next draw, once that was asked for

    def next_draw(self, logits: _Float32s) -> Draw:
        """Return the next token's draw from logits [V]; asked again before `took`, it is the same draw."""
        if self._uniform is None and self.sampling.temperature:
            self._uniform = self._rng.random()
        return Draw(logits, self.sampling, self._banned, self._uniform or 0.0)

    def took(self, drawn: Drawn) -> int:
        """Take note that a draw's token goes on the sequence, and return the token."""
        self._uniform = None
        return drawn.token

    def draw(self, logits: _Float32s) -> int:
        """Draw the next token from finite logits [V] at once, and return it.

        Raises:
            RequestError: every token is banned.
        """
        return self.took(self.next_draw(logits).compute())


def _sample(logits: _Float32s, sampling: Sampling, uniform: float) -> int:
    """Return the token at which the distribution function, best token first, passes a number from 0 to 1.

    The filters keep the first tokens of that order, so that the mass of those that they keep is all there is to know of
    them. Sorting a vocabulary of 152 thousand takes 20 ms; `_BestFirst` sorts around the places that are asked for.
    """
    among: _Tokens | None = None
    if 0 < sampling.top_k < len(logits):
        among = _best(logits, sampling.top_k)
        logits = logits[among]
    order = _BestFirst(logits, _weights(logits, sampling.temperature))
    kept = order.total
    if sampling.top_p < 1:
        kept = order.at(sampling.top_p * order.total, "left")[1]
    if sampling.min_p > 0:
        kept = min(kept, order.mass_from(sampling.min_p))
    token = order.at(uniform * kept, "right")[0]
    return token if among is None else int(among[token])


def _weights(logits: _Float32s, temperature: float) -> _Float32s:
    """Return e to the power of logits less the largest, over the temperature; [V], the largest is 1.

    In float32, because NumPy's float64 exponential takes eight times as long; this moves a probability by some
    millionths of itself at most.
    """
    with np.errstate(over="ignore", under="ignore"):
        if 1e-30 < temperature < 1e30:
            exponents: _Float32s = logits - logits.max()  # before dividing: no temperature overflows 0
            exponents /= np.float32(temperature)
        else:  # what float32 cannot divide by
            below = logits.astype(np.float64) - float(logits.max())
            exponents = (below / temperature).astype(np.float32)
        np.exp(exponents, out=exponents)
    return exponents


def _best(logits: _Float32s, n: int) -> _Tokens:
    """Return the n tokens with the largest logits in order of their numbers, of equals the lowest ones."""
    least = np.partition(logits, len(logits) - n)[len(logits) - n]
    above = np.flatnonzero(logits > least)
    return np.sort(np.concatenate([above, np.flatnonzero(logits == least)[: n - len(above)]]))


class _BestFirst:
    """Tokens in order of their logits, the largest first and of equals the lowest number, with their summed weights.

    Only runs of that order are made: the head, with the tokens that have the largest part of the mass of usual logits;
    and after it classes of weights that differ by less than a sixtieth, whose masses are known without sorting.

    Args:
        logits: [V].
        weights: [V], from 0 to 1, in the order of the logits.
    """

    def __init__(self, logits: _Float32s, weights: _Float32s) -> None:
        self._logits, self._weights = logits, weights
        self.total = float(weights.sum(dtype=np.float64))
        self._least = np.float32(self.total / _HEAD) if len(weights) > _FEW else np.float32(0)  # of the head
        self._head = self._run(np.flatnonzero(weights >= self._least), 0.0)
        self._head_mass = float(self._head[1][-1]) if len(self._head[1]) else 0.0
        self._masses: _Float64s | None = None  # see `_class_masses`, made when the head is not enough

    def at(self, mass: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """Return the token where the summed weight reaches ("left") or passes ("right") a mass, and that sum."""
        if mass < self._head_mass or (side == "left" and mass == self._head_mass and self._head_mass):
            tokens, sums = self._head
        else:
            masses = self._class_masses()
            number = int(np.searchsorted(masses, mass, side))
            if number == len(masses):  # by rounding: the last one that is not empty
                number = int(np.searchsorted(masses, masses[-1]))
            tokens, sums = self._class(_CLASSES - 1 - number)
        place = min(int(np.searchsorted(sums, mass, side)), len(sums) - 1)
        return int(tokens[place]), float(sums[place])

    def mass_from(self, weight: float) -> float:
        """Return the summed weight of the tokens that have this weight or more; it is at most 1."""
        if weight >= self._least:
            (tokens, sums), before = self._head, 0.0
        else:
            number = int(np.float32(weight).view(np.int32) >> _SHIFT)
            (tokens, sums), before = self._class(number), self._before(number)
        n = int(np.count_nonzero(self._weights[tokens] >= weight))
        return float(sums[n - 1]) if n else before

    def _class_masses(self) -> _Float64s:
        """Return the summed weight up to and with each class, the class of the largest weights first.

        Made piece by piece: memory for the whole vocabulary at once would come from the system and go back with each
        draw, which takes ten times as long as the counting.
        """
        if self._masses is None:
            each = np.zeros(_CLASSES)
            for start in range(0, len(self._weights), _PIECE):
                weights = self._weights[start : start + _PIECE]
                each += np.bincount(weights.view(np.int32) >> _SHIFT, weights, minlength=_CLASSES)
            self._masses = np.cumsum(each[::-1])
        return self._masses

    def _class(self, number: int) -> tuple[_Tokens, _Float64s]:
        """Return a class's tokens in order and the summed weights up to and with each."""
        least, above = (np.array([number, number + 1], np.int32) << _SHIFT).view(np.float32)
        tokens = np.flatnonzero((self._weights >= least) & (self._weights < above))
        return self._run(tokens, self._before(number))

    def _before(self, number: int) -> float:
        """Return the summed weight of the classes of larger weights."""
        return float(self._class_masses()[-2 - number]) if number < _CLASSES - 1 else 0.0

    def _run(self, tokens: _Tokens, before: float) -> tuple[_Tokens, _Float64s]:
        """Return tokens in order, but for those of no weight, and the summed weights after a mass.

        A logit and a number are sorted as one integer: that takes a tenth of the time of a stable sort of floats.
        """
        tokens = tokens[self._weights[tokens] > 0]
        bits = (np.float32(0) - self._logits[tokens]).view(np.int32).astype(np.int64)  # 0 less 0 has one sign
        bits ^= (bits >> 63) & 0x7FFFFFFF  # so that the bits of negative numbers are in order too
        tokens = np.sort(bits << 32 | tokens) & 0xFFFFFFFF
        return tokens, before + np.cumsum(self._weights[tokens], dtype=np.float64)
