"""The draws of a batch: in the trio thread as long as they are quick, else in another one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar, TypeVarTuple

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.sched.sampling import Draw, Drawn

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

INLINE_LOGITS: Final = 1 << 19  # read in a quarter of a millisecond: a way to a thread and back takes as long
SAMPLED_READS: Final = 8  # a draw with a temperature takes as long as so many greedy ones


class InThread(Protocol):
    """Runs a function where it may block; checks for cancellation before and then waits for the end of it."""

    async def __call__(self, sync_fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what `sync_fn(*args)` returns."""


@attrs.frozen(eq=False)
class Row:
    """One row of logits, and the draw that it is for, if it gives a token."""

    logits: npt.NDArray[np.float32]  # [V]
    draw: Draw | None = None


@attrs.frozen
class Answer:
    """Result of a row."""

    finite: bool  # whether all logits are; if not, nothing was drawn
    drawn: Drawn | None = None
    error: Exception | None = None  # why nothing could be drawn


class Draws:
    """Looks through the logits of batches and draws their tokens.

    One thread at a time is used for that, whatever else the program lets threads do.

    Args:
        in_thread: where draws that take long are made.
        inline_logits: most logits of a batch that are read in the trio thread; sampled ones count `SAMPLED_READS`.
    """

    def __init__(self, *, in_thread: InThread | None = None, inline_logits: int = INLINE_LOGITS) -> None:
        own = partial(trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1))  # others may have used up trio's own
        self._in_thread = own if in_thread is None else in_thread
        self._inline_logits = inline_logits

    async def run(self, rows: Sequence[Row]) -> list[Answer]:
        """Return an answer for each row.

        If cancelled, nothing was drawn, or everything is drawn and the answers are returned first: draws are short, and
        change nothing.
        """
        n_logits = sum(len(row.logits) * (SAMPLED_READS if row.draw and not row.draw.greedy else 1) for row in rows)
        if n_logits <= self._inline_logits:
            return answers(rows)
        return await self._in_thread(answers, rows)


def answers(rows: Sequence[Row]) -> list[Answer]:
    """Look through logits and draw; whatever one row's draw raises, the others go on."""
    return [_answer(row) for row in rows]


def _answer(row: Row) -> Answer:
    try:
        if not np.isfinite(row.logits).all():
            return Answer(finite=False)
        return Answer(finite=True, drawn=None if row.draw is None else row.draw.compute())
    except Exception as error:
        return Answer(finite=True, error=error)
