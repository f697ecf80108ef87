"""Stop strings: where a generated text ends, found without ever showing a part of the stop string."""

from __future__ import annotations

from collections.abc import Sequence

from mer.errors import RequestError

MAX_STOPS = 64
MAX_STOP_BYTES = 1024


class StopMatcher:
    """Watches a text that arrives in pieces for the first of several stop strings to be complete.

    Where several are complete with the same character the longest counts. What is shown does not depend on how the text
    is cut into pieces. Each character costs amortized O(number of stops): a Knuth-Morris-Pratt automaton for each.

    Args:
        stops: the stop strings; may be none.

    Raises:
        RequestError: a stop string is empty or longer than 1 KiB of UTF-8, or there are more than 64.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise RequestError(f"stop strings come as a list: write [{stops!r}]")
        if len(stops) > MAX_STOPS:
            raise RequestError(f"{len(stops)} stop strings; at most {MAX_STOPS} are allowed")
        for i, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop string {i} is {stop!r}; it must be a text of at least one character")
            n_bytes = len(stop.encode("utf-8", "surrogatepass"))
            if n_bytes > MAX_STOP_BYTES:
                raise RequestError(f"stop string {i} has {n_bytes} bytes; at most {MAX_STOP_BYTES} are allowed")
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop that the text's end spells
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been seen."""
        return self._stopped

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string ended it; after that nothing is shown."""
        if self._stopped:
            return "", True
        held = self._held + text
        for i, character in enumerate(text, len(self._held)):
            complete = self._advance(character)
            if complete:
                self._stopped = True
                self._held = ""
                return held[: i + 1 - complete], True
        keep = max(self._matched, default=0)
        shown = held[: len(held) - keep]
        self._held = held[len(held) - keep :]
        return shown, False

    def flush(self) -> str:
        """Return the text held back as a possible beginning of a stop string, now that no more text comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> int:
        """Take one character; return the length of the longest stop string it completes, or 0."""
        longest = 0
        for k, (stop, failure) in enumerate(zip(self._stops, self._failures, strict=True)):
            n = self._matched[k]
            while n and stop[n] != character:
                n = failure[n - 1]
            if stop[n] == character:
                n += 1
            if n == len(stop):
                longest = max(longest, n)
            self._matched[k] = n
        return longest


def _failure_table(stop: str) -> list[int]:
    """Return for each prefix the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    n = 0
    for i in range(1, len(stop)):
        while n and stop[i] != stop[n]:
            n = table[n - 1]
        if stop[i] == stop[n]:
            n += 1
        table[i] = n
    return table
