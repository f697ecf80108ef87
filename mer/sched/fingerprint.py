"""Which model a trace or a heat profile belongs to."""

from __future__ import annotations

import hashlib

from mer.io.gguf import GGUFFile

FINGERPRINT_BYTES = 32


def model_fingerprint(gguf: GGUFFile) -> bytes:
    """Return the SHA-256 of what a model's header says: its texts and numbers, its tensors, and its parts' sizes.

    Arrays, such as the vocabulary, count with their types only, and weights do not count: two models whose headers
    agree in everything else are told apart by nothing. The same model has the same fingerprint wherever it lies.
    """
    digest = hashlib.sha256()
    for key in sorted(gguf.metadata):
        value = gguf.metadata[key]
        shown = repr(value) if isinstance(value, bool | int | float | str) else ""
        digest.update(f"{key!r} {gguf.value_types[key]} {shown}\n".encode("utf-8", "backslashreplace"))
    for tensor in gguf.tensors.values():
        line = f"{tensor.name!r} {tensor.type.name} {tensor.shape} {tensor.file} {tensor.offset} {tensor.n_bytes}\n"
        digest.update(line.encode("utf-8", "backslashreplace"))
    digest.update(repr(gguf.file_bytes).encode())
    return digest.digest()
