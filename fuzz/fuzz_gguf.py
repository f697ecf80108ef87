"""Coverage-guided fuzzing of the GGUF parser, and of what hyperparameters and tensors are made of its values.

    pip install atheris
    python fuzz/fuzz_gguf.py -max_total_time=300 NEW_FOLDER fuzz/corpus/gguf

Whatever it finds goes to `fuzz/regressions/gguf`, which the tests replay without atheris.
"""

from __future__ import annotations

import itertools
import os
import sys
from itertools import pairwise

from mer.errors import GGUFError, ModelFileError
from mer.io.ggml import tensor_bytes
from mer.io.gguf import GGUFFile, read_gguf
from mer.model.loading import check_model as understood
from mer.quoting import one_line


def check(data: bytes) -> None:
    """Parse `data` as a file: a GGUFError is fine, anything else must be a header that keeps its promises."""
    fd = os.memfd_create("fuzz.gguf")
    try:
        os.write(fd, data)
        path = f"/proc/self/fd/{fd}"
        try:
            header = read_gguf(path)
        except GGUFError as error:
            check_error(error, path)
            if error.offset is not None and not 0 <= error.offset <= len(data):
                raise AssertionError(f"the offset of {error} lies outside the file") from error
            return
        check_tensors(header, len(data))
        check_getters(header)
        check_model(header, path)
    finally:
        os.close(fd)


def check_error(error: ModelFileError, path: str) -> None:
    """Fail unless an error is one line that begins with the file."""
    text = str(error)
    if not text.startswith(path) or text != one_line(text) or len(text) > 1000:
        raise AssertionError(f"an error that is not one line about {path}: {text!r}")


def check_model(header: GGUFFile, path: str) -> None:
    """Fail unless a header gives a model whose experts lie in the file, or an error as it should be."""
    try:
        experts = understood(header).experts
    except ModelFileError as error:
        check_error(error, path)
        return
    for extents in itertools.chain.from_iterable(experts.experts):
        for part in extents.parts:
            if part.offset < header.header_bytes or part.offset + part.n_bytes > header.file_bytes[part.file]:
                raise AssertionError(f"{part} lies outside the tensor data")


def check_tensors(header: GGUFFile, file_bytes: int) -> None:
    """Fail unless every extent has the size of its shape, lies in the file's tensor data, and meets no other."""
    extents = []
    for name, info in header.tensors.items():
        if name != info.name or info.n_bytes != tensor_bytes(info.type, info.shape) or info.offset % header.alignment:
            raise AssertionError(f"{info} is inconsistent")
        extents.append((info.offset, info.offset + info.n_bytes))
    extents.sort()
    if extents and not header.header_bytes <= extents[0][0] <= extents[-1][1] <= file_bytes:
        raise AssertionError("an extent lies outside the tensor data")
    if any(first_end > second for (_, first_end), (second, _) in pairwise(extents)):
        raise AssertionError("two extents overlap")


def check_getters(header: GGUFFile) -> None:
    """Fail unless only the getter of a value's type accepts it, and every other one raises GGUFError."""
    getters = (
        header.get_int,
        header.get_float,
        header.get_str,
        header.get_bool,
        header.get_strings,
        header.get_ints,
        header.get_floats,
    )
    for key in header.metadata:
        accepted = 0
        for getter in getters:
            try:
                getter(key)
            except GGUFError:
                continue
            accepted += 1
        must = header.value_types[key] in ("bool", "string", "uint32", "array of strings", "array of int8")
        if accepted > 1 or (must and not accepted):
            raise AssertionError(f"{accepted} getters accept {key!r}, a {header.value_types[key]}")


def main() -> None:
    """Fuzz until a limit given on the command line, or for ever; see libFuzzer's options."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
