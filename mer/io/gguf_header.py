"""The header of one GGUF file: walked and checked whole before any value is built.

Layout, all little-endian (the format's description is docs/gguf.md in ggml): magic "GGUF", u32 version, u64 number of
tensors, u64 number of keys; the keys; the tensor infos; padding to the alignment; tensor data. A string is a u64 length
and that many bytes. The structural pass touches every length without creating values, so that a damaged file costs
neither memory nor time for what it holds before the damage; only then are the values decoded, which cannot fail.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import attrs
import numpy as np

from mer.io.ggml import BLOCKS, REMOVED_TYPES, GGMLType
from mer.io.gguf_file import GGUFFile, MetadataValue, TensorInfo
from mer.io.gguf_source import HeaderLimits, HeaderSource
from mer.limits import (
    MAX_ALIGNMENT,
    MAX_DIMS,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME_BYTES,
    MAX_STRINGS,
)
from mer.quoting import quoted
from mer.units import format_bytes

DEFAULT_ALIGNMENT = 32
MIN_KEY_ENTRY_BYTES = 8 + 1 + 4 + 1  # length, one character, type, bool
MIN_TENSOR_ENTRY_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, one character, n_dims, one dimension, type, offset
MAX_INT64 = 2**63 - 1

BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: Mapping[int, tuple[str, struct.Struct]] = MappingProxyType(
    {
        0: ("uint8", struct.Struct("<B")),
        1: ("int8", struct.Struct("<b")),
        2: ("uint16", struct.Struct("<H")),
        3: ("int16", struct.Struct("<h")),
        4: ("uint32", struct.Struct("<I")),
        5: ("int32", struct.Struct("<i")),
        6: ("float32", struct.Struct("<f")),
        BOOL: ("bool", struct.Struct("<?")),
        10: ("uint64", struct.Struct("<Q")),
        11: ("int64", struct.Struct("<q")),
        12: ("float64", struct.Struct("<d")),
    }
)
UINT32 = 4
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # GGML, GGMF, GGJT and GGLA, which GGUF replaced
PACKED: Mapping[bytes, str] = MappingProxyType(
    {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
)

_header = struct.Struct("<4sIQQ")
_u32 = struct.Struct("<I").unpack_from
_u64 = struct.Struct("<Q").unpack_from
_array = struct.Struct("<IQ").unpack_from
_dims_type_offset = {n: struct.Struct(f"<{n}QIQ").unpack_from for n in range(1, MAX_DIMS + 1)}
_types = {int(type_): (type_, *blocks) for type_, blocks in BLOCKS.items()}


@attrs.frozen
class _Field:
    """Where a key's value lies; its structure is checked."""

    type: int
    offset: int  # of the value, directly after its type
    element: int = -1  # the type of an array's elements
    count: int = 1


_Found: TypeAlias = tuple[int, int, int, str, GGMLType, tuple[int, ...]]
"""A tensor info whose extent is not yet compared with the others' and with the file: its offset from the start of the
tensor data, its bytes, where the file says the offset (which is unique), name, type, and dimensions, fastest first."""


def read_part(path: Path, index: int, limits: HeaderLimits) -> GGUFFile:
    """Return the header of the one file at `path`, with `TensorInfo.file` set to `index`.

    Args:
        path: the file.
        index: of this part.
        limits: what is left of them; what the file holds is taken off.

    Raises:
        GGUFError: the file is no well-formed GGUF v2 or v3, little-endian, or its tensors do not fit in it.
        ReadError: the operating system fails to read it.
    """
    with HeaderSource(path, limits) as source:
        version, n_tensors, n_keys = _read_counts(source)
        fields, at = _walk_keys(source, n_keys)
        alignment = _alignment(source, fields)
        tensors, header_bytes = _walk_tensors(source, at, n_tensors, alignment, index)
        limits.n_bytes -= header_bytes
        limits.n_tensors -= n_tensors
        limits.n_strings -= sum(field.count for field in fields.values() if field.element == STRING)
        names = {key: _type_name(field) for key, field in fields.items()}
        values = {key: _decode(source.data, field) for key, field in fields.items()}
        return GGUFFile(
            paths=(path,),
            version=version,
            alignment=alignment,
            metadata=MappingProxyType(values),
            tensors=MappingProxyType(tensors),
            header_bytes=header_bytes,
            header_bytes_read=len(source.data),
            file_bytes=(source.file_bytes,),
            identities=(source.identity,),
            value_types=MappingProxyType(names),
            value_offsets=MappingProxyType({key: field.offset for key, field in fields.items()}),
        )


