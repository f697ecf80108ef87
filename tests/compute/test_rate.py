"""The measured speed of a place."""

from __future__ import annotations

import pytest

from mer.compute.rate import Rate


def test_a_rate_is_a_running_average() -> None:
    rate = Rate()
    assert rate.seconds([100]) is None
    rate.measured(100, 1.0)
    assert rate.seconds([100, 0, 50]) == pytest.approx([1.0, 0.0, 0.5])
    rate.measured(50, 1.0)
    assert rate.seconds([100]) == pytest.approx([1.2])
    rate.measured(100, 0.0)  # shorter than the clock can tell
    assert rate.seconds([100]) == pytest.approx([0.96])


def test_a_rate_that_nothing_confirms_is_measured_again() -> None:
    """It may have been slow once; then nobody gives it work by which it could show that it is not."""
    rate = Rate()
    rate.measured(1, 1e9)  # the process was stopped meanwhile
    assert all(rate.seconds([1]) == [1e9] for _ in range(256))
    assert rate.seconds([1]) is None
    rate.measured(1, 2.0)
    assert all(rate.seconds([1]) == [2.0] for _ in range(255))
    rate.measured(1, 2.0)
    assert all(rate.seconds([1]) == [2.0] for _ in range(256))
    assert rate.seconds([1]) is None
