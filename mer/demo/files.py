"""Files that are there whole or not at all: hashes, disk space, one preparation at a time, atomic replacement."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mer.errors import MerError
from mer.io.new_file import sync_folder
from mer.quoting import escaped_lines
from mer.units import format_bytes

CHUNK_BYTES = 1 << 20


class DemoError(MerError):
    """The demo model cannot be prepared; the text may go on with the output of pip, in further lines."""

    def __str__(self) -> str:
        return escaped_lines(self.args[0])


def sha256_of(stream: IO[bytes]) -> str:
    """Return the SHA-256 of what is left in a stream, as hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := stream.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Check that a file of `needed_bytes` fits where `folder` lies.

    Raises:
        DemoError: it does not.
    """
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DemoError(
            f"{folder} has {format_bytes(free_bytes)} of free disk space, and {format_bytes(needed_bytes)} are needed; "
            "free some, use fewer experts, or let XDG_CACHE_HOME name a folder on a larger disk"
        )


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block, so that one process at a time prepares files there.

    The lock ends with the process, however that ends.

    Raises:
        DemoError: another process holds it.
    """
    with open(folder / "demo.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(f"another process is preparing the demo model in {folder}; wait until it is done") from None
        yield


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give the path of a file to write inside the block; when the block ends well it becomes `target`, atomically.

    When the block raises, no file is left. A killed process leaves `.NAME.part`, which the next attempt
    overwrites. The file is on the disk before it has its name.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)
