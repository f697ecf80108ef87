"""Stop strings against searching the whole text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mer.errors import RequestError
from mer.text.stop import StopMatcher

LETTERS = st.text(alphabet="ab\n", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Cut the text before the stop string that is complete first, the longest of those that are complete at once."""
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text, False
    end, negative = min(found)
    return text[: end + negative], True


@settings(max_examples=1000)
@given(LETTERS, STOPS, st.lists(st.integers(0, 24), max_size=6))
@example("aab", ["ab", "b"], [1, 2])
@example("abab\n", ["ababa", "b\n"], [1, 2, 3, 4])
@example("aaabaaaa", ["aabaaa", "aabaaaa"], [3])
@example("aabaaabaaab", ["aabaaab" + "b", "aabaaab\n"], [5])
def test_any_cutting_shows_the_text_before_the_stop(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        piece, stopped = matcher.push(text[start:end])
        shown += piece
    assert (shown + matcher.flush(), stopped) == oracle(text, stops)
    assert matcher.stopped is stopped


@settings(max_examples=500)
@given(LETTERS, STOPS)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped = matcher.push(text)
    if not stopped:
        held = text[len(shown) :]
        assert shown + held == text
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longer = [text[i:] for i in range(len(shown))]
        assert not any(stop.startswith(end) for stop in stops for end in longer)


def test_a_failed_match_falls_back_to_its_longest_border() -> None:
    # After "aabaaa" the pattern fails at its last character; "aa" of it is still alive.
    assert StopMatcher(["aabaaac"]).push("aabaaabaaac") == ("aaba", True)
    assert StopMatcher(["aaab"]).push("aaaab") == ("a", True)


def test_nothing_is_shown_after_the_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", True)
    assert matcher.push("c") == ("", True)
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], "at least one character"),
        ([7], "at least one character"),
        (["a"] * 65, "at most 64"),
        (["é" * 513], "1026 bytes"),
        ("stop", "list"),
    ],
)
def test_senseless_stops_are_refused(stops: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StopMatcher(stops)


def test_the_largest_allowed_stops_work() -> None:
    stops = ["a" * (1024 - i) + "b" for i in range(1, 65)]
    matcher = StopMatcher(stops)
    shown, stopped = matcher.push("a" * 2000 + "b")
    assert (shown, stopped) == ("a" * (2000 - 1023), True)
