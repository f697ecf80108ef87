"""Choice of the reader: io_uring where the system and the files allow it, else threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from mer.config import IoEngine
from mer.io.file_reader import FileReader
from mer.io.ring_reader import RingReader, RingUnavailable
from mer.io.thread_reader import ThreadReader


@attrs.frozen(eq=False)
class OpenReader:
    """A reader that is open, and why it is that one."""

    reader: FileReader
    reason: str


@contextmanager
def open_reader(
    paths: Sequence[str | os.PathLike[str]], *, io_engine: IoEngine = "auto", **settings: Any
) -> Iterator[OpenReader]:
    """Open model files with a reader of a kind.

    Args:
        paths: see `FileReader`, as for the further settings.
        io_engine: "io_uring", "threads", or "auto" for the first of them that can be had.

    Raises:
        ConfigError: io_uring is asked for and cannot be had; else as a `FileReader` raises on entering.
    """
    reason = "asked for"
    if io_engine != "threads":
        ring = RingReader(paths, **settings)
        try:
            ring.__enter__()
        except RingUnavailable as error:
            if io_engine == "io_uring":
                raise
            reason = error.reason
        else:
            try:
                yield OpenReader(ring, reason if io_engine == "io_uring" else "the system has it")
            finally:
                ring.close()
            return
    with ThreadReader(paths, **settings) as reader:
        yield OpenReader(reader, reason)
