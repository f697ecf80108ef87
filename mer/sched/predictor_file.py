"""File of a learnt Markov predictor, kept between runs; the format is described in docs/prefetch.md."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from mer.errors import SavedFileError
from mer.io.new_file import write_whole
from mer.io.saved import open_saved
from mer.sched.fingerprint import FINGERPRINT_BYTES
from mer.sched.predictors.markov import FIRST_BYTES, N_FEATURES, SECOND_BYTES, SPANS, MarkovPredictor
from mer.sched.predictors.successors import MAX_VISITS

MAGIC: Final = b"MERMARKV"
VERSION: Final = 1
MAX_COUNT_BYTES: Final = 32 << 20
"""Bound of the counts in a file before compression; the contexts that were visited most often are saved."""
_HEADER: Final = struct.Struct(f"<8sHHIIII{FINGERPRINT_BYTES}sII")
"""Magic, version, 0, L, E, K, contexts, fingerprint, compressed bytes, CRC-32 of them; CRC-32 of the header follows."""
_CHECKSUM: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CHECKSUM.size
_MOST: Final = 1 << 53  # visits of a layer
_LARGEST: Final = 1e18  # decayed sum of products of features; no model comes near


class PredictorFileError(SavedFileError):
    """A predictor file cannot be used."""


def _fields(n_layers: int, n_experts: int, n_contexts: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {name: (type, shape)} of the arrays in a file, in their order."""
    return {
        "visits": ("<i8", (n_layers,)),
        "uses": ("<i8", (n_layers, n_experts)),
        "averages": ("<f4", (n_layers, len(SPANS) + 1, n_experts)),
        "sizes": ("<f8", (n_layers,)),
        "weights": ("<f8", (n_layers, N_FEATURES)),
        "moments": ("<f8", (n_layers, N_FEATURES + 1, N_FEATURES + 1)),
        "samples": ("<f8", (n_layers,)),
        "contexts": ("<i8", (n_contexts,)),
        "counts": ("<u2", (n_contexts, n_experts + 1)),
    }


def _n_bytes(fields: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    total = 0
    for kind, shape in fields.values():
        size = int(kind[-1])
        for n in shape:
            size *= n
        total += size
    return total


def _most_contexts(n_experts: int) -> int:
    return MAX_COUNT_BYTES // (2 * (n_experts + 1) + 8)


def save_predictor(path: str | os.PathLike[str], predictor: MarkovPredictor, fingerprint: bytes) -> None:
    """Write what a predictor has learnt; the file is there whole or as it was before. Blocking: some 0.1 s per 10 MB.

    Args:
        path: the file; one that is there is replaced.
        predictor: not used by another thread meanwhile.
        fingerprint: of the model, see `model_fingerprint`.

    Raises:
        OSError: the file cannot be written.
    """
    n_layers, n_experts = predictor.n_layers, predictor.n_experts
    contexts, counts = predictor.table.rows(_most_contexts(n_experts))
    values = {
        "visits": predictor.visits,
        "uses": predictor.uses,
        "averages": predictor.averages,
        "sizes": predictor.sizes,
        "weights": [regression.least for regression in predictor.regressions],
        "moments": [regression.moments for regression in predictor.regressions],
        "samples": [regression.n for regression in predictor.regressions],
        "contexts": contexts,
        "counts": counts,
    }
    compressor = zlib.compressobj(level=1)
    payload = bytearray()
    for name, (kind, shape) in _fields(n_layers, n_experts, len(contexts)).items():
        payload += compressor.compress(np.ascontiguousarray(values[name], dtype=kind).reshape(shape).tobytes())
    payload += compressor.flush()
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        0,
        n_layers,
        n_experts,
        predictor.top_k,
        len(contexts),
        fingerprint,
        len(payload),
        zlib.crc32(payload),
    )
    write_whole(path, header + _CHECKSUM.pack(zlib.crc32(header)) + payload)


def load_predictor(
    path: str | os.PathLike[str],
    *,
    fingerprint: bytes,
    n_layers: int,
    n_experts: int,
    top_k: int,
    first_bytes: int = FIRST_BYTES,
    second_bytes: int = SECOND_BYTES,
) -> MarkovPredictor:
    """Return a predictor that goes on from what was learnt in earlier runs.

    Nothing in the file is believed before it is checked: sizes before anything is allocated for them, checksums, and
    every number's range.

    Raises:
        PredictorFileError: the file is malformed, damaged, of another version, or of another model.
        OSError: it cannot be read.
    """
    with open_saved(path, PredictorFileError) as (stream, file_bytes):
        *model, n_contexts, n_bytes, checksum = _read_header(path, stream, file_bytes)
        if model != [n_layers, n_experts, top_k, fingerprint]:
            reason = "predictions for another model; delete the file, or choose another one"
            raise PredictorFileError(path, None, reason)
        if n_contexts > _most_contexts(n_experts):
            raise PredictorFileError(
                path, 24, f"{n_contexts} contexts are more than the {_most_contexts(n_experts)} that are ever saved"
            )
        fields = _fields(n_layers, n_experts, n_contexts)
        most = _n_bytes(fields) + _n_bytes(fields) // 512 + 1024  # zlib never makes more of it
        if n_bytes > most:
            raise PredictorFileError(
                path, _HEADER.size - 8, f"{n_bytes} compressed bytes are more than the {most} that its counts can take"
            )
        payload = stream.read(n_bytes)
    if zlib.crc32(payload) != checksum:
        raise PredictorFileError(path, HEADER_BYTES, "the counts of this saved predictor are damaged: delete it")
    values: dict[str, npt.NDArray[Any]] = {}
    content, at = _inflated(path, payload, _n_bytes(fields)), 0
    for name, (kind, shape) in fields.items():
        n_bytes = _n_bytes({name: (kind, shape)})
        values[name] = np.frombuffer(content[at : at + n_bytes], dtype=kind).reshape(shape)
        at += n_bytes
    predictor = MarkovPredictor(n_layers, n_experts, top_k, first_bytes=first_bytes, second_bytes=second_bytes)
    wrong = _wrong(values, n_experts, sum(predictor.table.n_contexts))
    if wrong is not None:
        raise PredictorFileError(path, None, f"no saved predictor: {wrong}; delete the file")
    predictor.visits = values["visits"].tolist()
    predictor.uses = values["uses"].tolist()
    predictor.averages[...] = values["averages"]
    predictor.shares = predictor.averages[:, -1].mean(axis=1, dtype=np.float64).tolist()
    predictor.sizes = values["sizes"].tolist()
    learnt = (values["weights"].tolist(), values["moments"], values["samples"].tolist())
    for regression, weights, moments, n in zip(predictor.regressions, *learnt, strict=True):
        regression.resume(weights, moments, n)
    predictor.table.fill(values["contexts"].astype(np.int64), values["counts"].astype(np.uint16))
    return predictor