def _read_counts(source: HeaderSource) -> tuple[int, int, int]:
    source.need(min(8, source.file_bytes), 0, "the header")
    magic = source.data[:4]
    if magic in OLD_MAGICS:
        raise source.error(0, "is in a GGML format older than GGUF; convert the original model again")
    if magic == b"vers" and source.data.startswith(b"version https://git-lfs"):
        raise source.error(0, "is a Git LFS pointer, not the model; run 'git lfs pull' or download the file itself")
    packed = next((name for start, name in PACKED.items() if source.data.startswith(start)), None)
    if packed is not None:
        raise source.error(0, f"is packed with {packed}; unpack it, as weights are read where they lie")
    if magic != b"GGUF":
        raise source.error(0, f"is no GGUF file: it starts with {quoted(magic)} instead of b'GGUF'")
    source.need(8, 4, "the version")
    (version,) = _u32(source.data, 4)
    if version and not version & 0xFFFF:
        raise source.error(4, "is a big-endian GGUF file; convert the original model again, as little-endian")
    if version not in (2, 3):
        advice = "convert the original model again" if version < 2 else "this version of mer is too old for it"
        raise source.error(4, f"is GGUF version {version}, and only 2 and 3 can be read: {advice}")
    source.need(_header.size, 8, "the header")
    _, _, n_tensors, n_keys = _header.unpack_from(source.data)
    rest = source.file_bytes - _header.size
    possible = min(source.limits.n_tensors, rest // MIN_TENSOR_ENTRY_BYTES)
    if n_tensors > possible:
        raise source.error(8, f"claims {n_tensors} tensors; at most {possible} are possible in this file")
    possible = min(MAX_KEYS, rest // MIN_KEY_ENTRY_BYTES)
    if n_keys > possible:
        raise source.error(16, f"claims {n_keys} metadata keys; at most {possible} are possible in this file")
    return version, n_tensors, n_keys


def _walk_keys(source: HeaderSource, n_keys: int) -> tuple[dict[str, _Field], int]:
    """Check the structure of all keys and values; return where they lie, and the offset after the last."""
    fields: dict[str, _Field] = {}
    n_strings = 0
    at = _header.size
    for _ in range(n_keys):
        key, type_at = _read_name(source, at, MAX_KEY_BYTES, "a metadata key")
        if key in fields:
            raise source.error(at, f"the metadata key {quoted(key)} appears twice")
        (value_type,) = _u32(source.data, type_at)
        offset = type_at + 4
        scalar = SCALARS.get(value_type)
        if scalar is not None:
            at = offset + scalar[1].size
            if at > len(source.data):
                source.need(at, offset, f"the value of {quoted(key)}")
            if value_type == BOOL and source.data[offset] > 1:
                what = f"{quoted(key)} is a bool of value {source.data[offset]}"
                raise source.error(offset, f"{what}; only 0 and 1 are bools")
            fields[key] = _Field(value_type, offset)
        elif value_type == STRING:
            source.need(offset + 8, offset, f"the length of {quoted(key)}")
            at = offset + 8 + _u64(source.data, offset)[0]
            source.need(at, offset, f"the string {quoted(key)}")
            fields[key] = _Field(STRING, offset)
        elif value_type == ARRAY:
            fields[key], at = _walk_array(source, key, offset, source.limits.n_strings - n_strings)
            if fields[key].element == STRING:
                n_strings += fields[key].count
        else:
            raise source.error(type_at, f"{quoted(key)} has the unknown value type {value_type}")
    return fields, at


def _walk_array(source: HeaderSource, key: str, offset: int, max_strings: int) -> tuple[_Field, int]:
    shown = quoted(key)
    source.need(offset + 12, offset, f"the array {shown}")
    element, count = _array(source.data, offset)
    at = offset + 12
    scalar = SCALARS.get(element)
    if scalar is not None:
        end = at + count * scalar[1].size
        source.need(end, offset, f"the array {shown} of {count} {scalar[0]}")
        if element == BOOL and source.data[at:end].translate(None, b"\x00\x01"):
            raise source.error(offset, f"{shown} is an array of bools with a value that is neither 0 nor 1")
        return _Field(ARRAY, offset, element, count), end
    if element == ARRAY:
        raise source.error(offset, f"{shown} is an array of arrays; only arrays of scalars or strings can be read")
    if element != STRING:
        raise source.error(offset, f"{shown} is an array of the unknown value type {element}")
    if at + count * 8 > source.file_bytes:
        raise source.error(offset, f"{shown} claims {count} strings, but the file has {source.file_bytes} bytes")
    if count > max_strings:
        raise source.error(
            offset, f"{shown} has {count} strings; the arrays of a model may hold {MAX_STRINGS} together"
        )
    return _Field(ARRAY, offset, element, count), _skip_strings(source, key, at, count)


def _skip_strings(source: HeaderSource, key: str, at: int, count: int) -> int:
    """Return the offset after `count` strings that start at `at`; the hot loop of the structural pass."""
    block = 4096
    unpack = _u64
    for first in range(0, count, block):
        n = min(block, count - first)
        data = source.data
        n_empty = _leading_empty(data, at, n)
        at += 8 * n_empty
        start = at
        try:
            for _ in range(n - n_empty):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            at = len(data) + 1  # a length field lies beyond what is read so far
        if at > len(data):
            at = start
            shown = quoted(key)
            for index in range(first + n_empty, first + n):
                source.need(at + 8, at, f"the length of string {index} of {shown}")
                end = at + 8 + unpack(source.data, at)[0]
                source.need(end, at, f"string {index} of {shown}")
                at = end
    return at


def _leading_empty(data: bytes, at: int, count: int) -> int:
    """Return how many of `count` strings are empty before the first that is not: a file may be a million of them."""
    if data[at : at + 16] != bytes(16):
        return 0
    lengths = np.frombuffer(data, "<u8", min(count, (len(data) - at) // 8), at)
    return int(lengths.astype(bool).argmax()) if lengths.any() else len(lengths)


def _alignment(source: HeaderSource, fields: Mapping[str, _Field]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return DEFAULT_ALIGNMENT
    if field.type != UINT32:
        raise source.error(field.offset, f"'general.alignment' has the type {_type_name(field)}; it must be uint32")
    (value,) = _u32(source.data, field.offset)
    if not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        limit = format_bytes(MAX_ALIGNMENT)
        raise source.error(field.offset, f"'general.alignment' is {value}; it must be a power of two up to {limit}")
    return int(value)


def _walk_tensors(
    source: HeaderSource, at: int, n_tensors: int, alignment: int, index: int
) -> tuple[dict[str, TensorInfo], int]:
    """Check all tensor infos and their extents; return them in file order, and the offset after the last."""
    found: dict[str, _Found] = {}
    for _ in range(n_tensors):
        name, dims_at = _read_name(source, at, MAX_NAME_BYTES, "a tensor name")
        if name in found:
            raise source.error(at, f"the tensor {quoted(name)} appears twice")
        (n_dims,) = _u32(source.data, dims_at)
        unpack = _dims_type_offset.get(n_dims)
        if unpack is None:
            what = f"the tensor {quoted(name)} has {n_dims} dimensions"
            raise source.error(dims_at, f"{what}; it must have 1 to {MAX_DIMS}")
        at = dims_at + 4 + 8 * n_dims + 12
        if at > len(source.data):
            source.need(at, dims_at, f"the description of the tensor {quoted(name)}")
        info = unpack(source.data, dims_at + 4)
        dims, type_id, offset = info[:n_dims], info[-2], info[-1]
        elements = prod(dims)
        if not 0 < elements <= MAX_INT64:
            what = f"the tensor {quoted(name)} has the dimensions {list(dims)}"
            raise source.error(dims_at + 4, f"{what}; each must be positive and their product below 2**63")
        known = _types.get(type_id)
        if known is None:
            old = REMOVED_TYPES.get(type_id)
            what = f"type {old}, which ggml removed" if old else f"unknown type {type_id}"
            raise source.error(at - 12, f"the tensor {quoted(name)} has the {what}; quantize the original model again")
        type_, block_size, block_bytes = known
        if dims[0] % block_size:
            what = f"the tensor {quoted(name)} has rows of {dims[0]}"
            raise source.error(dims_at + 4, f"{what}; {type_.name} needs a multiple of {block_size}")
        if offset % alignment:
            raise source.error(
                at - 8, f"the tensor {quoted(name)} has the offset {offset}; it must be a multiple of {alignment}"
            )
        found[name] = offset, elements // block_size * block_bytes, at - 8, name, type_, dims
    data_start = -(-at // alignment) * alignment
    _check_extents(source, data_start, found.values())
    tensors = {
        name: TensorInfo(name, dims[::-1], type_, index, data_start + offset, n_bytes)
        for offset, n_bytes, _, name, type_, dims in found.values()
    }
    return tensors, at


def _check_extents(source: HeaderSource, data_start: int, found: Iterable[_Found]) -> None:
    end = 0
    before = ""
    for offset, n_bytes, stored_at, name, _, _ in sorted(found):  # by offset; `stored_at` breaks ties
        if offset < end:
            both = f"{quoted(before, 40)} and {quoted(name, 40)}"
            raise source.error(stored_at, f"the tensors {both} overlap at byte {data_start + offset}")
        end = offset + n_bytes
        before = name
        if data_start + end > source.file_bytes:
            raise source.error(
                stored_at,
                f"the tensor {quoted(name)} takes bytes {data_start + offset} to {data_start + end}, but the file has "
                f"{source.file_bytes}: it is truncated or damaged",
            )


def _read_name(source: HeaderSource, at: int, max_bytes: int, what: str) -> tuple[str, int]:
    """Return the strict UTF-8 string at `at` and the offset after it, with at least four bytes readable there."""
    if at + 8 > len(source.data):
        source.need(at + 8, at, f"the length of {what}")
    (length,) = _u64(source.data, at)
    if not 0 < length <= max_bytes:
        raise source.error(at, f"{what} has a length of {length} bytes; it must have 1 to {max_bytes}")
    end = at + 8 + length
    if end + 4 > len(source.data):
        source.need(end + 4, at, what)
    raw = source.data[at + 8 : end]
    try:
        return raw.decode(), end
    except UnicodeDecodeError as error:
        raise source.error(at + 8 + error.start, f"{what} is not UTF-8: {quoted(raw)}") from error


def _type_name(field: _Field) -> str:
    if field.type == ARRAY:
        return "array of strings" if field.element == STRING else f"array of {SCALARS[field.element][0]}"
    return "string" if field.type == STRING else SCALARS[field.type][0]


def _decode(data: bytes, field: _Field) -> MetadataValue:
    """Return the value of a field whose structure is checked; nothing in it refers to `data`."""
    at = field.offset
    if field.type == STRING:
        return data[at + 8 : at + 8 + _u64(data, at)[0]].decode("utf-8", "surrogateescape")
    if field.type != ARRAY:
        value: bool | int | float = SCALARS[field.type][1].unpack_from(data, at)[0]
        return value
    at += 12
    if field.element == STRING:
        return _decode_strings(data, at, field.count)
    dtype = np.dtype(SCALARS[field.element][1].format)
    array = np.ndarray(field.count, dtype, buffer=data, offset=at).copy()
    array.flags.writeable = False
    return array


def _decode_strings(data: bytes, at: int, count: int) -> list[str]:
    n_empty = _leading_empty(data, at, count)
    at += 8 * n_empty
    strings = [""] * n_empty
    append = strings.append
    unpack = _u64
    for _ in range(count - n_empty):
        start = at + 8
        at = start + unpack(data, at)[0]
        append(data[start:at].decode("utf-8", "surrogateescape"))
    return strings
