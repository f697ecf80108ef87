"""GGUF model files: `read_gguf` gives their metadata and the extents of their tensors, and reads nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from mer.io.gguf_file import GGUFFile, MetadataValue, TensorInfo
from mer.io.gguf_split import read_all_parts

__all__ = ["GGUFFile", "MetadataValue", "TensorInfo", "read_gguf"]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Return the header of a GGUF model, GGUF v2 or v3 and little-endian.

    Of a split model any part may be given; the others are found next to it. Blocks while it reads: 0.1 s for 150 k
    tokens with merges; never maps a file, never reads tensor data, holds no file open afterwards.

    The file is not trusted: every length, count, type, shape and extent is checked before use, with at most 256 MiB of
    metadata per file. What it *means*, such as hyperparameters and shapes that fit each other, is not checked here.

    Raises:
        GGUFError: the file, or a part of it, is missing or malformed; carries the path, the byte offset and the reason.
        ReadError: the operating system reports an error while reading.
    """
    return read_all_parts(Path(path))
