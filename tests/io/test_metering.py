"""The counts and latencies of a reader."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.io.metering import LatencyHistogram, ReadMeter


@given(st.lists(st.floats(1e-6, 900), min_size=1), st.floats(0.001, 1))
def test_a_quantile_is_at_most_a_bucket_above_the_true_one(durations: list[float], q: float) -> None:
    histogram = LatencyHistogram()
    for seconds in durations:
        histogram.add(seconds)
    true = sorted(durations)[max(1, math.ceil(q * len(durations))) - 1]
    got = histogram.quantile(q)
    assert got is not None
    assert true * (1 - 1e-9) <= got <= true * 2 ** (1 / 8) * (1 + 1e-9)


def test_durations_out_of_range_count_at_the_edges() -> None:
    histogram = LatencyHistogram()
    assert histogram.quantile(0.5) is None
    histogram.add(0.0)
    assert histogram.quantile(1.0) == 1e-6
    histogram.add(1e9)
    assert histogram.quantile(1.0) == pytest.approx(2**30 * 1e-6)


def test_busy_time_is_the_time_with_something_in_flight() -> None:
    meter = ReadMeter()
    meter.start(10.0)
    meter.start(11.0)
    meter.end(100, 10.0, 13.0, failed=False)
    assert meter.statistics(13.5).busy_s == 3.5
    meter.end(50, 11.0, 14.0, failed=True)
    assert meter.statistics(99.0).busy_s == 4.0
    meter.start(100.0)
    s = meter.statistics(101.0)
    assert s.busy_s == 5.0
    assert (s.started, s.landed, s.failed, s.in_flight, s.bytes_read) == (3, 1, 1, 1, 100)
