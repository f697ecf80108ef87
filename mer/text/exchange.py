"""One request to another process and its answer, through pipes, with bounds on both size and time."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Sequence

_PIECE_BYTES = 1 << 16
_LENGTH_BYTES = 8


class ExchangeError(Exception):
    """The other process has ended, gives no answer in time, or answers what is no answer."""


def exchange(process: subprocess.Popen[bytes], request: bytes, most_bytes: int, patience_s: float) -> list[bytes]:
    """Send a request, unless it is empty, and return the fields of the answer; blocks until it is there.

    Only time in which this process runs counts, so that a machine that slept or stood still makes nothing fail.

    Args:
        process: its standard input and output are pipes.
        request: what to send; its length goes before it.
        most_bytes: an answer that is longer is none.
        patience_s: seconds to wait.

    Raises:
        ExchangeError: there is no answer; the process is of no use any more.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    to, back = process.stdin.fileno(), process.stdout.fileno()
    os.set_blocking(to, False)
    os.set_blocking(back, False)
    unsent = memoryview(len(request).to_bytes(_LENGTH_BYTES, "little") + request) if request else memoryview(b"")
    answer = bytearray()
    end = _LENGTH_BYTES
    while len(answer) < end:
        patience_s -= _wait([to] if unsent else [], back)
        if patience_s < 0:
            raise ExchangeError("it gives no answer")
        try:
            if unsent:
                unsent = unsent[os.write(to, unsent[:_PIECE_BYTES]) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise ExchangeError("it has ended") from None
        try:
            piece = os.read(back, _PIECE_BYTES)
        except BlockingIOError:
            continue
        if not piece:
            raise ExchangeError("it has ended")
        answer += piece
        if len(answer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(answer[:_LENGTH_BYTES], "little")
        if max(len(answer), end) > _LENGTH_BYTES + most_bytes:
            raise ExchangeError("its answer is too long")
    return _fields(memoryview(answer)[_LENGTH_BYTES:])


def _wait(writing: Sequence[int], reading: int) -> float:
    """Wait a second at most until one of the pipes has room or bytes; return how long, but a second at most."""
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    for descriptor in writing:
        poll.register(descriptor, select.POLLOUT)
    begun_s = time.monotonic()
    poll.poll(1000)
    return min(time.monotonic() - begun_s, 1.0)


def _fields(payload: memoryview) -> list[bytes]:
    fields = []
    while payload:
        end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
        if end > len(payload):
            raise ExchangeError("its answer has no form")
        fields.append(bytes(payload[_LENGTH_BYTES:end]))
        payload = payload[end:]
    return fields
