"""Text that `mer` did not write, as an error shows it: on one line, escaped, and short."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MAX_ECHO: Final = 80
"""Characters of a file's text that an error shows."""

# Characters that a terminal may obey or a log may take for the end of a line: C0, DEL, C1, separators of lines and
# paragraphs, the Unicode controls of text direction, and lone surrogates, which cannot be printed.
_CONTROLS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def quoted(text: str | bytes, limit: int = MAX_ECHO) -> str:
    """Return a text in quotes, escaped as Python does, at most `limit` characters of it; "..." stands for the rest."""
    cut = text[:limit]
    while len(repr(cut)) > limit + len("b''"):
        cut = cut[:-1]
    return repr(cut) + ("..." if len(cut) < len(text) else "")


def echo(value: object, limit: int = MAX_ECHO) -> str:
    """Return a value that a file holds: a text in quotes, a number as it is, of a long array only its beginning."""
    if isinstance(value, str | bytes):
        return quoted(value, limit)
    shown = repr(list(value[:limit])) if isinstance(value, Sequence) else one_line(str(value))
    return shown if len(shown) <= limit else shown[:limit] + "..."


def one_line(text: str) -> str:
    """Return a text with every control character and line break escaped, so that it is one line."""
    return _CONTROLS.sub(_escaped, text)


def escaped_lines(text: str) -> str:
    """Return a text of several lines with every other control character escaped."""
    return "\n".join(map(one_line, text.split("\n")))


def _escaped(match: re.Match[str]) -> str:
    return ascii(match[0])[1:-1]
