"""The leading bytes of a file, read on demand: all that a header parser may see of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from mer.errors import GGUFError, ReadError
from mer.io.identity import FileIdentity
from mer.units import format_bytes

MAX_HEADER_BYTES = 256 * 2**20  # real headers take 1-20 MiB, nearly all of it vocabulary
FIRST_READ_BYTES = 2**20


class HeaderSource:
    """The first bytes of one regular file, opened once and read with `pread` in chunks that double.

    Never maps the file: one that shrinks while it is read gives an error, not SIGBUS. A FIFO or device cannot block the
    caller, because the file is opened without waiting and then refused. A context manager; leaving it closes the file.

    Raises:
        GGUFError: the path cannot be opened, or is no regular file, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = b""  # the bytes read so far; replaced by every read
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise GGUFError(path, None, f"cannot be opened: {reason}") from error
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise GGUFError(path, None, f"is {_kind(status.st_mode)}; a GGUF model is a regular file")
            if not status.st_size:
                raise GGUFError(path, None, "is empty")
        except BaseException:
            os.close(self._fd)
            raise
        self.file_bytes = status.st_size
        self.identity = FileIdentity.of(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def error(self, offset: int | None, reason: str) -> GGUFError:
        """Return an error about the byte at `offset`; the caller raises it."""
        return GGUFError(self.path, offset, shortened(reason))

    def need(self, end: int, offset: int, what: str) -> None:
        """Make `data` reach at least to byte `end`.

        Args:
            end: one past the last byte needed; may be absurd, nothing is allocated for it before it is checked.
            offset: of the field that makes these bytes needed.
            what: that field in words, as the subject of an error's sentence.

        Raises:
            GGUFError: the file or the limit on metadata ends before `end`.
            ReadError: the operating system reports an error.
        """
        if end <= len(self.data):
            return
        if end > self.file_bytes:
            raise self.error(
                offset, f"{what} reaches to byte {end}, but the file has {self.file_bytes}: it is truncated or damaged"
            )
        if end > MAX_HEADER_BYTES:
            limit = format_bytes(MAX_HEADER_BYTES)
            raise self.error(offset, f"{what} reaches beyond the {limit} that a header may take")
        target = min(max(end, FIRST_READ_BYTES, 2 * len(self.data)), self.file_bytes, MAX_HEADER_BYTES)
        chunks = [self.data]
        at = len(self.data)
        while at < target:
            try:
                chunk = os.pread(self._fd, target - at, at)
            except OSError as error:
                raise ReadError(self.path, at, target - at, error.strerror or str(error), error.errno) from error
            if not chunk:
                raise self.error(at, "the file became shorter while its header was read")
            chunks.append(chunk)
            at += len(chunk)
        self.data = b"".join(chunks)


def shortened(reason: str) -> str:
    """Return `reason` without its middle if names taken from a file make it longer than a screen can show."""
    return reason if len(reason) <= 600 else f"{reason[:300]} ... {reason[-250:]}"


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    return "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "not a regular file"
