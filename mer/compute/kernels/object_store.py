"""Compiled kernels on disk: one file each, which is loaded only if it is whole and nobody else can have written it.

A file is a mark, the object code, and behind it the SHA-256 of all that the code was made from, its name, and the code.
The sum is written once the code is on the disk, and then the file takes its place, so that processes that write the
same one at the same time do not disturb each other. Whatever is wrong with a file or its folder, the kernel is compiled
again, and one line in the log says so.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mer.errors import ConfigError
from mer.io.new_file import NewFile, sweep
from mer.paths import distrust, distrust_status, make_private_folder

_MARK: Final = b"mer-kernel-1\0\0\0\0"
_SUFFIX: Final = ".kernel"
_SUM_BYTES: Final = hashlib.sha256().digest_size
_MOST_BYTES: Final = 64 << 20
_log = logging.getLogger(__name__)


class ObjectStore:
    """Object code of kernels by name, in one folder.

    Args:
        folder: returns the folder, which may not exist yet; asked when it is first needed.
        facts: what all kernels here depend on besides their names.
    """

    def __init__(self, folder: Callable[[], Path], facts: str) -> None:
        self._facts = hashlib.sha256(facts.encode()).digest()
        self._said_damage = False
        self._swept = False
        self._trusted: bool | None = None  # None: not known yet, as there may be no folder
        self.failure: str | None = None  # why nothing is kept, once known
        self._find_folder = folder

    @functools.cached_property
    def folder(self) -> Path | None:
        """The folder, or None if there is none, which is logged."""
        try:
            return self._find_folder()
        except ConfigError as error:
            self._fail(str(error))
            return None

    def load(self, name: str) -> bytes | None:
        """Return the object code that was kept under a name, or None if it is not there, or not as it was written."""
        if self.folder is None or not self._is_trusted(self.folder):
            return None
        path = self._path(name)
        try:
            content = _read(path)
            if content[-_SUM_BYTES:] != self._sum(name, content[:-_SUM_BYTES]):
                raise _UnusableError("its check sum is wrong")
        except FileNotFoundError:
            return None
        except (OSError, _UnusableError) as error:
            self._say_damaged(path, str(getattr(error, "strerror", None) or error))
            return None
        return content[len(_MARK) : -_SUM_BYTES]

    def save(self, name: str, code: bytes) -> None:
        """Keep object code under a name, unless it has turned out that nothing can be kept."""
        if self.folder is None or self.failure is not None:
            return
        path = self._path(name)
        content = _MARK + code
        try:
            make_private_folder(self.folder)
            if not self._is_trusted(self.folder):
                return
            self._sweep(self.folder)
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            with NewFile(path) as file:
                file.write(content)
                file.sync()
                file.write(self._sum(name, content))
                file.commit()
        except OSError as error:
            self._fail(f"{self.folder}: {error.strerror or error}")

    def _sweep(self, folder: Path) -> None:
        """Remove, once, what killed processes have left in a folder that can be trusted.

        When something is kept, not when something is loaded: a run that compiles nothing has no time for it, and what
        is left only grows where kernels are written.
        """
        if not self._swept:
            self._swept = True
            sweep(folder, _SUFFIX)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{self._facts.hex()[:12]}{_SUFFIX}"

    def _sum(self, name: str, content: bytes) -> bytes:
        return hashlib.sha256(self._facts + name.encode() + b"\0" + content).digest()

    def _is_trusted(self, folder: Path) -> bool:
        """Return whether nobody else can have written to the folder; True if there is none."""
        if self._trusted is None:
            try:
                reason = distrust(folder)
            except FileNotFoundError:
                return True
            except OSError as error:
                reason = f"{folder} cannot be read: {error.strerror or error}"
            self._trusted = reason is None
            if reason is not None:
                self._fail(f"{reason}; let XDG_CACHE_HOME name a folder of your own")
        return self._trusted

    def _say_damaged(self, path: Path, reason: str) -> None:
        """Say, once, that a file cannot be used."""
        if not self._said_damage:
            self._said_damage = True
            _log.warning("%s cannot be used and is compiled again: %s", path, reason)

    def _fail(self, reason: str) -> None:
        """Say, once, that nothing can be kept."""
        if self.failure is None:
            self.failure = reason
            _log.warning("compiled kernels cannot be kept: %s", reason)


class _UnusableError(Exception):
    """A file is not to be believed; the text says why."""


def _read(path: Path) -> bytes:
    """Return the content of a file that nobody else can have written.

    Raises:
        OSError: it cannot be read.
        _UnusableError: it is of no use.
    """
    try:  # without waiting for what is no regular file
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _UnusableError("it is a symbolic link") from None
        raise
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _UnusableError("it is no regular file")
        reason = distrust_status(status)
        if reason is not None:
            raise _UnusableError(f"it {reason}")
        if not len(_MARK) + _SUM_BYTES < status.st_size <= _MOST_BYTES:
            raise _UnusableError(f"it has {status.st_size} bytes")
        return stream.read(_MOST_BYTES)
