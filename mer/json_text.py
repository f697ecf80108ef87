"""JSON that every reader of JSON takes."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """Return a value as JSON of RFC 8259: what is no number there (NaN, infinity) is null, and no text has surrogates.

    Args:
        value: dictionaries with text keys, lists, tuples, texts, numbers, bools and None.
    """
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
