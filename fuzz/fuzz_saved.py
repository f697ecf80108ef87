"""Coverage-guided fuzzing of the readers of saved files: traces, heat profiles, predictors, prefixes.

    pip install atheris
    python fuzz/fuzz_saved.py -max_total_time=300 NEW_FOLDER fuzz/corpus/saved

Every input is read as it is, and with its checksums set right, so that what lies behind them is reached. Whatever it
finds goes to `fuzz/regressions/saved`, which the tests replay without atheris. The seeds are written by

    python fuzz/fuzz_saved.py --write-seeds fuzz/corpus/saved
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from mer.compute.state import Paged, StateLayout
from mer.errors import SavedFileError
from mer.sched.heat import HeatProfile
from mer.sched.kv_file import HEADER_BYTES as PREFIX_HEADER_BYTES
from mer.sched.kv_file import KVLayout, PrefixReader, PrefixWriter
from mer.sched.predictor_file import HEADER_BYTES as PREDICTOR_HEADER_BYTES
from mer.sched.predictor_file import load_predictor, save_predictor
from mer.sched.predictors.markov import MarkovPredictor
from mer.sched.trace import TraceHeader, TraceReader, TraceWriter

MODEL = bytes(range(32))
N_LAYERS, N_EXPERTS, TOP_K = 2, 5, 2
LAYOUT = KVLayout(
    fingerprint=MODEL,
    kv_type="f32",
    arithmetic="int8",
    state=StateLayout((Paged(1, 16, 16),) * N_LAYERS, block_tokens=2),
)
MAX_BLOCKS = 4
EVENTS = [(at % N_LAYERS, tuple(sorted({at % N_EXPERTS, at * at % N_EXPERTS}))) for at in range(60)]


def read_trace(path: str) -> None:
    """Read all events, and fail unless they are what a trace may hold."""
    with TraceReader(path) as reader:
        header = reader.header
        for event in reader:
            if not 0 <= event.layer < header.n_layers or event.experts[-1] >= header.n_experts or event.experts[0] < 0:
                raise AssertionError(f"{event} does not belong to {header}")
            if any(a >= b for a, b in pairwise(event.experts)):
                raise AssertionError(f"{event} is not ascending")


def read_heat(path: str) -> None:
    """Read a profile, and fail unless it can be."""
    profile = HeatProfile.load(path, fingerprint=MODEL, n_layers=N_LAYERS, n_experts=N_EXPERTS)
    if (profile.counts < 0).any() or (profile.counts > profile.visits[:, None]).any():
        raise AssertionError("counts of uses that cannot be")


def read_predictor(path: str) -> None:
    """Read a predictor, and let it predict and learn."""
    predictor = load_predictor(path, fingerprint=MODEL, n_layers=N_LAYERS, n_experts=N_EXPERTS, top_k=TOP_K)
    for layer, experts in EVENTS[:4]:
        for (_, expert), probability in predictor.predict(layer):
            if not 0 <= expert < N_EXPERTS or not 0 <= probability <= 1:
                raise AssertionError(f"expert {expert} with probability {probability}")
        predictor.observe(layer, experts)


def read_prefix(path: str) -> None:
    """Read a prefix, and fail unless its floats are finite."""
    with PrefixReader(path, LAYOUT, MAX_BLOCKS) as reader:
        reader.begin()
        reader.verify()
        if not all(np.isfinite(reader.read(index).view("<f4")).all() for index in range(reader.n_blocks)):
            raise AssertionError("a prefix with NaN or infinity")


READERS: dict[bytes, Callable[[str], None]] = {
    b"MERTRACE": read_trace,
    b"MERMARKV": read_predictor,
    b"MERKVPFX": read_prefix,
}


def check(data: bytes) -> None:
    """Read `data` as the file that it says it is: a SavedFileError is fine, anything else must keep its promises."""
    for content in {data, mended(data)}:
        read(content, READERS.get(content[:8], read_heat))


def read(content: bytes, reader: Callable[[str], None]) -> None:
    """Read a file."""
    fd = os.memfd_create("fuzz.saved")
    try:
        os.write(fd, content)
        reader(f"/proc/self/fd/{fd}")
    except SavedFileError as error:
        if error.offset is not None and not 0 <= error.offset <= len(content) + 8:
            raise AssertionError(f"the offset of {error} lies outside the file") from error
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"an error of several lines: {error}") from error
    finally:
        os.close(fd)


def mended(data: bytes) -> bytes:
    """Return a file with the checksums that its bytes should have."""
    content = bytearray(data)
    if data[:8] == b"MERTRACE" and len(data) > 24:
        end = 56 + 8 * (struct.unpack_from("<I", data, 12)[0] % 64)
        _sign(content, 0, end)
        at = end + 4
        while at + 8 <= len(content):
            n_bytes = struct.unpack_from("<I", content, at)[0]
            content[at + 4 : at + 8] = struct.pack("<I", zlib.crc32(content[at + 8 : at + 8 + n_bytes]))
            at += 8 + n_bytes
    elif data[:8] == b"MERMARKV" and len(data) >= PREDICTOR_HEADER_BYTES:
        payload = bytes(content[PREDICTOR_HEADER_BYTES:])
        struct.pack_into("<II", content, PREDICTOR_HEADER_BYTES - 12, len(payload), zlib.crc32(payload))
        _sign(content, 0, PREDICTOR_HEADER_BYTES - 4)
    elif data[:8] == b"MERKVPFX" and len(data) >= PREFIX_HEADER_BYTES:
        n_blocks = struct.unpack_from("<I", data, 28)[0] % (MAX_BLOCKS + 1)
        checksum = _sign(content, 0, PREFIX_HEADER_BYTES - 4)
        at = PREFIX_HEADER_BYTES
        for n_bytes in (n_blocks * LAYOUT.block_tokens * 4, *[LAYOUT.block_bytes] * n_blocks):
            checksum = zlib.crc32(content[at : at + n_bytes], checksum)
            at += n_bytes
            if at + 4 <= len(content):
                struct.pack_into("<I", content, at, checksum)
            at += 4
    return bytes(content)


def _sign(content: bytearray, start: int, end: int) -> int:
    """Put the checksum of a stretch behind it, if there is room, and return it."""
    checksum = zlib.crc32(content[start:end])
    if end + 4 <= len(content):
        struct.pack_into("<I", content, end, checksum)
    return checksum


def write_seeds(folder: Path) -> None:
    """Write a file of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    with TraceWriter(folder / "small.trace", TraceHeader(N_LAYERS, N_EXPERTS, TOP_K, MODEL, (7, 9))) as trace:
        for at, (layer, experts) in enumerate(EVENTS):
            trace.append(layer, 1, experts)
            if at % 20 == 0:
                trace.flush()
    HeatProfile.count(MODEL, N_LAYERS, N_EXPERTS, EVENTS).save(folder / "small.heat")
    predictor = MarkovPredictor(N_LAYERS, N_EXPERTS, TOP_K)
    for layer, experts in EVENTS:
        predictor.predict(layer)
        predictor.observe(layer, experts)
    save_predictor(folder / "small.markov", predictor, MODEL)
    with PrefixWriter(folder / "small.prefix", LAYOUT, [1, 2, 3, 4]) as prefix:
        prefix.begin()
        for number in range(2):
            prefix.write(np.full(16, number, "<f4").view(np.uint8))
        prefix.commit()


def main() -> None:
    """Fuzz until a limit given on the command line, or for ever; see libFuzzer's options."""
    if sys.argv[1:2] == ["--write-seeds"]:
        write_seeds(Path(sys.argv[2]))
        return
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
