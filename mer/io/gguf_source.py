"""The leading bytes of a file, read on demand: all that a header parser may see of it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

from mer.errors import GGUFError, ReadError
from mer.io.identity import FileIdentity
from mer.io.patient import kind, not_opened, open_regular, read_some, why
from mer.limits import MAX_HEADER_BYTES, MAX_STRINGS, MAX_TENSORS
from mer.units import format_bytes

FIRST_READ_BYTES = 2**20
# What says that the path is wrong, not that the system failed.
_WRONG_PATH = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO}
)


@attrs.define
class HeaderLimits:
    """What the parts of a model that are not yet read may hold together."""

    n_bytes: int = MAX_HEADER_BYTES
    n_tensors: int = MAX_TENSORS
    n_strings: int = MAX_STRINGS


class HeaderSource:
    """The first bytes of one regular file, opened once and read with `pread` in chunks that double.

    Never maps the file: one that shrinks while it is read gives an error, not SIGBUS. A FIFO or device cannot block the
    caller, because the file is opened without waiting and then refused. A context manager; leaving it closes the file.

    Args:
        path: the file.
        limits: what is left of the limits; the parser takes from it what the file holds.

    Raises:
        GGUFError: the path leads to no file that may be read, or is no regular file, or is empty.
        ReadError: the operating system cannot open it.
    """

    def __init__(self, path: Path, limits: HeaderLimits) -> None:
        self.path = path
        self.limits = limits
        self.data = b""  # the bytes read so far; replaced by every read
        try:
            self._fd, status = open_regular(path, self._not_opened)
        except ValueError as error:
            raise GGUFError(path, None, f"cannot be opened: {error}") from error
        try:
            if not stat.S_ISREG(status.st_mode):
                raise GGUFError(path, None, f"is {kind(status.st_mode)}; a GGUF model is a regular file")
            if not status.st_size:
                raise GGUFError(path, None, "is empty")
        except BaseException:
            os.close(self._fd)
            raise
        self.file_bytes = status.st_size
        self.identity = FileIdentity.of(status)

    def _not_opened(self, error: OSError, tries: int) -> GGUFError | ReadError:
        if error.errno in _WRONG_PATH:
            return GGUFError(self.path, None, f"cannot be opened: {why(error)}")
        return not_opened(self.path, error, tries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def error(self, offset: int | None, reason: str) -> GGUFError:
        """Return an error about the byte at `offset`; the caller raises it."""
        return GGUFError(self.path, offset, reason)

    def need(self, end: int, offset: int, what: str) -> None:
        """Make `data` reach at least to byte `end`.

        Args:
            end: one past the last byte needed; may be absurd, nothing is allocated for it before it is checked.
            offset: of the field that makes these bytes needed.
            what: that field in words, as the subject of an error's sentence.

        Raises:
            GGUFError: the file or the limit on metadata ends before `end`.
            ReadError: the operating system reports an error, an error that may pass for the fourth time.
        """
        if end <= len(self.data):
            return
        if end > self.file_bytes:
            raise self.error(
                offset, f"{what} reaches to byte {end}, but the file has {self.file_bytes}: it is truncated or damaged"
            )
        most = self.limits.n_bytes
        if end > most:
            limit = format_bytes(MAX_HEADER_BYTES)
            raise self.error(offset, f"{what} reaches beyond the {limit} that the headers of a model may take")
        target = min(max(end, FIRST_READ_BYTES, 2 * len(self.data)), self.file_bytes, most)
        chunks = [self.data]
        at = len(self.data)
        while at < target:
            chunk = read_some(self._fd, self.path, at, target - at)
            if not chunk:
                raise self.error(at, "the file became shorter while its header was read")
            chunks.append(chunk)
            at += len(chunk)
        self.data = b"".join(chunks)
