"""How experts are divided between the processor and the copies to the device."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mer.compute.cuda.split import Split, work_bytes

rates = st.floats(1e-12, 1e-6)
sizes = st.lists(st.integers(1, 1 << 30), min_size=1, max_size=8)


@given(sizes, rates, rates, st.integers(0, 1 << 30))
def test_no_other_division_ends_earlier(n_bytes: list[int], host_rate: float, copy_rate: float, already: int) -> None:
    split = Split(host_s_per_byte=host_rate, copy_s_per_byte=copy_rate)
    costs = [work_bytes(size, 1 + 3 * i) for i, size in enumerate(n_bytes)]
    chosen = split.choose(costs, n_bytes, already)

    def end_s(k: int) -> float:
        on_device, on_host = n_bytes[: len(n_bytes) - k], costs[len(n_bytes) - k :]
        return max(host_rate * sum(on_host), copy_rate * (already + sum(on_device)))

    assert end_s(chosen) == min(end_s(k) for k in range(len(n_bytes) + 1))


def test_both_sides_are_measured_first() -> None:
    split = Split()
    assert split.choose([1.0, 1.0, 1.0], [1, 1, 1]) == 2
    assert split.choose([1.0], [1]) == 1
    split.measured(host=(100, 1.0), copy=None)
    assert split.choose([1.0], [1]) == 0
    split.measured(host=None, copy=(100, 4.0))
    assert split.choose([1.0] * 10, [1] * 10) == 8


def test_a_measurement_is_an_average_and_does_not_last_for_ever() -> None:
    split = Split()
    split.measured(host=(100, 1.0), copy=(100, 1.0))
    split.measured(host=(100, 2.0), copy=(100, 1.0))
    assert abs(split.host_s_per_byte - 0.012) < 1e-12
    split.measured(host=(100, 1e9), copy=(100, 1.0))  # the process was stopped meanwhile
    assert split.choose([1.0] * 4, [1] * 4) == 0
    for _ in range(256):
        split.measured(host=None, copy=(100, 1.0))
    assert split.choose([1.0] * 4, [1] * 4) == 2


def test_many_rows_cost_the_processor_more() -> None:
    costs = [work_bytes(1000, rows) for rows in (1, 4, 8, 400)]
    assert costs[0] == costs[1] == 1000
    assert all(a < b for a, b in itertools.pairwise(costs[1:]))
