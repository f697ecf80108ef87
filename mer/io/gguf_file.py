"""GGUF header as values: tensors with their extents, and typed getters of metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar, overload

import attrs
import numpy as np
from numpy.typing import NDArray

from mer.errors import GGUFError
from mer.io.ggml import GGMLType
from mer.io.identity import FileIdentity
from mer.quoting import quoted

MetadataValue = bool | int | float | str | list[str] | NDArray[np.generic]
"""A metadata value: arrays of strings are lists, arrays of numbers and of bools are read-only NumPy arrays."""

D = TypeVar("D")


@attrs.frozen
class _Required:
    """Stands for "no default was given"."""


REQUIRED: Final = _Required()


@attrs.frozen
class TensorInfo:
    """One tensor's type, shape and extent; the extent is proven to lie inside its file and to overlap no other."""

    name: str
    shape: tuple[int, ...]  # slowest dimension first: (rows, cols), merged experts (E, rows, cols)
    type: GGMLType
    file: int  # index into GGUFFile.paths
    offset: int  # of the first byte, from the start of that file
    n_bytes: int


@attrs.frozen(eq=False)
class GGUFFile:
    """The header of a GGUF model: one file, or all parts of a split one.

    `metadata` is that of the first part. The getters return a value of the type asked for or raise; `default` is
    returned only for a key that is missing, never for one of the wrong type.
    """

    paths: tuple[Path, ...]  # in the order of the parts
    version: int
    alignment: int  # of tensor data, in bytes
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]  # in file order
    header_bytes_read: int  # what was read of the files to get here
    header_bytes: int  # metadata and tensor infos, without the padding after them, summed over the parts
    file_bytes: tuple[int, ...]  # of each part
    identities: tuple[FileIdentity, ...]  # of each part, as it was when its header was read
    value_types: Mapping[str, str] = attrs.field(repr=False)  # {key: "uint32", "string", "array of float32", ...}
    value_offsets: Mapping[str, int] = attrs.field(repr=False)  # {key: byte offset of its value in paths[0]}

    def error(self, key: str, reason: str) -> GGUFError:
        """Return an error about the value of `key` that carries its byte offset; the caller raises it."""
        return GGUFError(self.paths[0], self.value_offsets.get(key), f"{quoted(key)} {reason}")

    @overload
    def get_int(self, key: str, *, minimum: int | None = ..., maximum: int | None = ...) -> int: ...
    @overload
    def get_int(self, key: str, default: D, *, minimum: int | None = ..., maximum: int | None = ...) -> int | D: ...
    def get_int(
        self, key: str, default: D | _Required = REQUIRED, *, minimum: int | None = None, maximum: int | None = None
    ) -> int | D:
        """Return the integer `key`, checked against the bounds (both inclusive).

        Raises:
            GGUFError: the key is missing and has no default, is no integer, or is out of bounds.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_type(key, "an integer")
        self._check_bounds(key, value, minimum, maximum)
        return value

    @overload
    def get_float(self, key: str, *, minimum: float | None = ..., maximum: float | None = ...) -> float: ...
    @overload
    def get_float(
        self, key: str, default: D, *, minimum: float | None = ..., maximum: float | None = ...
    ) -> float | D: ...
    def get_float(
        self, key: str, default: D | _Required = REQUIRED, *, minimum: float | None = None, maximum: float | None = None
    ) -> float | D:
        """Return the float `key`, which must be finite and within the bounds (both inclusive).

        Raises:
            GGUFError: the key is missing and has no default, is no float, is NaN or infinite, or is out of bounds.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, float):
            raise self._wrong_type(key, "a float")
        if not math.isfinite(value):
            raise self.error(key, f"is {value}; it must be finite")
        self._check_bounds(key, value, minimum, maximum)
        return value

    @overload
    def get_str(self, key: str) -> str: ...
    @overload
    def get_str(self, key: str, default: D) -> str | D: ...
    def get_str(self, key: str, default: D | _Required = REQUIRED) -> str | D:
        """Return the string `key`; bytes that are not UTF-8 are lone surrogates in it ("surrogateescape").

        Raises:
            GGUFError: the key is missing and has no default, or is no string.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, str):
            raise self._wrong_type(key, "a string")
        return value

    @overload
    def get_bool(self, key: str) -> bool: ...
    @overload
    def get_bool(self, key: str, default: D) -> bool | D: ...
    def get_bool(self, key: str, default: D | _Required = REQUIRED) -> bool | D:
        """Return the bool `key`.

        Raises:
            GGUFError: the key is missing and has no default, or is no bool.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, bool):
            raise self._wrong_type(key, "a bool")
        return value

    @overload
    def get_strings(self, key: str) -> list[str]: ...
    @overload
    def get_strings(self, key: str, default: D) -> list[str] | D: ...
    def get_strings(self, key: str, default: D | _Required = REQUIRED) -> list[str] | D:
        """Return a copy of the array of strings `key`, decoded as `get_str` does.

        Raises:
            GGUFError: the key is missing and has no default, or is no array of strings.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, list):
            raise self._wrong_type(key, "an array of strings")
        return value.copy()

    @overload
    def get_ints(self, key: str) -> NDArray[np.int64]: ...
    @overload
    def get_ints(self, key: str, default: D) -> NDArray[np.int64] | D: ...
    def get_ints(self, key: str, default: D | _Required = REQUIRED) -> NDArray[np.int64] | D:
        """Return the array `key` of integers of any width as a read-only int64 array of shape (count,).

        Raises:
            GGUFError: the key is missing and has no default, is no array of integers, or holds a value over 2**63 - 1.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self._wrong_type(key, "an array of integers")
        if value.dtype == np.uint64 and value.size and int(value.max()) >= 2**63:
            raise self.error(key, f"holds {int(value.max())} at index {int(value.argmax())}, which does not fit int64")
        return _read_only(value.astype(np.int64))

    @overload
    def get_floats(self, key: str) -> NDArray[np.float64]: ...
    @overload
    def get_floats(self, key: str, default: D) -> NDArray[np.float64] | D: ...
    def get_floats(self, key: str, default: D | _Required = REQUIRED) -> NDArray[np.float64] | D:
        """Return the array `key` of float32 or float64, all finite, as a read-only float64 array of shape (count,).

        Raises:
            GGUFError: the key is missing and has no default, is no array of floats, or holds NaN or an infinity.
        """
        value = self.metadata.get(key)
        if value is None:
            return self._default(key, default)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise self._wrong_type(key, "an array of floats")
        finite = np.isfinite(value)
        if not finite.all():
            index = int(finite.argmin())
            raise self.error(key, f"holds {float(value[index])} at index {index}; every element must be finite")
        return _read_only(value.astype(np.float64))

    def _default(self, key: str, default: D | _Required) -> D:
        if isinstance(default, _Required):
            raise GGUFError(self.paths[0], None, f"the metadata lacks the key {quoted(key)}")
        return default

    def _wrong_type(self, key: str, wanted: str) -> GGUFError:
        return self.error(key, f"has the type {self.value_types[key]}; it must be {wanted}")

    def _check_bounds(self, key: str, value: float, minimum: float | None, maximum: float | None) -> None:
        if minimum is not None and value < minimum:
            raise self.error(key, f"is {value}; it must be at least {minimum}")
        if maximum is not None and value > maximum:
            raise self.error(key, f"is {value}; it must be at most {maximum}")


Scalar = TypeVar("Scalar", bound=np.generic)


def _read_only(array: NDArray[Scalar]) -> NDArray[Scalar]:
    array.flags.writeable = False
    return array
