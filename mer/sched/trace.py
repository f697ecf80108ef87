"""Routing traces: which experts every batch used, layer by layer, in a file that survives being cut off.

The format is described in docs/traces.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

import attrs

from mer.errors import SavedFileError, naming
from mer.io.patient import kind
from mer.io.saved import open_saved
from mer.limits import MAX_EXPERTS, MAX_EXPERTS_PER_LAYER, MAX_LAYERS
from mer.sched.fingerprint import FINGERPRINT_BYTES

MAGIC: Final = b"MERTRACE"
VERSION: Final = 1
MAX_BLOCK_BYTES: Final = 1 << 20  # of payload; a larger one is damage
BLOCK_BYTES: Final = 1 << 16  # from which on a writer ends a block unasked
_PREAMBLE: Final = struct.Struct("<8sHHIII")  # magic, version, 0, L, E, K
_BLOCK: Final = struct.Struct("<II")  # payload bytes, CRC-32 of the payload
_U64_MAX: Final = (1 << 64) - 1


class TraceError(SavedFileError):
    """A routing trace cannot be used."""


@attrs.frozen
class TraceHeader:
    """The model that a trace was recorded from."""

    n_layers: int  # L
    n_experts: int  # E
    top_k: int  # K, 1 to E
    fingerprint: bytes  # see `model_fingerprint`
    expert_bytes: tuple[int, ...]  # of one expert, by layer; 0 where unknown

    def __attrs_post_init__(self) -> None:
        if not _possible(self.n_layers, self.n_experts, self.top_k):
            raise ValueError(f"no model has {self.n_layers} layers, {self.n_experts} experts, top_k {self.top_k}")
        if len(self.fingerprint) != FINGERPRINT_BYTES:
            raise ValueError(f"a fingerprint has {FINGERPRINT_BYTES} bytes, not {len(self.fingerprint)}")
        if len(self.expert_bytes) != self.n_layers or not all(0 <= n <= _U64_MAX for n in self.expert_bytes):
            raise ValueError(f"expert_bytes must be {self.n_layers} sizes")

    def encode(self) -> bytes:
        """Return the header as bytes."""
        body = _PREAMBLE.pack(MAGIC, VERSION, 0, self.n_layers, self.n_experts, self.top_k) + self.fingerprint
        body += struct.pack(f"<{self.n_layers}Q", *self.expert_bytes)
        return body + struct.pack("<I", zlib.crc32(body))


def _possible(n_layers: int, n_experts: int, top_k: int) -> bool:
    """Return whether a model may have such numbers."""
    each = 1 <= n_layers <= MAX_LAYERS and 1 <= top_k <= n_experts <= MAX_EXPERTS_PER_LAYER
    return each and n_layers * n_experts <= MAX_EXPERTS


@attrs.frozen
class TraceEvent:
    """One layer's union of experts over one batch."""

    layer: int
    n_tokens: int  # of the batch; 0 where it was not known
    experts: tuple[int, ...]  # ascending, each once, at least one


