"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from mer.errors import naming

PRIVATE: Final = 0o600
SHARED: Final = 0o666  # less what the umask takes
STALE_S: Final = 3600.0  # age from which on no process writes a small file any more


class NewFile:
    """Writes a temporary file next to `path`, which `commit` puts in its place.

    A context manager: leaving it without `commit` removes the temporary file, and `path` is as it was. A process that
    is killed leaves `.NAME.` and 8 hexadecimal digits. Everything here blocks.

    Args:
        path: the file to be; one that is there is replaced.
        mode: its permissions.

    Raises:
        OSError: the temporary file cannot be created.
    """

    def __init__(self, path: str | os.PathLike[str], mode: int = PRIVATE) -> None:
        self.path = Path(path)
        self._temporary: Path | None = None
        self._process = os.getpid()
        name = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        try:
            self._file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            error.filename = os.fspath(path)  # the temporary name would say nothing
            raise
        self._temporary = name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, data: bytes | memoryview) -> None:
        """Append data, all of it.

        Raises:
            OSError: it cannot be written.
        """
        view = memoryview(data)
        with naming(self.path):
            while view:
                view = view[os.write(self._file, view) :]

    def sync(self) -> None:
        """Bring what has been written to the disk.

        Raises:
            OSError: that failed.
        """
        os.fsync(self._file)

    def commit(self) -> None:
        """Bring everything to the disk and put the file in its place.

        Raises:
            OSError: that failed; unless only the folder could not be brought to the disk, `path` is as it was.
        """
        assert self._temporary is not None
        with naming(self.path):
            os.fsync(self._file)
        os.replace(self._temporary, self.path)
        self._temporary = None
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Remove what was not committed. Closing twice is allowed.

        Raises:
            OSError: the system tells only now that something was not written; what was not committed is gone then, too.
        """
        file, self._file = self._file, -1
        temporary, self._temporary = self._temporary, None
        try:
            if file >= 0:
                with naming(self.path):
                    os.close(file)
        finally:
            if temporary is not None and os.getpid() == self._process:  # else a forked child's parent goes on with it
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)


def write_whole(path: str | os.PathLike[str], data: bytes, mode: int = PRIVATE) -> None:
    """Write a file that is there whole or as it was before.

    Raises:
        OSError: the file cannot be written.
    """
    with NewFile(path, mode) as file:
        file.write(data)
        file.commit()


def sweep(folder: Path, suffix: str) -> None:
    """Remove what killed processes have left in a folder of the temporary files of `NewFile`, if it is an hour old.

    Another process may still write a younger one. A file that cannot be looked at or removed stays: nothing depends on
    it.

    Args:
        folder: may not exist.
        suffix: that the names of the files to be ended with.
    """
    temporary = re.compile(rf"\..*{re.escape(suffix)}\.[0-9a-f]{{8}}")
    oldest_s = time.time() - STALE_S
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if temporary.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and status.st_mtime < oldest_s:
                        os.unlink(entry.path)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk.

    Raises:
        OSError: that failed.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(folder)
    finally:
        os.close(folder)
