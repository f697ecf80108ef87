"""GGUF files built byte by byte, so that a test can write any field wrong; shares no code with the parser."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import attrs

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes, *, length: int | None = None) -> bytes:
    """Return a string field; `length` overrides the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key_value(key: str | bytes, type_: int, payload: bytes, *, key_length: int | None = None) -> bytes:
    """Return one metadata entry of a value type and its raw payload."""
    return string(key, length=key_length) + struct.pack("<I", type_) + payload


def scalar(key: str | bytes, type_: int, value: float) -> bytes:
    """Return one metadata entry with a number or bool."""
    return key_value(key, type_, struct.pack("<" + FORMATS[type_], value))


def text(key: str | bytes, value: str | bytes, *, length: int | None = None) -> bytes:
    """Return one metadata entry with a string."""
    return key_value(key, STRING, string(value, length=length))


def array(key: str | bytes, element: int, values: Sequence[float], *, count: int | None = None) -> bytes:
    """Return one metadata entry with an array of numbers or bools; `count` overrides the true one."""
    head = struct.pack("<IQ", element, len(values) if count is None else count)
    return key_value(key, ARRAY, head + struct.pack(f"<{len(values)}{FORMATS.get(element, 'B')}", *values))


def strings(key: str | bytes, values: Iterable[str | bytes], *, count: int | None = None) -> bytes:
    """Return one metadata entry with an array of strings; `count` overrides the true one."""
    fields = [string(value) for value in values]
    return key_value(key, ARRAY, struct.pack("<IQ", STRING, len(fields) if count is None else count) + b"".join(fields))


@attrs.frozen
class Tensor:
    """A tensor info: by default float32 of 4 x 8, laid out after the one before; every field can be overridden."""

    name: str | bytes = "t"
    dims: Sequence[int] = (8, 4)  # fastest first, as in the file
    type: int = 0
    offset: int | None = None
    n_bytes: int = 128  # of data to write for it
    n_dims: int | None = None
    name_length: int | None = None


def build(
    entries: Iterable[bytes] = (),
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
    data: bytes | None = None,
) -> bytes:
    """Return the bytes of a file; the data of all tensors is the byte pattern 1, 2, 3, ... unless `data` is given.

    `alignment` only lays out the data; the key that says it is an entry like any other.
    """
    entries = list(entries)
    tensors = list(tensors)
    infos = []
    end = 0
    for tensor in tensors:
        start = -(-end // alignment) * alignment
        end = start + tensor.n_bytes
        n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
        offset = start if tensor.offset is None else tensor.offset
        infos.append(
            string(tensor.name, length=tensor.name_length)
            + struct.pack(f"<I{len(tensor.dims)}QIQ", n_dims, *tensor.dims, tensor.type, offset)
        )
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_keys is None else n_keys,
    )
    head += b"".join(entries) + b"".join(infos)
    if not tensors:
        return head
    padding = bytes(-len(head) % alignment)
    return head + padding + (bytes(1 + i % 255 for i in range(end)) if data is None else data)
