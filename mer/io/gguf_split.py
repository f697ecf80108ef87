"""Models split over several GGUF files, as `llama-gguf-split` writes them: finding and joining the parts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import MappingProxyType

import attrs

from mer.errors import GGUFError
from mer.io.gguf_file import GGUFFile, TensorInfo
from mer.io.gguf_header import read_part

_PART_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 2**16 - 1  # split.count is a uint16


def read_all_parts(path: Path) -> GGUFFile:
    """Return the joined header of the model that the file at `path` is, or is any part of.

    Parts lie in one folder and are named MODEL-00001-of-00003.gguf; the keys `split.no` (from 0), `split.count` and
    `split.tensors.count` must agree with the names. Metadata is taken from the first part.

    Raises:
        GGUFError: a part is malformed, missing, given twice, or belongs to another model.
        ReadError: the operating system fails to read a part.
    """
    given = read_part(path, 0)
    count = given.get_int("split.count", 1, minimum=1, maximum=_MAX_PARTS)
    number = given.get_int("split.no", 0, minimum=0, maximum=count - 1)
    match = _PART_NAME.fullmatch(path.name)
    if count == 1:
        if match and int(match["count"]) > 1:
            named = f"is named as one of {int(match['count'])} parts"
            raise GGUFError(
                path, None, f"{named}, but its metadata does not say so ('split.count'); rename a whole model"
            )
        return given
    if match is None or int(match["count"]) != count:
        name = f"MODEL-{number + 1:05}-of-{count:05}.gguf"
        raise given.error("split.count", f"is {count}, so the file must have a name like {name}")
    parts: list[GGUFFile] = []
    for index in range(count):
        part_path = path.with_name(f"{match['model']}-{index + 1:05}-of-{count:05}.gguf")
        if index == 0 and part_path == path:
            part = given
        elif os.path.lexists(part_path):
            part = read_part(part_path, index)
        else:
            raise GGUFError(part_path, None, f"part {index + 1} of {count} is missing; all parts must be in one folder")
        _check_part(part, index, count, parts[0] if parts else part)
        parts.append(part)
    return _join(parts)


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
            raise part.error(key, f"is {here!r}, but {there!r} in {first.paths[0].name}: they are parts of two models")


def _join(parts: list[GGUFFile]) -> GGUFFile:
    first = parts[0]
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for name, info in part.tensors.items():
            if name in tensors:
                other = parts[tensors[name].file].paths[0].name
                raise GGUFError(part.paths[0], None, f"the tensor {name!r} is also in {other}")
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
