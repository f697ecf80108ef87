"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mer.io.new_file import PRIVATE, SHARED, NewFile, write_whole


def fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_leaves_everything_as_it_was(
    call: str, before: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    open_files = fds()
    calls = 0
    real = getattr(os, call)

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (2 if call == "write" else 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(args[0], args[1][:3]) if call == "write" else real(*args)

    with monkeypatch.context() as broken:
        broken.setattr(f"mer.io.new_file.os.{call}", failing)
        with pytest.raises(OSError, match="No space left"):
            write_whole(path, b"new bytes")
    assert (path.read_bytes() if path.exists() else None) == before
    assert os.listdir(tmp_path) == ([] if before is None else ["file"])
    assert fds() == open_files


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr("mer.io.new_file.os.write", lambda file, data: real(file, data[:5]))
    write_whole(tmp_path / "file", b"0123456789ab")
    assert (tmp_path / "file").read_bytes() == b"0123456789ab"
    assert os.listdir(tmp_path) == ["file"]


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    open_files = fds()
    with NewFile(path) as file:
        file.write(b"new")
        assert len(os.listdir(tmp_path)) == 2
    file.close()
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"
    assert fds() == open_files


def test_a_close_that_fails_leaves_nothing_and_closes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.close, []

    def failing(descriptor: int) -> None:
        real(descriptor)
        closed.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = NewFile(tmp_path / "file")
    with monkeypatch.context() as broken:
        broken.setattr("mer.io.new_file.os.close", failing)
        with pytest.raises(OSError, match="Input/output error"):
            file.close()
        file.close()
    assert len(closed) == 1
    assert os.listdir(tmp_path) == []


def test_long_names_leave_room_for_the_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 245)
    write_whole(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = """
import os, signal, sys
from mer.io import new_file
new_file.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
new_file.write_whole(sys.argv[1], b"new")
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"


@pytest.mark.parametrize(("mode", "want"), [(PRIVATE, 0o600), (SHARED, 0o640)])
def test_permissions_are_what_the_umask_leaves(mode: int, want: int, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == want


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", b"")


def test_a_forked_child_leaves_the_file_to_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with NewFile(path) as file:
        file.write(b"abc")
        child = os.fork()
        if child == 0:
            try:
                file.close()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        file.commit()
    assert path.read_bytes() == b"abc"
