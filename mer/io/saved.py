"""Opening files that `mer` has once saved, which may be anything by now."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mer.errors import SavedFileError, naming
from mer.io.patient import kind, open_regular


@contextlib.contextmanager
def open_saved(
    path: str | os.PathLike[str], failed: Callable[[Path, int | None, str], SavedFileError]
) -> Iterator[tuple[BinaryIO, int]]:
    """Give the open file and its size inside the block; whatever the system refuses there names the file.

    Never waits for what is no regular file, such as a FIFO.

    Args:
        path: the file.
        failed: makes the error of a file that cannot be used, from its path, an offset and a reason.

    Raises:
        SavedFileError: the path leads to no regular file.
        OSError: the file cannot be opened.
    """
    with naming(path):
        fd, status = open_regular(path)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise failed(Path(path), None, f"no regular file but {kind(status.st_mode)}; choose another one")
        with open(fd, "rb") as stream:
            yield stream, status.st_size
