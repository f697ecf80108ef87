"""The counts and latencies of a reader."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.io.metering import LatencyHistogram, ReaderStatistics, ReadMeter
from mer.io.pool import Priority


@settings(deadline=None)
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

    def statistics(now_s: float) -> ReaderStatistics:
        return meter.statistics(now_s, engine="threads", queued_bytes=(1, 2, 3), written_off=4, copies=())

    meter.start(10.0)
    meter.start(11.0)
    meter.land(100, Priority.PREFETCH, 10.0, 12.0, 13.0)
    assert statistics(13.5).busy_s == 3.5
    meter.fail(11.0, 14.0, cancelled=False)
    assert statistics(99.0).busy_s == 4.0
    meter.start(100.0)
    meter.start(100.0)
    meter.fail(100.0, 100.5, cancelled=True)
    s = statistics(101.0)
    assert s.busy_s == 5.0
    assert (s.started, s.landed, s.failed, s.cancelled, s.in_flight, s.bytes_read) == (4, 1, 1, 1, 1, 100)
    assert (s.written_off, s.copies) == (4, ())
    assert [each.queued_bytes for each in s.by_priority] == [1, 2, 3]
    assert [each.landed for each in s.by_priority] == [0, 0, 1]
    assert s.latency_p99_s == pytest.approx(3.0, rel=0.1)
    assert [each.latency_p50_s for each in s.by_priority] == [None, None, pytest.approx(1.0, rel=0.1)]
