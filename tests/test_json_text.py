"""JSON that strict readers take."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from mer.json_text import json_text


def refuse(constant: str) -> None:
    raise AssertionError(constant)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ({"a": [math.nan, (math.inf, -math.inf, 0.5)]}, {"a": [None, [None, None, 0.5]]}),
        ([True, None, 2**70, "Größe\n\u2028"], [True, None, 2**70, "Größe\n\u2028"]),
        ({"\udcff": "a\udcffb"}, {"?": "a?b"}),
    ],
)
def test_only_what_json_has_words_for_is_written(value: Any, plain: Any) -> None:
    text = json_text(value)
    assert json.loads(text, parse_constant=refuse) == plain
    assert "\\ud" not in text
