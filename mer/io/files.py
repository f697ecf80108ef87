"""Model files opened for reading past the page cache, and reads of them that know short from truncated."""

from __future__ import annotations

import errno
import logging
import os
import stat
from functools import partial
from pathlib import Path
from typing import Final

import attrs

from mer.errors import FileChanged, ReadError
from mer.io.arena import PAGE_BYTES, map_anonymous
from mer.io.identity import FileIdentity
from mer.io.patient import not_opened, patiently

logger = logging.getLogger(__name__)

_FRUITLESS_TRIES: Final = 4  # reads in a row that may bring nothing new before an extent is given up
_SECTOR_BYTES: Final = 512  # the least that a drive reads


@attrs.frozen
class IoMode:
    """How a file is read.

    Direct reads need offsets, lengths and memory addresses that are multiples of `alignment`. Finer alignments than
    a page are never used, even where a device takes them: some filesystems serve those reads through the page cache
    without a word.
    """

    direct: bool  # O_DIRECT; else through the page cache, whose pages are dropped after every read
    alignment: int  # bytes
    reason: str  # why the file is read this way


class ModelFile:
    """One open file of a model; its methods may be called from several threads at once.

    The descriptor stays open, so a file that is replaced by name goes on being read as it was. Size, modification
    time and inode are remembered, so that a failed read can say what happened to the file.

    Attributes:
        path: the file.
        mode: how it is read.
        identity: what the file was when it was opened.

    Args:
        path: a regular file.
        expected: what the file was when its header was read, if it must be the same still.

    Raises:
        ReadError: the file cannot be opened, or is not a regular file.
        FileChanged: the file is not the one that is expected.
    """

    def __init__(self, path: str | os.PathLike[str], expected: FileIdentity | None = None) -> None:
        self.path = Path(path)
        self._fd, self.mode, self.identity = patiently(self._opened, partial(not_opened, self.path), OSError)
        change = expected.change_to(self.identity) if expected is not None else ""
        if change:
            os.close(self._fd)
            raise FileChanged(f"is not as it was when its header was read: {change}; open the model again", self.path)
        if not self.mode.direct:
            logger.warning("%s is read through the page cache: %s", self.path, self.mode.reason)

    def _opened(self) -> tuple[int, IoMode, FileIdentity]:
        """Open the file; raise OSError if the system does not let it."""
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise ReadError(self.path, 0, 0, "not a regular file")
        fd, mode = _open(self.path)
        try:
            return fd, mode, FileIdentity.of(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Close the file; no read may be in flight."""
        os.close(self._fd)

    def read_into(self, memory: memoryview, start: int, needed: int) -> None:
        """Fill memory from file offset `start`, going on after short reads until the first `needed` bytes are there.

        Args:
            memory: bytes to fill; in direct mode its address and length are multiples of the alignment.
            start: offset in the file; in direct mode a multiple of the alignment.
            needed: how many of the bytes must arrive; the others may lie beyond the end of the file.

        Raises:
            ReadError: the file ends too early, or the operating system reports an error.
        """
        read = PartialRead(self, start, needed)
        while not read.complete:
            try:
                n_read = os.preadv(self._fd, [memory[read.begin :]], start + read.begin)
            except OSError as error:
                read.refused(error.errno, error.strerror, cause=error)
            else:
                read.add(n_read)
        if not self.mode.direct:
            os.posix_fadvise(self._fd, start, len(memory), os.POSIX_FADV_DONTNEED)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def failure(self, start: int, needed: int, reason: str, number: int | None = None) -> ReadError:
        """Return why a read of so many bytes has failed, and what happened to the file meanwhile."""
        change = self._change()
        return ReadError(self.path, start, needed, f"{reason} ({change})" if change else reason, number)

    def _change(self) -> str:
        """Return what happened to the file since it was opened, empty if nothing did."""
        before = self.identity
        changes = [change] if (change := before.change_to(FileIdentity.of(os.fstat(self._fd)))) else []
        try:
            by_name = os.stat(self.path)
            if (by_name.st_dev, by_name.st_ino) != (before.st_dev, before.st_ino):
                changes.append("its name now leads to another file")
        except OSError:
            changes.append("its name is gone")
        return "since it was opened, " + " and ".join(changes) if changes else ""


class PartialRead:
    """A read of a file that goes on after the system has brought less than was asked for.

    Attributes:
        begin: where in its memory the next read is to begin.

    Args:
        file: what is read.
        start: offset in the file of the memory's first byte.
        needed: how many bytes must arrive.
    """

    def __init__(self, file: ModelFile, start: int, needed: int) -> None:
        self.begin = 0
        self._file, self._start, self._needed = file, start, needed
        self._got = 0
        self._fruitless = 0
        self._grain = file.mode.alignment if file.mode.direct else 1  # reads start at multiples of it

    @property
    def complete(self) -> bool:
        """Whether all bytes that are needed are there."""
        return self._got >= self._needed

    def add(self, n_read: int) -> None:
        """Note that a read at `begin` has brought so many bytes.

        Raises:
            ReadError: the file ends too early, or reads bring nothing again and again.
        """
        if self.begin + n_read > self._got:
            self._got = self.begin + n_read
            self._fruitless = 0
            # a direct read must start aligned again, so after an odd short read a few bytes are read twice
            self.begin = self._got - self._got % self._grain
            return
        self._fruitless += 1
        if self._start + self._got >= os.fstat(self._file.fileno()).st_size:
            reason = f"file truncated: it ends after {self._got} of these bytes"
        elif self._fruitless > _FRUITLESS_TRIES:
            reason = f"{self._fruitless} reads in a row brought nothing beyond {self._got} bytes"
        else:
            self._grain = min(self._grain, _SECTOR_BYTES)  # perhaps the drive gives no more than a sector at a time
            self.begin = self._got - self._got % self._grain
            return
        raise self._file.failure(self._start, self._needed, reason)

    def refused(self, number: int | None, reason: str | None = None, *, cause: OSError | None = None) -> None:
        """Note that the system has refused a read at `begin` with an error number.

        Raises:
            ReadError: always, unless only the file's alignment was not kept to, which the next read keeps to.
        """
        if number == errno.EINVAL and self._file.mode.direct and self.begin % self._file.mode.alignment:
            self._fruitless += 1
            self._grain = self._file.mode.alignment
            self.begin -= self.begin % self._grain
            return
        text = reason or (os.strerror(number) if number else "read error")
        raise self._file.failure(self._start, self._needed, text, number) from cause


def _open(path: Path) -> tuple[int, IoMode]:
    """Open a file for direct reads if they work, else for buffered ones; raise OSError if neither can be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        reason = f"the filesystem refuses O_DIRECT ({error.strerror})"
    else:
        try:
            os.preadv(fd, [map_anonymous(PAGE_BYTES)], 0)
            return fd, IoMode(True, PAGE_BYTES, "O_DIRECT works")
        except OSError as error:
            os.close(fd)
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            reason = f"a direct read aligned to {PAGE_BYTES} bytes fails ({error.strerror})"
        except BaseException:
            os.close(fd)
            raise
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC), IoMode(False, PAGE_BYTES, reason)
