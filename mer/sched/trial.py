"""Finding out online whether something pays, by doing with and without it in turns."""

from __future__ import annotations

import enum
import math
from typing import Final

import attrs

BLOCK_PASSES: Final = 4
"""Passes of a block; the first after a change is not measured, as it still feels what was before."""
ORDER: Final = (False, True, True, False, True, False, False, True)
"""With or without, block by block of a round: drifts of first and second order cancel (Prouhet, Thue and Morse)."""
MAX_ROUNDS: Final = 8
"""A trial that is undecided after so many rounds is a tie."""
PATIENCE: Final = 32
"""Passes in a row without anything to do after which it is allowed only now and then: looking has its price too."""
PASSES_PER_LOOK: Final = 8
"""Of which it is allowed in one, from then on."""
PROBING: Final = 0.05
"""Share of the passes that may go to what the verdict is against, but for the first trial."""
MAX_DOUBLINGS: Final = 5
"""Of the time between trials that end alike."""
_MARGIN: Final = 0.01  # share of the cost by which the winner must be cheaper
_SURE: Final = 2.0  # standard errors by which it must be
_DISASTER: Final = 2.0  # times the cost without at which a trial ends at once


class _State(enum.Enum):
    ARMED = enum.auto()  # allowed; the next pass in which it does something begins the trial
    TRIAL = enum.auto()
    VERDICT = enum.auto()  # until the next trial


@attrs.define
class _Arm:
    """Costs of the measured passes of one side."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def add(self, cost: float) -> None:
        self.n += 1
        step = cost - self.mean
        self.mean += step / self.n
        self.squares += step * (cost - self.mean)

    @property
    def variance_of_mean(self) -> float:
        return self.squares / (self.n * (self.n - 1)) if self.n > 1 else math.inf


class Trial:
    """Decides pass by pass whether something that may or may not pay is allowed, by what passes cost with and without.

    It begins with a trial as soon as there is something to try, for which it looks all the time at first, later in one
    pass of eight. A trial is blocks of passes with and without in a balanced order,
    in rounds, until the difference is clear. What is tried wins only if it is cheaper by more than 1 % and by more
    than two standard errors; whatever else comes out, a tie or a doubt, is a verdict against it. A round that makes it
    look dearer than one standard error ends a trial, and so does a block that costs twice as much as without it.

    The next trial comes after 20 times as many passes as the last one took from the side that has the verdict, and
    twice as many for each further trial that ended alike, at most 32 times. So of n passes under verdicts against it
    at most 5 % n + 129 are with it, and the same holds the other way round.

    Pure and deterministic. The costs may have any unit, and must be comparable between passes.
    """

    def __init__(self) -> None:
        self.verdict: bool | None = None
        """None until the first trial has ended."""
        self.allowed = True
        """Whether it is allowed in the running pass."""
        self.trials = 0
        """How many have ended with a verdict."""
        self._state = _State.ARMED
        self._arms = {False: _Arm(), True: _Arm()}
        self._block = _Arm()
        self._at = 0  # passes of the running round
        self._rounds = 0
        self._acted = False  # something was done in the running round
        self._spent = {False: 0, True: 0}  # passes of the trial on each side
        self._left = 0  # passes until the next trial
        self._waited = 0  # passes in which it was allowed and there was nothing to do
        self._alike = 0  # trials in a row that ended like the last one

    def end_pass(self, cost: float, *, acted: bool) -> None:
        """Note what a pass has cost, and decide on the next one.

        Args:
            cost: finite; lower is better.
            acted: whether what is tried has done anything in this pass.

        Raises:
            ValueError: the cost is not finite.
        """
        if not math.isfinite(cost):
            raise ValueError(f"the cost of a pass must be finite, not {cost}")
        if self._state is _State.TRIAL:
            self._measure(cost, acted)
        elif self._state is _State.ARMED:
            if acted:
                self._begin()
            else:
                self._waited += 1
                self.allowed = self._waited < PATIENCE or self._waited % PASSES_PER_LOOK == 0
        else:
            self._left -= 1
            if self._left <= 0:
                self._arm()

    def _arm(self) -> None:
        self._state = _State.ARMED
        self.allowed = True
        self._waited = 0

    def _begin(self) -> None:
        self._state = _State.TRIAL
        self._arms = {False: _Arm(), True: _Arm()}
        self._block = _Arm()
        self._at = self._rounds = 0
        self._acted = False
        self._spent = {False: 0, True: 1}
        self.allowed = ORDER[0]

    def _measure(self, cost: float, acted: bool) -> None:
        """Let a pass of a trial count."""
        side = self.allowed
        self._spent[side] += 1
        self._acted = self._acted or acted
        number, in_block = divmod(self._at, BLOCK_PASSES)
        if in_block or (number and ORDER[number - 1] == side):
            self._arms[side].add(cost)
            self._block.add(cost)
        self._at += 1
        if in_block == BLOCK_PASSES - 1:
            without = self._arms[False]
            if side and self._block.mean > _DISASTER * without.mean > 0.0:
                self._decide(False)
                return
            self._block = _Arm()
            if number == len(ORDER) - 1:
                self._end_round()
                return
            self.allowed = ORDER[number + 1]

    def _end_round(self) -> None:
        """End the trial if it is clear, or go on."""
        if not self._acted and not self._rounds:  # nothing was tried: neither for nor against
            self._arm()
            return
        without, within = self._arms[False], self._arms[True]
        gain = without.mean - within.mean
        error = math.sqrt(without.variance_of_mean + within.variance_of_mean)
        self._rounds += 1
        if gain > _SURE * error and gain > _MARGIN * without.mean:
            self._decide(True)
        elif gain <= -error or (gain <= 0.0 and error == 0.0) or self._rounds == MAX_ROUNDS or not self._acted:
            self._decide(False)
        else:
            self._at = 0
            self._acted = False
            self.allowed = ORDER[0]

    def _decide(self, verdict: bool) -> None:
        self._alike = self._alike + 1 if verdict == self.verdict else 0
        self.verdict = self.allowed = verdict
        self.trials += 1
        self._state = _State.VERDICT
        self._left = math.ceil(self._spent[not verdict] / PROBING) << min(self._alike, MAX_DOUBLINGS)
