"""Retries of failed reads: the delays, and the errors that get one."""

from __future__ import annotations

import errno
from typing import Final

from mer.errors import ReadError

TRANSIENT: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.EIO, errno.EBUSY, errno.ENOMEM, errno.ETIMEDOUT})
"""Errors that may be over in a moment: a busy or reset device, a lost interrupt, a path that fails over, no memory.

EIO is among them because drives and their connections report a passing fault that way too. Not among them: what says
that the file or the device is gone (ESTALE, ENODEV, EBADF), and truncation, which has no number."""

DELAYS_S: Final = (0.005, 0.010, 0.050)
"""Seconds before each of the further tries."""


def delay_s(error: ReadError, tries: int) -> float | None:
    """Return how long to wait before a read that failed is tried again, or None if that is of no use.

    Args:
        error: why it failed.
        tries: how often it has been tried, at least 1.
    """
    if error.errno not in TRANSIENT or tries > len(DELAYS_S):
        return None
    return DELAYS_S[tries - 1]
