"""Options that come from environment variables: an empty one counts as unset, and messages name the variable."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final

from mer.cli.settings import OPTIONS, spellings
from mer.errors import ConfigError, MerError, NotEnoughMemory

_VARIABLES: Final = {name: option.variable for name, option in OPTIONS.items() if option.variable is not None}
_SETTING: Final = re.compile(r"(?:a )?-*(\w+)")  # that a message begins with


def forget_empty() -> None:
    """Unset the variables of mer's that are empty."""
    for variable in _VARIABLES.values():
        if not os.environ.get(variable, "-").strip():
            del os.environ[variable]


def named(error: MerError, arguments: Sequence[str]) -> str:
    """Return an error's text; it names the variable that the setting comes from which it is about.

    Args:
        error: its text begins with the name of the setting.
        arguments: of the command line, which go before variables.
    """
    text, match = str(error), _SETTING.match(str(error))
    if isinstance(error, ConfigError | NotEnoughMemory) and match is not None and match[1] in _VARIABLES:
        variable = _VARIABLES[match[1]]
        given = any(argument.partition("=")[0] in spellings(match[1]) for argument in arguments)
        if variable in os.environ and not given:
            return f"{variable}={os.environ[variable][:80]!r}: {text}"
    return text
