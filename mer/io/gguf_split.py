"""Models split over several GGUF files, as `llama-gguf-split` writes them: finding and joining the parts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import attrs

from mer.errors import GGUFError
from mer.io.gguf_file import GGUFFile, TensorInfo
from mer.io.gguf_header import read_part
from mer.io.gguf_source import HeaderLimits
from mer.io.patient import not_opened, open_regular, read_up_to
from mer.limits import MAX_PARTS
from mer.quoting import echo, quoted

_JOINED = (
    "begins at byte {at}: parts cannot be joined with cat; give each its own file again, or join them with "
    "llama-gguf-split --merge"
)
_PART_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_all_parts(path: Path) -> GGUFFile:
    """Return the joined header of the model that the file at `path` is, or is any part of.

    Parts lie in one folder and are named MODEL-00001-of-00003.gguf; the keys `split.no` (from 0), `split.count` and
    `split.tensors.count` must agree with the names. Metadata is taken from the first part. A `split.count` of 0, which
    `llama-gguf-split --merge` writes, or of 1 says that the file is the whole model, whatever its name.

    Raises:
        GGUFError: a part is malformed, missing, given twice, or belongs to another model.
        ReadError: the operating system fails to read a part.
    """
    limits = HeaderLimits()
    given = read_part(path, 0, limits)
    stated = given.get_int("split.count", None, minimum=0, maximum=MAX_PARTS)
    count = stated or 1
    number = given.get_int("split.no", 0, minimum=0, maximum=count - 1)
    match = _PART_NAME.fullmatch(path.name)
    if count == 1:
        if stated is None and match and int(match["count"]) > 1:
            named = f"is named as one of {int(match['count'])} parts"
            raise GGUFError(
                path, None, f"{named}, but its metadata does not say so ('split.count'); rename a whole model"
            )
        return given
    if match is None or int(match["count"]) != count:
        if (at := _next_header(given)) is not None:
            raise given.error("split.count", f"is {count}, and another part {_JOINED.format(at=at)}")
        name = part_name("MODEL", number, count)
        raise given.error("split.count", f"is {count}, so the file must have a name like {name}")
    if path.name != part_name(match["model"], 0, count):  # the parts are counted from the first
        limits = HeaderLimits()
    parts: list[GGUFFile] = []
    for index in range(count):
        with _as_part_of(path):
            parts.append(_read_one(given, index, match["model"], count, limits, parts))
    return _join(parts)


def part_name(model: str, index: int, count: int) -> str:
    """Return the name of a part, counted from 0."""
    return f"{model}-{index + 1:05}-of-{count:05}.gguf"


@contextlib.contextmanager
def _as_part_of(path: Path) -> Iterator[None]:
    """Let errors about another part say which file needs it."""
    try:
        yield
    except GGUFError as error:
        if error.path is None or error.path == path:
            raise
        raise GGUFError(error.path, error.offset, f"{error.reason} (needed with {path.name})") from error


def _read_one(
    given: GGUFFile, index: int, model: str, count: int, limits: HeaderLimits, before: Sequence[GGUFFile]
) -> GGUFFile:
    """Return one part of the model that `given` is a part of, checked against those before; the first alone keeps its
    metadata.
    """
    path = given.paths[0]
    part_path = path.with_name(part_name(model, index, count))
    if not os.path.lexists(part_path):
        missing = f"part {index + 1} of {count} is missing"
        if (at := _next_header(given)) is not None:
            raise GGUFError(part_path, None, f"{missing}; in {path.name}, another part {_JOINED.format(at=at)}")
        raise GGUFError(part_path, None, f"{missing}; all parts must be in one folder")
    part = given if index == 0 and part_path == path else read_part(part_path, index, limits)
    _check_part(part, index, count, before[0] if before else part)
    return attrs.evolve(part, metadata=MappingProxyType({})) if index else part


def _next_header(part: GGUFFile) -> int | None:
    """Return where another GGUF file begins after the data of this one, if one does."""
    end = max((tensor.offset + tensor.n_bytes for tensor in part.tensors.values()), default=part.header_bytes)
    fd, _ = open_regular(part.paths[0], partial(not_opened, part.paths[0]))
    try:
        for at in sorted({end, -(-end // part.alignment) * part.alignment}):
            if read_up_to(fd, part.paths[0], at, 4) == b"GGUF":
                return at
    finally:
        os.close(fd)
    return None


def _check_part(part: GGUFFile, index: int, count: int, first: GGUFFile) -> None:
    number = part.get_int("split.no")
    if number != index:
        raise part.error("split.no", f"says part {number + 1} of the model, but the name says part {index + 1}")
    if part.get_int("split.count") != count:
        raise part.error("split.count", f"is {part.get_int('split.count')}, but the name says {count} parts")
    for key, get in (
        ("general.architecture", GGUFFile.get_str),
        ("general.name", GGUFFile.get_str),
        ("split.tensors.count", GGUFFile.get_int),
    ):
        here, there = get(part, key, None), get(first, key, None)
        if here is not None and here != there:
            both = f"is {echo(here, 40)}, but {echo(there, 40)} in {first.paths[0].name}"
            raise part.error(key, f"{both}: they are parts of two models")


def _join(parts: list[GGUFFile]) -> GGUFFile:
    first = parts[0]
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                other = parts[tensors[name].file].paths[0].name
                raise GGUFError(part.paths[0], None, f"the tensor {quoted(name)} is also in {other}")
            tensors[name] = info
    expected = first.get_int("split.tensors.count")
    if len(tensors) != expected:
        found = f"the {len(parts)} parts hold {len(tensors)} tensors"
        raise first.error("split.tensors.count", f"is {expected}, but {found}")
    return attrs.evolve(
        first,
        paths=tuple(part.paths[0] for part in parts),
        tensors=MappingProxyType(tensors),
        header_bytes=sum(part.header_bytes for part in parts),
        header_bytes_read=sum(part.header_bytes_read for part in parts),
        file_bytes=tuple(part.file_bytes[0] for part in parts),
        identities=tuple(part.identities[0] for part in parts),
    )
