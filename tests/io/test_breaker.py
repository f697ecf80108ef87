"""The circuit breaker against a plain list of what has happened to it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.io.breaker import CircuitBreaker


def test_it_opens_after_so_many_failures_in_a_row_and_doubles_its_cool_down() -> None:
    breaker = CircuitBreaker(failures=3, cool_down_s=2.0, longest_s=7.0)
    for now_s in (0.0, 1.0):
        breaker.failed(now_s)
        assert breaker.closed
    breaker.succeeded()
    for now_s in (2.0, 3.0, 4.0):
        assert breaker.allows(now_s)
        breaker.failed(now_s)
    assert (breaker.closed, breaker.openings, breaker.failures_in_a_row) == (False, 1, 3)
    opened_s = 4.0
    for cool_down_s in (2.0, 4.0, 7.0, 7.0):
        assert breaker.next_try_s(opened_s + 0.5) == cool_down_s - 0.5
        assert not breaker.allows(opened_s + cool_down_s - 0.01)
        opened_s += cool_down_s
        assert breaker.allows(opened_s)
        assert breaker.begin()
        assert not breaker.allows(opened_s)  # one probe at a time
        assert not breaker.begin()
        breaker.failed(opened_s, probe=True)
    breaker.drop_probe()
    opened_s += 7.0
    assert breaker.begin()
    breaker.drop_probe()  # nothing was found out: the next use is a probe
    assert breaker.allows(opened_s)
    assert breaker.begin()
    breaker.succeeded()
    assert breaker.closed
    assert breaker.allows(opened_s)
    assert not breaker.begin()
    for _ in range(3):
        breaker.failed(opened_s)
    assert breaker.next_try_s(opened_s) == 2.0  # from the start


def test_tripping_opens_at_once_and_a_cool_down_under_way_goes_on() -> None:
    breaker = CircuitBreaker(failures=3, cool_down_s=2.0)
    breaker.trip(10.0)
    breaker.trip(11.0)
    breaker.failed(11.0)
    assert breaker.next_try_s(11.0) == 1.0
    assert breaker.statistics(11.0).openings == 1
    assert breaker.begin()
    breaker.trip(12.0)  # by the probe
    assert breaker.next_try_s(12.0) == 4.0
    assert not breaker.allows(12.0)
    assert breaker.allows(16.0)


ACTIONS = st.sampled_from(["use", "success", "failure", "probe success", "probe failure", "probe dropped"])


@settings(deadline=None)
@given(st.lists(st.tuples(ACTIONS, st.floats(0, 5)), max_size=60), st.integers(1, 4))
def test_it_is_what_its_history_says(history: list[tuple[str, float]], threshold: int) -> None:
    """Keep the whole history, and ask it instead of a state machine."""
    breaker = CircuitBreaker(failures=threshold, cool_down_s=1.0, longest_s=4.0)
    now_s, in_a_row, cool_downs, open_until_s, probe_out = 0.0, 0, 0, None, False
    for action, passed_s in history:
        now_s += passed_s
        probe = action.startswith("probe")
        if action == "use":
            allowed = open_until_s is None or (now_s >= open_until_s and not probe_out)
            assert breaker.allows(now_s) is allowed
            if allowed:
                assert breaker.begin() is (open_until_s is not None)
                probe_out = open_until_s is not None
        elif probe and not probe_out:
            continue
        elif action == "probe dropped":
            breaker.drop_probe()
            probe_out = False
        elif action.endswith("success"):
            breaker.succeeded()
            in_a_row, cool_downs, open_until_s, probe_out = 0, 0, None, False
        else:
            breaker.failed(now_s, probe=probe)
            in_a_row += 1
            if probe or (open_until_s is None and in_a_row >= threshold):
                open_until_s = now_s + min(2.0**cool_downs, 4.0)
                cool_downs += 1
                probe_out = False
        assert breaker.closed is (open_until_s is None)
        assert breaker.failures_in_a_row == in_a_row
        assert breaker.next_try_s(now_s) == pytest.approx(max(0.0, (open_until_s or 0.0) - now_s))
