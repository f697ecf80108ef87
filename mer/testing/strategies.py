"""Strategies of hypothesis for models, callers, faults and whole worlds; see `mer.testing.world`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from hypothesis import strategies as st

from mer.testing.drawing import (
    Source,
    draw_features,
    draw_model,
    draw_profile,
    draw_read_faults,
    draw_request,
    draw_worker_faults,
    draw_world,
)
from mer.testing.simdisk import DiskProfile
from mer.testing.simworker import SimModel
from mer.testing.world import FAULTS, Feature, ReadFault, SimRequest, SimWorld, WorkerFaults

T = TypeVar("T")

ALL = tuple(Feature)


class _HypothesisSource:
    """Choices that hypothesis makes, shrinks and replays."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, least: int, most: int) -> int:
        """See `Source`."""
        return self._draw(st.integers(least, most))

    def choice(self, values: Sequence[T]) -> T:
        """See `Source`."""
        return self._draw(st.sampled_from(values))


def drawn(function: Callable[[Source], T]) -> st.SearchStrategy[T]:
    """Return the strategy of what `function` draws; it shrinks towards the least numbers and the first choices.

    For worlds of your own: write a function of a `Source`, and draw from it by seed with `RandomSource` too.
    """

    @st.composite
    def strategy(draw: st.DrawFn) -> T:
        return function(_HypothesisSource(draw))

    return strategy()


def features(among: Collection[Feature] = ALL) -> st.SearchStrategy[frozenset[Feature]]:
    """Return sets of some of the features."""
    return drawn(lambda source: draw_features(source, among))


def models() -> st.SearchStrategy[SimModel]:
    """Return shapes of small models."""
    return drawn(draw_model)


def disk_profiles(among: Collection[Feature] = ALL) -> st.SearchStrategy[DiskProfile]:
    """Return how a drive performs: fast or slow, even or not, with or without stalls."""
    return drawn(lambda source: draw_profile(source, draw_features(source, among)))


def disk_faults(
    model: SimModel, *, n_copies: int = 1, hanging: bool = False
) -> st.SearchStrategy[tuple[ReadFault, ...]]:
    """Return reads of a model's experts that fail some times or for ever; often none.

    Args:
        model: whose experts.
        n_copies: of its files; a fault concerns one of them or all.
        hanging: whether there are reads that never return too; their `errno` is None. The engine gives them up after
            its read deadline, but their slots come back only when `SimDisk.heal` and `SimDisk.let_return` are called.
    """
    among = FAULTS if hanging else FAULTS - {Feature.HANGING_READS}
    return drawn(lambda source: draw_read_faults(source, model, draw_features(source, among), n_copies))


def worker_faults() -> st.SearchStrategy[WorkerFaults]:
    """Return jobs that fail and tokens that make NaN; often none."""
    return drawn(lambda source: draw_worker_faults(source, draw_features(source, FAULTS)))


def requests(among: Collection[Feature] = ALL, *, max_prompt: int = 20) -> st.SearchStrategy[SimRequest]:
    """Return callers: when they come, what they ask for, how fast they read, and whether they leave early.

    Args:
        among: the features that they may have, each on or off.
        max_prompt: tokens of the longest prompt.
    """
    return drawn(lambda source: draw_request(source, draw_features(source, among), max_prompt=max_prompt))


def worlds(among: Collection[Feature] = ALL) -> st.SearchStrategy[SimWorld]:
    """Return whole worlds: an engine's configuration, its faults and its callers.

    Args:
        among: the features that a world may have, each on or off.
    """
    return drawn(lambda source: draw_world(source, draw_features(source, among)))
