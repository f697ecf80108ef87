"""Retries of failed reads: the errors that get one, the delays, and reads in the caller's thread that keep to them."""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from mer.errors import ReadError

TRANSIENT: Final = frozenset({errno.EAGAIN, errno.EINTR, errno.EIO, errno.EBUSY, errno.ENOMEM, errno.ETIMEDOUT})
"""Errors that may be over in a moment: a busy or reset device, a lost interrupt, a path that fails over, no memory.

EIO is among them because drives and their connections report a passing fault that way too. Not among them: what says
that the file or the device is gone (ESTALE, ENODEV, EBADF), and truncation, which has no number."""

DELAYS_S: Final = (0.005, 0.010, 0.050)
"""Seconds before each of the further tries."""

T = TypeVar("T")
E = TypeVar("E", OSError, ReadError)

_pause = time.sleep


def delay_s(error: OSError | ReadError, tries: int) -> float | None:
    """Return how long to wait before a read that failed is tried again, or None if that is of no use.

    Args:
        error: why it failed.
        tries: how often it has been tried, at least 1.
    """
    if error.errno not in TRANSIENT or tries > len(DELAYS_S):
        return None
    return DELAYS_S[tries - 1]


def patiently(call: Callable[[], T], failed: Callable[[E, int], Exception], kind: type[E]) -> T:
    """Return what `call` returns, tried again after 5, 10 and 50 ms if it fails with an error that may pass. Blocks.

    Args:
        call: what is tried.
        failed: makes the error that is raised in the end, from the last one and how often it was tried.
        kind: of errors that `call` raises.
    """
    tries = 1
    while True:
        try:
            return call()
        except kind as error:
            wait_s = delay_s(error, tries)
            if wait_s is None:
                final = failed(error, tries)
                raise final from (error if final is not error else error.__cause__)
        _pause(wait_s)
        tries += 1


def open_regular(
    path: str | os.PathLike[str], failed: Callable[[OSError, int], Exception] = lambda error, _: error
) -> tuple[int, os.stat_result]:
    """Open a file for reading, and return its descriptor and status; the caller closes it, and checks what it is.

    Blocks as long as the disk takes, but never for a FIFO or a device, which is opened without waiting.

    Args:
        path: the file.
        failed: see `patiently`.

    Raises:
        OSError: it cannot be opened, unless `failed` makes another error of it.
    """

    def opened() -> tuple[int, os.stat_result]:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            return fd, os.fstat(fd)
        except BaseException:
            os.close(fd)
            raise

    return patiently(opened, failed, OSError)


def read_some(fd: int, path: Path, offset: int, n_bytes: int) -> bytes:
    """Return up to `n_bytes` bytes of a file from `offset`: fewer after a short read, none after its end. Blocks.

    Raises:
        ReadError: the operating system reports an error, an error that may pass for the fourth time.
    """

    def failed(error: OSError, tries: int) -> ReadError:
        return ReadError(path, offset, n_bytes, why(error), error.errno, tries=tries)

    return patiently(lambda: os.pread(fd, n_bytes, offset), failed, OSError)


def read_up_to(fd: int, path: Path, offset: int, n_bytes: int) -> bytes:
    """Return `n_bytes` bytes of a file from `offset`, going on after short reads, or fewer where the file ends. Blocks.

    Raises:
        ReadError: as for `read_some`.
    """
    data = b""
    while chunk := read_some(fd, path, offset + len(data), n_bytes - len(data)) if len(data) < n_bytes else b"":
        data += chunk
    return data


def not_opened(path: Path, error: OSError, tries: int) -> ReadError:
    """Return the error of a model file that the system does not open; the caller raises it."""
    return ReadError(path, 0, 0, why(error), error.errno, tries=tries)


def why(error: OSError) -> str:
    """Return in words why the system refused something, and what would help where that is known."""
    text = error.strerror or str(error)
    if error.errno == errno.EMFILE:
        text += f"; this process may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} (ulimit -n)"
    return text


def kind(mode: int) -> str:
    """Return in words what a file is that is not a regular one."""
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "not a regular file"