def _read_header(
    path: str | os.PathLike[str], stream: BinaryIO, file_bytes: int
) -> tuple[int, int, int, bytes, int, int, int]:
    """Return what the header says: L, E, K, fingerprint, contexts, compressed bytes, and their checksum."""
    header = stream.read(HEADER_BYTES)
    if header[: len(MAGIC)] != MAGIC:
        raise PredictorFileError(path, 0, f"no saved predictor: it does not begin with {MAGIC!r}")
    if len(header) < HEADER_BYTES:
        raise PredictorFileError(path, len(header), "the header of this saved predictor is cut off")
    _, version, flags, n_layers, n_experts, top_k, n_contexts, fingerprint, n_bytes, checksum = _HEADER.unpack(
        header[: _HEADER.size]
    )
    if version != VERSION or flags:
        raise PredictorFileError(
            path, 8, f"a predictor of version {version}, flags {flags}; this release reads {VERSION} without flags"
        )
    if zlib.crc32(header[: _HEADER.size]) != _CHECKSUM.unpack(header[_HEADER.size :])[0]:
        raise PredictorFileError(path, _HEADER.size, "the header of this saved predictor is damaged: delete it")
    expected = len(header) + n_bytes
    if file_bytes != expected:
        raise PredictorFileError(
            path, min(expected, file_bytes), f"it has {file_bytes} bytes instead of {expected}: delete it"
        )
    return n_layers, n_experts, top_k, fingerprint, n_contexts, n_bytes, checksum


def _inflated(path: str | os.PathLike[str], payload: bytes, n_bytes: int) -> memoryview:
    """Return the payload decompressed, which must give exactly so many bytes."""
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(payload, n_bytes)
        exact = len(content) == n_bytes and not decompressor.decompress(decompressor.unconsumed_tail, 1)
    except zlib.error:
        exact = False
    if not exact or not decompressor.eof or decompressor.unused_data:
        raise PredictorFileError(path, None, f"no saved predictor: its counts are not {n_bytes} bytes; delete it")
    return memoryview(content)


def _wrong(values: dict[str, npt.NDArray[Any]], n_experts: int, most: int) -> str | None:
    """Return what is wrong with numbers that a predictor cannot have, None if nothing is."""
    visits, uses, counts, contexts = values["visits"], values["uses"], values["counts"], values["contexts"]
    sizes, averages = values["sizes"], values["averages"]
    weights, moments, samples = values["weights"], values["moments"], values["samples"]
    if not ((visits >= 0) & (visits <= _MOST)).all():
        return "a layer has been visited less than never, or too often"
    if not ((uses >= 0) & (uses <= visits[:, None])).all():
        return "an expert has been used more often than its layer was visited"
    if not ((averages >= 0) & (averages <= 1)).all():
        return "an average is no probability"
    if not (averages[:, -1] > 0).any(axis=1).all():
        return "no expert of a layer is ever used"
    if not ((sizes > 0) & (sizes <= n_experts)).all():
        return "events use more experts than there are, or none"
    if not ((weights >= 0) & (weights <= 1)).all():
        return "weights must be from 0 to 1"
    if not (np.abs(moments) <= _LARGEST).all() or not (moments.diagonal(axis1=1, axis2=2) >= 0).all():
        return f"moments must be from -{_LARGEST} to {_LARGEST}, and sums of squares not negative"
    if not ((samples >= moments[:, -1, -1]) & (samples <= _LARGEST)).all():
        return f"samples must be up to {_LARGEST}, and no fewer than the sum of their squares"
    if not ((contexts >= 0) & (contexts < most)).all() or not (np.diff(contexts) > 0).all():
        return f"contexts must be ascending numbers below {most}"
    if not ((counts <= counts[:, -1:]) & (counts[:, -1:] > 0) & (counts[:, -1:] <= MAX_VISITS)).all():
        return f"a context has been visited less often than what follows it, or more than {MAX_VISITS} times"
    return None
