"""Finds the texts of a set, such as a vocabulary's control tokens, inside of other texts."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping

_CANDIDATES = 4096  # between two calls of `tick`


def _nothing() -> None:
    pass


class Spellings:
    """The texts of a set of tokens, found where they occur; at each place the longest counts.

    The work at a place grows with the logarithm of the number of texts, however much they resemble each other.

    Args:
        ids: {text: id of the token}; no text is empty.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        self._texts = sorted(ids)
        self.longest = max(map(len, self._texts), default=0)
        first = {text[0] for text in self._texts}
        self._begin = re.compile(f"[{re.escape(''.join(sorted(first)))}]" if first else r"(?!)")
        self._parents, self._jumps = _ancestors(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def at(self, text: str, position: int) -> str | None:
        """Return the longest text of the set that begins at this position, or None.

        In alphabetical order, take the last text that does not come after the rest of `text` from here. It is the one
        looked for, or the one looked for is a beginning of it.
        """
        here = text[position : position + self.longest]
        number = bisect_right(self._texts, here) - 1
        while number >= 0 and not here.startswith(self._texts[number]):
            jump = self._jumps[number]
            far = jump >= 0 and not here.startswith(self._texts[jump])
            number = jump if far else self._parents[number]
        return self._texts[number] if number >= 0 else None

    def split(self, text: str, tick: Callable[[], None] = _nothing) -> Iterator[str | int]:
        """Yield a text cut at the texts of the set: what lies between them as str, and they as ids.

        Args:
            text: any text.
            tick: called often; what it raises ends the search.
        """
        end = 0
        for number, match in enumerate(self._begin.finditer(text)):
            if number % _CANDIDATES == 0:
                tick()
            start = match.start()
            found = self.at(text, start) if start >= end else None
            if found is None:
                continue
            if start > end:
                yield text[end:start]
            yield self._ids[found]
            end = start + len(found)
        if end < len(text):
            yield text[end:]

    def starts(self, text: str) -> set[int]:
        """Return every position where a text of the set begins, also those inside of another one."""
        positions = (match.start() for match in self._begin.finditer(text))
        return {position for position in positions if self.at(text, position) is not None}

    def begun(self, text: str) -> set[int]:
        """Return every position from where on the whole rest of the text begins a longer or equal text of the set."""
        positions = (match.start() for match in self._begin.finditer(text, pos=max(0, len(text) - self.longest)))
        return {position for position in positions if self._begins(text[position:])}

    def _begins(self, beginning: str) -> bool:
        number = bisect_left(self._texts, beginning)
        return number < len(self._texts) and self._texts[number].startswith(beginning)


def _ancestors(texts: list[str]) -> tuple[list[int], list[int]]:
    """Return for each of the sorted texts the longest other one that it begins with, and one further up; -1 for none.

    A text's jump leads over so many of its beginnings that any of them is reached in a number of steps that grows with
    the logarithm of their number. Reference: Myers, "An applicative random-access stack", 1983.
    """
    parents: list[int] = []
    jumps: list[int] = []
    depths: list[int] = []
    open_texts: list[int] = []  # each begins with the one before it
    for number, text in enumerate(texts):
        while open_texts and not text.startswith(texts[open_texts[-1]]):
            open_texts.pop()
        parent = open_texts[-1] if open_texts else -1
        jump = -1
        if parent >= 0:
            over = jumps[parent]
            far = jumps[over] if over >= 0 else -1
            equal = over >= 0 and depths[parent] - depths[over] == depths[over] - (depths[far] if far >= 0 else 0)
            jump = far if equal else parent
        parents.append(parent)
        jumps.append(jump)
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
        open_texts.append(number)
    return parents, jumps