class TraceWriter:
    """Appends events to a trace; what has been flushed survives the end of the process, however it ends.

    A new file gets a header. An existing one must have the same, and a block at its end that was never finished is cut
    off. One writer at a time: the file is locked. Use it as a context manager, or `close` it.

    Raises:
        TraceError: the file is no trace, is damaged, is of another model, or is being written by another process.
        OSError: it cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str], header: TraceHeader) -> None:
        self.path, self.header = Path(path), header
        self._payload = bytearray()
        self._end = 0  # of what has been written whole
        flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        self._file: BinaryIO = open(os.open(path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115 - closed by close
        try:
            with naming(self.path):
                self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        """Lock the file and go to where the next block belongs."""
        mode = os.fstat(self._file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise TraceError(self.path, None, f"no regular file but {kind(mode)}; choose another one")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TraceError(self.path, None, "another process writes this trace; choose another file") from None
        if not os.fstat(self._file.fileno()).st_size:
            self.write(self.header.encode())
            return
        with TraceReader(self.path) as reader:
            if reader.header != self.header:
                raise TraceError(self.path, None, "a trace of another model; choose another file")
            reader.skip()
            self._end = reader.offset
        self._file.truncate(self._end)

    def append(self, layer: int, n_tokens: int, experts: Sequence[int]) -> None:
        """Add an event as `add` does, and flush when there are enough for a block.

        Raises:
            ValueError: the event does not fit the header.
            OSError: the file cannot be written.
        """
        if self.add(layer, n_tokens, experts) >= BLOCK_BYTES:
            self.flush()

    def add(self, layer: int, n_tokens: int, experts: Sequence[int]) -> int:
        """Add an event to the next block, without writing anything, and return how many bytes that has now.

        Args:
            layer: which one.
            n_tokens: of the batch, 0 if it is not known.
            experts: used by the batch, at least one, in any order, each once.

        Raises:
            ValueError: the event does not fit the header.
        """
        ordered = sorted(experts)
        strictly = all(a < b for a, b in pairwise(ordered))
        if not ordered or not strictly or ordered[0] < 0 or ordered[-1] >= self.header.n_experts:
            raise ValueError(f"experts must be different numbers below {self.header.n_experts}: {experts}")
        if not 0 <= layer < self.header.n_layers or not 0 <= n_tokens <= _U64_MAX:
            raise ValueError(f"no event of a trace: layer {layer}, {n_tokens} tokens")
        event = bytearray()
        for number in (layer, n_tokens, len(ordered), ordered[0]):
            _put(event, number)
        for before, expert in pairwise(ordered):
            _put(event, expert - before - 1)
        self._payload += event
        return len(self._payload)

    def take(self) -> bytes:
        """Return the block of all events added since the last one, for `write`; without any it is empty."""
        if not self._payload:
            return b""
        payload, self._payload = bytes(self._payload), bytearray()
        return _BLOCK.pack(len(payload), zlib.crc32(payload)) + payload

    def flush(self) -> None:
        """Hand everything to the operating system, as one block.

        Raises:
            OSError: the file cannot be written; the events of this block are lost, those before are not.
        """
        self.write(self.take())

    def write(self, data: bytes) -> None:
        """Write a block that `take` has made, and all of it; may be called in another thread than `add` and `take`.

        Raises:
            OSError: as for `flush`.
        """
        view, end = memoryview(data), self._end
        try:
            with naming(self.path):
                while view:
                    n_bytes = os.pwrite(self._file.fileno(), view, end)
                    view, end = view[n_bytes:], end + n_bytes
        except BaseException:
            with contextlib.suppress(OSError):  # readers leave it out if it stays, and the next block replaces it
                self._file.truncate(self._end)
            raise
        self._end = end

    def close(self, *, flush: bool = True) -> None:
        """Flush, unless told otherwise, and close the file; closing twice is allowed.

        Raises:
            OSError: as for `flush`; the file is closed all the same.
        """
        if not self._file.closed:
            try:
                if flush:
                    self.flush()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TraceReader:
    """Iterates once over the events of a trace, in memory of one block.

    A last block that is not whole is left out: `lost_bytes` then says how long it is. Use it as a context manager, or
    `close` it.

    Raises:
        TraceError: the header is malformed; from iteration: a block is damaged.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lost_bytes = 0  # known when the iteration has ended
        with contextlib.ExitStack() as stack:
            self._file, _ = stack.enter_context(open_saved(path, TraceError))
            self.header = self._read_header()
            self._closing = stack.pop_all()
        self.offset = len(self.header.encode())  # end of the last whole block that was read

    def _error(self, offset: int | None, reason: str) -> TraceError:
        return TraceError(self.path, offset, reason)

    def _read(self, n_bytes: int) -> bytes:
        with naming(self.path):
            return self._file.read(n_bytes)

    def _read_header(self) -> TraceHeader:
        preamble = self._read(_PREAMBLE.size)
        if preamble[: len(MAGIC)] != MAGIC:
            raise self._error(0, f"no routing trace: it does not begin with {MAGIC!r}")
        if len(preamble) < _PREAMBLE.size:
            raise self._error(len(preamble), "the header of this trace is cut off")
        _, version, flags, n_layers, n_experts, top_k = _PREAMBLE.unpack(preamble)
        if version != VERSION:
            raise self._error(8, f"a trace of version {version}; this release reads {VERSION}")
        if flags or not _possible(n_layers, n_experts, top_k):
            raise self._error(
                10,
                f"a trace of {n_layers} layers, {n_experts} experts, top_k {top_k}, flags {flags}; valid are up to "
                f"{MAX_LAYERS} layers of {MAX_EXPERTS_PER_LAYER} experts, {MAX_EXPERTS} in all, top_k no larger than "
                "the experts, and no flags",
            )
        rest = self._read(FINGERPRINT_BYTES + 8 * n_layers + 4)
        if len(rest) < FINGERPRINT_BYTES + 8 * n_layers + 4:
            raise self._error(_PREAMBLE.size + len(rest), "the header of this trace is cut off")
        if zlib.crc32(preamble + rest[:-4]) != int.from_bytes(rest[-4:], "little"):
            raise self._error(_PREAMBLE.size, "the header of this trace is damaged: its checksum is wrong")
        sizes = struct.unpack_from(f"<{n_layers}Q", rest, FINGERPRINT_BYTES)
        return TraceHeader(n_layers, n_experts, top_k, rest[:FINGERPRINT_BYTES], sizes)

    def __iter__(self) -> Iterator[TraceEvent]:
        while (payload := self._next_block()) is not None:
            yield from self._events(payload, self.offset + _BLOCK.size)
            self.offset += _BLOCK.size + len(payload)

    def skip(self) -> None:
        """Go to the end, checking the blocks but not the events in them.

        Raises:
            TraceError: a block is damaged.
            OSError: the file cannot be read.
        """
        while (payload := self._next_block()) is not None:
            self.offset += _BLOCK.size + len(payload)

    def _next_block(self) -> bytes | None:
        """Return the payload of the next whole block, or None at the end."""
        frame = self._read(_BLOCK.size)
        if len(frame) < _BLOCK.size:
            self.lost_bytes = len(frame)
            return None
        n_bytes, checksum = _BLOCK.unpack(frame)
        if not 1 <= n_bytes <= MAX_BLOCK_BYTES:
            raise self._error(self.offset, f"damaged: a block of {n_bytes} bytes; valid are 1 to {MAX_BLOCK_BYTES}")
        payload = self._read(n_bytes)
        if len(payload) < n_bytes:
            self.lost_bytes = len(frame) + len(payload)
            return None
        if zlib.crc32(payload) != checksum:
            raise self._error(self.offset, "damaged: the checksum of a block is wrong")
        return payload

    def _events(self, payload: bytes, begin: int) -> Iterator[TraceEvent]:
        """Decode a block that lies at `begin`."""
        header, at = self.header, 0
        while at < len(payload):
            start = at
            try:
                layer, at = _get(payload, at)
                n_tokens, at = _get(payload, at)
                n, at = _get(payload, at)
                if layer >= header.n_layers or not 1 <= n <= header.n_experts:
                    raise ValueError(f"layer {layer}, {n_tokens} tokens, {n} experts")
                experts, last = [], -1
                for _ in range(n):
                    gap, at = _get(payload, at)
                    last += 1 + gap
                    experts.append(last)
                if last >= header.n_experts:
                    raise ValueError(f"expert {last} of {header.n_experts}")
            except ValueError as error:
                raise self._error(begin + start, f"no valid event: {error}") from None
            yield TraceEvent(layer, n_tokens, tuple(experts))

    def close(self) -> None:
        """Close the file."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _put(out: bytearray, number: int) -> None:
    """Append a number as LEB128."""
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _get(data: bytes, at: int) -> tuple[int, int]:
    """Return the LEB128 number at `at`, below 2**64, and where it ends.

    Raises:
        ValueError: there is none.
    """
    number = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number > _U64_MAX:
                break
            return number, at
        shift += 7
    raise ValueError("a number is cut off or too long")
