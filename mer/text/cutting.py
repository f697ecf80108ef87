"""Long texts in pieces: cut only where every way to make words of a text has the end of a word."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mer.errors import RequestError

PIECE_CHARS = 1 << 14


def cut(text: str, places: re.Pattern[str], longest: int) -> Iterator[str]:
    """Yield a text in pieces of some 16 Ki characters; joined they are the text.

    Args:
        text: any text.
        places: matches nothing, at each place where the text may be cut.
        longest: the most characters that may be without such a place.

    Raises:
        RequestError: the text has more without one.
    """
    start = 0
    while len(text) - start > PIECE_CHARS:
        place = places.search(text, start + PIECE_CHARS)
        end = place.start() if place is not None else len(text)
        if end - start > PIECE_CHARS + longest:
            raise RequestError(
                f"the text has a word of more than {longest} characters, from position {start + PIECE_CHARS} on; "
                "a text so long must have spaces or line breaks"
            )
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
