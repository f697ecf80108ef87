"""Words whose ids are known already."""

from __future__ import annotations

from collections.abc import Callable

MAX_WORDS = 8192
MAX_CHARS = 32


class WordCache(dict[str, list[int]]):
    """The ids of short words that have come before; forgotten all at once when there are too many.

    Threads may share one: a word that two of them look up at once is encoded twice.

    Args:
        encode: returns the ids of a word.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        """Encode a word, and keep its ids if it is short."""
        ids = self._encode(word)
        if len(word) <= MAX_CHARS:
            if len(self) >= MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids
