"""The synthetic streams: golden ids, and the statistics they are made to have."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from mer.bench.streams import chains
from mer.bench.streams.article import article_stream
from mer.bench.streams.skewed import skewed_stream, splitmix64

Stream = Callable[..., Iterator[tuple[int, ...]]]


@pytest.mark.parametrize(
    ("stream", "first", "digest"),
    [
        (
            article_stream,
            [(154, 250), (26, 130), (98, 78), (34, 2), (222, 90), (123, 114), (111, 115), (35, 88)],
            "8a32993b47dec2cd7aeda4329d271014b60f0255271ea25d5e05c7804a257890",
        ),
        (
            skewed_stream,
            [(112, 213), (215, 6), (145, 215), (112, 215), (112, 215), (112, 215), (245, 215), (245, 215)],
            "414bd74705b6849954a05c90c9f95cbc4ff7a82e8f06dd0ee35585f287f117f8",
        ),
    ],
    ids=["article", "skewed"],
)
def test_golden_ids(stream: Stream, first: list[tuple[int, int]], digest: str) -> None:
    ids = list(stream(10_000))
    assert ids[:8] == first
    assert hashlib.sha256(bytes(expert for pair in ids for expert in pair)).hexdigest() == digest


@pytest.mark.parametrize("stream", [article_stream, skewed_stream])
def test_a_stream_is_the_beginning_of_every_longer_one(stream: Stream) -> None:
    assert list(stream(50)) == list(stream(500))[:50]
    assert list(stream(0)) == []
    assert list(stream(20, seed=1)) != list(stream(20, seed=2))


@pytest.mark.parametrize("stream", [article_stream, skewed_stream])
def test_the_experts_of_an_iteration_differ(stream: Stream) -> None:
    assert all(a != b and 0 <= min(a, b) <= max(a, b) < 256 for a, b in stream(2000, seed=3))


def test_article_picks_stay_in_the_cluster() -> None:
    """0.9 of the weight is in the cluster of the first pick before; +- 4 standard deviations of 10,000 draws."""
    ids = list(article_stream(10_000))
    stayed = [after[0] % 4 == before[0] % 4 for before, after in itertools.pairwise(ids)]
    assert np.mean(stayed) == pytest.approx(0.9, abs=4 * 0.003)
    by_cluster = Counter(pick % 4 for pick, _ in ids)
    assert set(by_cluster) == {0, 1, 2, 3}
    assert len({pick for pair in ids for pick in pair}) == 256


def test_skewed_iterations_repeat_and_follow_zipf() -> None:
    ids = list(skewed_stream(10_000))
    fresh = [ids[0], *(after for before, after in itertools.pairwise(ids) if after != before)]
    assert len(fresh) / len(ids) == pytest.approx(0.3, abs=0.02)  # 0.7 repeat; a few draws repeat by chance
    weights = 1.0 / np.arange(1, 257) ** 1.2
    most = Counter(pick for pick, _ in fresh).most_common(2)
    assert most[0][1] / len(fresh) == pytest.approx(weights[0] / weights.sum(), abs=0.04)
    assert most[0][1] > 1.5 * most[1][1]


def test_splitmix64_of_seed_zero() -> None:
    """The first number for seed 0 is in the documentation of Java's SplittableRandom and of many ports."""
    assert next(splitmix64(0)) == 0xE220A8397B1DCDAF


@functools.cache
def long_chains() -> list[tuple[int, tuple[int, ...]]]:
    return list(chains.mixtral_chains(10_000, seed=1))


@pytest.mark.parametrize(
    ("layer", "any_repeats", "first_repeats"),
    [(0, (0.45, 0.50), (0.13, 0.15)), (15, (0.62, 0.67), (0.24, 0.28)), (31, (0.44, 0.54), (0.20, 0.26))],
)
def test_chains_have_the_repeat_rates_of_mixtral(
    layer: int, any_repeats: tuple[float, float], first_repeats: tuple[float, float]
) -> None:
    sets = [experts for number, experts in long_chains() if number == layer]
    pairs = list(itertools.pairwise(sets))
    either = np.mean([bool(set(before) & set(after)) for before, after in pairs])
    first = np.mean([before[0] == after[0] for before, after in pairs])
    assert any_repeats[0] - 0.01 <= either <= any_repeats[1] + 0.01
    assert first_repeats[0] - 0.01 <= first <= first_repeats[1] + 0.01


def test_chains_have_mixtrals_popularity_and_order() -> None:
    events = list(chains.mixtral_chains(3000, seed=2))
    assert [layer for layer, _ in events[:64]] == [*range(32), *range(32)]
    assert all(len(experts) == len(set(experts)) == 2 for _, experts in events)
    counts = sorted(Counter((layer, e) for layer, experts in events for e in experts).values(), reverse=True)
    uses = sum(counts)
    assert sum(counts[:56]) / uses == pytest.approx(0.252, abs=0.015)  # the best 21.9 % of 256
    assert sum(counts[:125]) / uses == pytest.approx(0.530, abs=0.015)  # the best 48.8 %
    assert list(chains.mixtral_chains(5, seed=2)) == events[: 5 * 32]
    assert list(chains.mixtral_chains(5, seed=3)) != events[: 5 * 32]
