"""Check of a mirror: a sample of it must equal the model file."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from mer.errors import ConfigError, MirrorMismatch, ReadError
from mer.io.arena import map_anonymous
from mer.io.files import ModelFile
from mer.io.patient import patiently

HEADER_BYTES: Final = 16 << 20  # headers take 1 to 20 MiB, nearly all of it vocabulary
BLOCK_BYTES: Final = 64 << 10
N_BLOCKS: Final = 64
_SEED: Final = 20


def mirror_paths(paths: Sequence[str | os.PathLike[str]], mirror: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Return where the copies of a model's files are: in the folder `mirror` or in that of the file `mirror`.

    They have the originals' names, but the copy of a single file may have any.
    """
    place = Path(mirror)
    if len(paths) == 1 and not place.is_dir():
        return (place,)
    folder = place if place.is_dir() else place.parent
    return tuple(folder / Path(path).name for path in paths)


def verify_mirror(original: ModelFile, mirror: ModelFile) -> None:
    """Compare a mirror with a file, so that a wrong path or a stale or cut-off copy is refused; blocks.

    Compared are the sizes, the first 16 MiB, where the header is, the last 64 KiB, and 64 blocks of 64 KiB, one at a
    random place in each of 64 equal stretches of the file, the same places every time: at most 21 MiB of each file.

    Raises:
        ConfigError: both are the same file.
        MirrorMismatch: they differ.
        ReadError: one of them cannot be read.
    """
    ours, theirs = original.identity, mirror.identity
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        raise ConfigError(f"the mirror {mirror.path} is the file {original.path} itself; give a copy on another drive")
    if ours.st_size != theirs.st_size:
        raise MirrorMismatch(
            mirror.path,
            min(ours.st_size, theirs.st_size),
            f"it has {theirs.st_size} bytes, {original.path} has {ours.st_size}",
        )
    memory = np.frombuffer(map_anonymous(2 * BLOCK_BYTES), dtype=np.uint8)
    left, right = memory[:BLOCK_BYTES], memory[BLOCK_BYTES:]
    for start in sample(ours.st_size):
        needed = min(BLOCK_BYTES, ours.st_size - start)
        for file, side in ((original, left), (mirror, right)):
            patiently(partial(file.read_into, side.data, start, needed), ReadError.after, ReadError)
        if not np.array_equal(left[:needed], right[:needed]):
            at = start + int((left[:needed] != right[:needed]).argmax())
            raise MirrorMismatch(
                mirror.path, at, f"it differs from {original.path}, of which it must be an identical copy"
            )


def sample(n_bytes: int) -> list[int]:
    """Return where the compared blocks of a file of so many bytes begin, in order: multiples of BLOCK_BYTES."""
    n_blocks = -(-n_bytes // BLOCK_BYTES)
    chosen = set(range(min(n_blocks, HEADER_BYTES // BLOCK_BYTES)))
    rng = random.Random(_SEED)
    edges = [n_blocks * number // N_BLOCKS for number in range(N_BLOCKS + 1)]
    chosen.update(rng.randrange(begin, end) for begin, end in itertools.pairwise(edges) if begin < end)
    if n_blocks:
        chosen.add(n_blocks - 1)
    return [block * BLOCK_BYTES for block in sorted(chosen)]
