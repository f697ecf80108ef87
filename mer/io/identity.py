"""Identity of the file that a path led to when its header was read."""

from __future__ import annotations

import os
from typing import Self

import attrs


@attrs.frozen
class FileIdentity:
    """Numbers that tell a file from one that takes its name, and from itself after a write; see stat(2)."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """Return the identity of a file from what stat says of it."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    def change_to(self, now: FileIdentity) -> str:
        """Return in words what has changed, empty if nothing has."""
        if (now.st_dev, now.st_ino) != (self.st_dev, self.st_ino):
            return "another file has taken its name"
        if now.st_size != self.st_size:
            return f"its size went from {self.st_size} to {now.st_size} bytes"
        return "it was written to" if now.st_mtime_ns != self.st_mtime_ns else ""
