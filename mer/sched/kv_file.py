"""Files with the KV of a prefix; the format is described in docs/prefix-reuse.md. Synchronous: run it in a thread."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import attrs
import numpy as np
import numpy.typing as npt

from mer.compute.state import DIGEST_BYTES, StateLayout
from mer.errors import SavedFileError, naming
from mer.io.new_file import NewFile
from mer.io.patient import open_regular
from mer.sched.fingerprint import FINGERPRINT_BYTES

MAGIC: Final = b"MERKVPFX"
VERSION: Final = 4
TOKEN_BYTES: Final = 4
_HEADER: Final = struct.Struct(f"<8sHH{DIGEST_BYTES}sIIQ16s16s{FINGERPRINT_BYTES}s")
_CHECKSUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size

Bytes = npt.NDArray[np.uint8]


class PrefixFileError(SavedFileError):
    """A file with a saved prefix cannot be used, or is too large."""


def _name(_instance: Any, attribute: attrs.Attribute[Any], value: str) -> None:
    if not value.isascii() or not value.isprintable() or not 1 <= len(value) <= 16:
        raise ValueError(f"{attribute.name} must be 1 to 16 printable ASCII characters, not {value!r}")


@attrs.frozen(kw_only=True)
class KVLayout:
    """Meaning of the bytes of a block: two engines with the same layout compute the same bytes for the same tokens."""

    fingerprint: bytes  # of the model, see `model_fingerprint`
    kv_type: str = attrs.field(validator=_name)  # "f32", "f16" or "q8_0" (docs/prefix-reuse.md), all numbers finite
    arithmetic: str = attrs.field(validator=_name)  # precision of activations that meet the weights
    state: StateLayout  # what of a block is each layer's

    @property
    def block_tokens(self) -> int:
        """Positions in a block."""
        return self.state.block_tokens

    @property
    def block_bytes(self) -> int:
        """Bytes of what all layers keep for these positions."""
        return self.state.block_bytes

    def encode(self, n_blocks: int) -> bytes:
        """Return the header of a file of so many blocks."""
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            0,
            self.state.digest,
            self.block_tokens,
            n_blocks,
            self.block_bytes,
            self.kv_type.encode(),
            self.arithmetic.encode(),
            self.fingerprint,
        )
        return header + _CHECKSUM.pack(zlib.crc32(header))

    def is_finite(self, block: Bytes) -> bool:
        """Return whether all floats in a block's bytes are finite; bytes of a type that is not known are."""
        if self.kv_type in ("f32", "f16"):
            return bool(np.isfinite(block.view("<f4" if self.kv_type == "f32" else "<f2")).all())
        if self.kv_type == "q8_0":
            return all(np.isfinite(scales.view("<f2")).all() for scales in self._scales(block))
        return True

    def _scales(self, block: Bytes) -> Iterator[Bytes]:
        """Yield the bytes of each tile's scales: an int8 for each of 32 values lie before a scale of two bytes."""
        at = 0
        for layer in self.state.layers:
            for n_bytes in (layer.key_bytes,) * layer.heads + (layer.value_bytes,) * layer.heads:
                yield block[at + n_bytes * 32 // 34 : at + n_bytes]
                at += n_bytes

    def file_bytes(self, n_blocks: int) -> int:
        """Return the size of a file of so many blocks."""
        tokens = n_blocks * self.block_tokens * TOKEN_BYTES
        return HEADER_BYTES + tokens + _CHECKSUM.size + n_blocks * (self.block_bytes + _CHECKSUM.size)


class PrefixWriter:
    """Writes a prefix to a temporary file beside `path`, which `commit` puts in its place.

    A context manager: leaving it without `commit` removes the temporary file, and `path` is as it was.

    Args:
        path: the file to be; one that is there is replaced.
        layout: what the blocks mean.
        tokens: of the prefix, whole blocks.
    """

    def __init__(self, path: str | os.PathLike[str], layout: KVLayout, tokens: Sequence[int]) -> None:
        self.path = Path(path)
        self._layout = layout
        self._tokens = tokens
        self._file: NewFile | None = None
        self._checksum = 0

    def __enter__(self) -> Self:
        return self

    def begin(self) -> None:
        """Create the temporary file and write all that comes before the blocks.

        Raises:
            OSError: it cannot be written.
        """
        self._file = NewFile(self.path)
        header = self._layout.encode(len(self._tokens) // self._layout.block_tokens)
        self._write(header)
        (self._checksum,) = _CHECKSUM.unpack(header[-_CHECKSUM.size :])
        self._write_checked(np.array(self._tokens, "<i4").tobytes())

    def write(self, block: Bytes) -> None:
        """Write the next block.

        Raises:
            OSError: it cannot be written.
        """
        self._write_checked(block.data)

    def commit(self) -> None:
        """Bring everything to the disk and put the file in its place.

        Raises:
            OSError: that failed; unless only the folder could not be brought to the disk, `path` is as it was.
        """
        assert self._file is not None
        self._file.commit()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _write_checked(self, data: bytes | memoryview) -> None:
        """Write data and then the checksum of everything so far."""
        self._checksum = zlib.crc32(data, self._checksum)
        self._write(data)
        self._write(_CHECKSUM.pack(self._checksum))

    def _write(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        self._file.write(data)


class PrefixReader:
    """Reads a prefix from a file that nobody vouches for; a context manager.

    Nothing is allocated or believed before it is checked: the header against `layout`, its numbers against the size of
    the file, and every part against the checksum of all that comes before it.

    Args:
        path: the file.
        layout: of the engine that wants it.
        most_blocks: KV blocks that the engine has.
    """

    def __init__(self, path: str | os.PathLike[str], layout: KVLayout, most_blocks: int) -> None:
        self.path = Path(path)
        self.n_blocks = 0
        self.tokens: tuple[int, ...] = ()
        self._layout = layout
        self._most_blocks = most_blocks
        self._file = -1
        self._checksums: list[int] = []  # of everything before each block, and at last of everything

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file >= 0:
            os.close(self._file)

    def begin(self) -> None:
        """Open the file, and read and check all that comes before the blocks.

        Raises:
            PrefixFileError: the file cannot be used.
            OSError: it cannot be opened or read.
        """
        self._file, status = open_regular(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise self._error(None, "no regular file; give one that was written by save_prefix or --prefix")
        header = self._read(0, min(HEADER_BYTES, status.st_size)).tobytes()
        if header[: len(MAGIC)] != MAGIC:
            raise self._error(0, f"no saved prefix: it does not begin with {MAGIC!r}")
        if len(header) < HEADER_BYTES:
            raise self._error(len(header), "the header of this saved prefix is cut off")
        self._check(header)
        expected = self._layout.file_bytes(self.n_blocks)
        if status.st_size != expected:
            raise self._error(
                min(expected, status.st_size),
                f"{self.n_blocks} blocks take {expected} bytes, the file has {status.st_size}: it is damaged",
            )
        n_bytes = self.n_blocks * self._layout.block_tokens * TOKEN_BYTES
        (checksum,) = _CHECKSUM.unpack(header[-_CHECKSUM.size :])
        tokens, checksum = self._read_checked(HEADER_BYTES, n_bytes, checksum)
        self.tokens = tuple(tokens.view("<i4").tolist())
        self._checksums = [checksum]

    def verify(self) -> None:
        """Read all blocks and check them, so that a damaged file is known before anything else is done.

        Raises:
            PrefixFileError: a block is damaged.
            OSError: the file cannot be read.
        """
        for index in range(self.n_blocks):
            self.read(index)

    def read(self, index: int) -> Bytes:
        """Return a block, checked; the first time the blocks are read in order.

        Raises:
            PrefixFileError: the block is damaged.
            OSError: the file cannot be read.
        """
        layout = self._layout
        offset = layout.file_bytes(0) + layout.block_tokens * TOKEN_BYTES * self.n_blocks
        offset += index * (layout.block_bytes + _CHECKSUM.size)
        block, checksum = self._read_checked(offset, layout.block_bytes, self._checksums[index])
        if index + 1 == len(self._checksums):
            self._checksums.append(checksum)
        if not layout.is_finite(block):
            raise self._error(offset, f"block {index} holds NaN or infinity; no engine saves that")
        return block

    def _check(self, header: bytes) -> None:
        """Check a whole header against the layout, and take the number of blocks from it."""
        _, version, flags, *fields = _HEADER.unpack(header[: _HEADER.size])
        if version != VERSION or flags:
            raise self._error(
                8, f"a saved prefix of version {version}, flags {flags}; this release reads {VERSION} without flags"
            )
        if zlib.crc32(header[: _HEADER.size]) != int.from_bytes(header[_HEADER.size :], "little"):
            raise self._error(_HEADER.size, "the header of this saved prefix is damaged: its checksum is wrong")
        digest, block_tokens, n_blocks, block_bytes, kv_type, arithmetic, fingerprint = fields
        layout = self._layout
        if fingerprint != layout.fingerprint or block_tokens != layout.block_tokens:
            raise self._error(None, "the prefix of another model; save one with this model")
        if kv_type.rstrip(b"\0") != layout.kv_type.encode():
            raise self._error(
                None,
                f"it holds {ascii(kv_type.rstrip(bytes(1)))[2:-1]} keys and values, and this engine keeps "
                f"{layout.kv_type}; open the engine with the same kv_type, or save the prefix again",
            )
        if arithmetic.rstrip(b"\0") != layout.arithmetic.encode():
            raise self._error(
                None,
                f"computed with {ascii(arithmetic.rstrip(bytes(1)))[2:-1]} activations, and this engine computes with "
                f"{layout.arithmetic}; open the engine with the same, or save the prefix again",
            )
        if digest != layout.state.digest:  # after the type of the values, which decides it too
            raise self._error(
                None, "the prefix of another model, whose layers divide a block otherwise; save one with this model"
            )
        if block_bytes != layout.block_bytes:
            raise self._error(
                None, f"its blocks have {block_bytes} bytes, those of this model {layout.block_bytes}: it is damaged"
            )
        if not 1 <= n_blocks <= self._most_blocks:
            raise self._error(
                28,
                f"{n_blocks} blocks of {block_tokens} tokens; this engine has KV memory for {self._most_blocks}: "
                "raise the memory, or the context",
            )
        self.n_blocks = n_blocks

    def _read_checked(self, offset: int, n_bytes: int, before: int) -> tuple[Bytes, int]:
        """Return bytes that the checksum of them and all before them follows, and this checksum."""
        data = self._read(offset, n_bytes)
        checksum = zlib.crc32(data.data, before)
        if checksum != int.from_bytes(self._read(offset + n_bytes, _CHECKSUM.size).tobytes(), "little"):
            raise self._error(offset + n_bytes, "damaged: a checksum is wrong")
        return data, checksum

    def _read(self, offset: int, n_bytes: int) -> Bytes:
        data = np.empty(n_bytes, np.uint8)
        done = 0
        while done < n_bytes:
            with naming(self.path):
                n_read = os.preadv(self._file, [data[done:].data], offset + done)
            if not n_read:
                raise self._error(offset + done, "the file became shorter while it was read")
            done += n_read
        return data

    def _error(self, offset: int | None, reason: str) -> PrefixFileError:
        return PrefixFileError(self.path, offset, reason)
