"""Fingerprint of the model that a trace, a heat profile or a saved prefix belongs to."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import Final

import numpy as np

from mer.io.gguf import GGUFFile, TensorInfo
from mer.io.gguf_file import MetadataValue
from mer.io.patient import not_opened, open_regular, read_up_to

FINGERPRINT_BYTES: Final = 32
SAMPLES: Final = 16
SAMPLE_BYTES: Final = 4096


def model_fingerprint(gguf: GGUFFile) -> bytes:
    """Return a SHA-256 of all that a model's header says, of its parts' sizes, and of samples of its weights.

    The samples are the first 4 KiB of 16 tensors, spread over the model: they tell a model from its fine-tunes, whose
    headers may well agree. Models that differ only in other bytes have the same fingerprint. It does not depend on
    where the files lie, nor on their names.

    Raises:
        ReadError: a file cannot be opened or read.
    """
    digest = hashlib.sha256()
    for key in sorted(gguf.metadata):
        value = _encode(gguf.metadata[key])
        digest.update(f"{key!r} {gguf.value_types[key]} {len(value)}\n".encode("utf-8", "backslashreplace"))
        digest.update(value)
    for tensor in gguf.tensors.values():
        line = f"{tensor.name!r} {tensor.type.name} {tensor.shape} {tensor.file} {tensor.offset} {tensor.n_bytes}\n"
        digest.update(line.encode("utf-8", "backslashreplace"))
    digest.update(repr(gguf.file_bytes).encode())
    tensors = list(gguf.tensors.values())
    for at in sorted({sample * len(tensors) // SAMPLES for sample in range(SAMPLES)} if tensors else ()):
        digest.update(_beginning(gguf, tensors[at]))
    return digest.digest()


def _encode(value: MetadataValue) -> bytes:
    """Return a value as bytes that no other value of its type has."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list):
        lengths = np.fromiter(map(len, value), np.int64, len(value))
        return lengths.tobytes() + "".join(value).encode("utf-8", "surrogatepass")
    return repr(value).encode("utf-8", "backslashreplace")


def _beginning(gguf: GGUFFile, tensor: TensorInfo) -> bytes:
    """Return the first bytes of a tensor."""
    path = gguf.paths[tensor.file]
    file, _ = open_regular(path, partial(not_opened, path))
    try:
        return read_up_to(file, path, tensor.offset, min(tensor.n_bytes, SAMPLE_BYTES))
    finally:
        os.close(file)
