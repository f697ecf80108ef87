"""Reads in the caller's thread: what may pass is tried again, and what does not names the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mer.errors import GGUFError, ReadError
from mer.io import patient
from mer.io.files import ModelFile
from mer.io.gguf import read_gguf
from mer.io.mirror import verify_mirror
from mer.io.patient import TRANSIENT
from mer.sched.fingerprint import model_fingerprint
from tests._lib import gguf_bytes as gb

BLOB = gb.build([gb.text("a", "b" * 100)], [gb.Tensor(dims=(2**12,), n_bytes=2**14)])


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    waited: list[float] = []
    monkeypatch.setattr(patient, "_pause", waited.append)
    return waited


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(BLOB)
    return path


def compare_with_itself(path: Path) -> None:
    copy = path.with_name("copy.gguf")
    copy.write_bytes(path.read_bytes())
    files = ModelFile(path), ModelFile(copy)
    try:
        verify_mirror(*files)
    finally:
        for file in files:
            file.close()


def open_and_close(path: Path) -> None:
    ModelFile(path).close()


class Failing:
    """A system call that fails so often before it works."""

    def __init__(self, real: Callable[..., Any], number: int, times: int) -> None:
        self.real, self.number, self.times = real, number, times

    def __call__(self, *args: Any) -> Any:
        if self.times:
            self.times -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*args)


CALLS = [
    ("pread", read_gguf),
    ("open", read_gguf),
    ("pread", lambda path: model_fingerprint(read_gguf(path))),
    ("open", open_and_close),
    ("preadv", open_and_close),
    ("preadv", compare_with_itself),
]


@pytest.mark.parametrize(("call", "use"), CALLS)
@pytest.mark.parametrize("number", sorted(TRANSIENT))
def test_what_may_pass_is_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], call: str, use: Any, number: int
) -> None:
    monkeypatch.setattr(os, call, Failing(getattr(os, call), number, 3))
    use(path)
    assert pauses == [0.005, 0.010, 0.050]


@pytest.mark.parametrize(
    ("call", "use", "number"),
    [
        (call, use, number)
        for call, use in CALLS
        for number in (errno.EIO, errno.EINVAL, errno.EBADF, errno.EMFILE, errno.ENFILE, errno.ESTALE)
        if call == "pread" or use is read_gguf or number != errno.EINVAL  # files that refuse direct reads are allowed
    ],
)
def test_what_does_not_pass_names_the_file_and_what_failed(
    path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], call: str, use: Any, number: int
) -> None:
    monkeypatch.setattr(os, call, Failing(getattr(os, call), number, 99))
    with pytest.raises(ReadError, match=os.strerror(number)) as caught:
        use(path)
    assert caught.value.errno == number
    assert caught.value.path == path
    assert (caught.value.tries, len(pauses)) == ((4, 3) if number in TRANSIENT else (1, 0))
    assert str(caught.value).startswith(f"{path}: {'opening' if caught.value.n_bytes == 0 else 'reading'} ")
    if number == errno.EMFILE:
        assert "ulimit -n" in str(caught.value)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ELOOP])
def test_a_path_that_leads_nowhere_is_the_files_fault(path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "open", Failing(os.open, number, 9))
    with pytest.raises(GGUFError, match=f"cannot be opened: {os.strerror(number)}"):
        read_gguf(path)


def test_a_tensors_beginning_is_read_whole_however_short_the_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_gguf(path)
    expected = model_fingerprint(header)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: pread(fd, min(n, 512), offset))
    assert model_fingerprint(header) == expected
