"""Exit codes, and which error gives which."""

from __future__ import annotations

import enum

from mer.errors import ConfigError, MerError, ModelFileError, NotEnoughMemory, RequestError


class Exit(enum.IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MODEL_FILE = 3
    MEMORY = 4
    INTERRUPTED = 130  # as shells report a command that ctrl-C ended


def exit_for(error: MerError) -> Exit:
    """Return the exit code of a command that failed with this error."""
    if isinstance(error, ModelFileError):
        return Exit.MODEL_FILE
    if isinstance(error, NotEnoughMemory):
        return Exit.MEMORY
    if isinstance(error, ConfigError | RequestError):
        return Exit.USAGE
    return Exit.FAILED
