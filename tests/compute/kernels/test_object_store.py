"""Object code on disk: what is loaded is what was saved, and whatever is in the way costs a line in the log at most."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mer.compute.kernels.object_store import ObjectStore
from mer.errors import ConfigError

CODE = bytes(range(256)) * 40
OTHERS_UID = 12345

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


def store(folder: Path, facts: str = "facts") -> ObjectStore:
    return ObjectStore(lambda: folder, facts)


def saved(folder: Path, name: str = "kernel", code: bytes = CODE) -> Path:
    """Save code in a folder and return the file."""
    before = set(folder.glob("*"))
    store(folder).save(name, code)
    (path,) = set(folder.glob("*")) - before
    return path


def test_what_is_saved_is_found_by_name_and_facts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "a" / "b"
    assert store(folder).load("kernel") is None
    saved(folder)
    saved(folder, "another", b"other code")
    assert store(folder).load("kernel") == CODE
    assert store(folder).load("another") == b"other code"
    assert store(folder).load("none") is None
    assert store(folder, "facts of another processor").load("kernel") is None
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*")} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    assert caplog.messages == []


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)

    return damage


def replace(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def cut(n_bytes: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, n_bytes)


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def linked(path: Path) -> None:
    """Put a link to the same file in its place."""
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def of_another_kernel(path: Path) -> None:
    other = saved(path.parent, "another", b"machine code of another kernel")
    os.replace(other, path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": cut(0),
    "a byte": cut(1),
    "cut in the code": cut(1000),
    "cut in the sum": cut(len(CODE) + 20),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "flipped mark": flip(3),
    "flipped code": flip(5000),
    "flipped sum": flip(-1),
    "other bytes": replace(b"\x7fELF" * 3000),
    "of another kernel": of_another_kernel,
    "folder": instead(lambda path: path.mkdir()),
    "fifo": instead(os.mkfifo),
    "dangling link": instead(lambda path: path.symlink_to("nowhere")),
    "link": linked,
    "device": instead(lambda path: path.symlink_to("/dev/zero")),
    "others may write": lambda path: path.chmod(0o602),
    "a group may write": lambda path: path.chmod(0o620),
    "too large": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_not_loaded_and_is_made_whole(
    damage: Callable[[Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mer.paths._is_own_group", lambda number: False)
    path = saved(tmp_path)
    damage(path)
    fresh = store(tmp_path)
    assert fresh.load("kernel") is None
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    fresh.save("kernel", CODE)
    assert fresh.failure is None
    assert store(tmp_path).load("kernel") == CODE
    assert len(caplog.messages) == 1


def test_many_damaged_files_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "abc":
        os.truncate(saved(tmp_path, name), 5)
    fresh = store(tmp_path)
    assert [fresh.load(name) for name in "abc"] == [None] * 3
    assert len(caplog.messages) == 1


@needs_root
def test_a_file_of_another_user_is_not_loaded_and_is_made_anew(tmp_path: Path) -> None:
    path = saved(tmp_path)
    os.chown(path, OTHERS_UID, -1)
    fresh = store(tmp_path)
    assert fresh.load("kernel") is None
    fresh.save("kernel", CODE)
    assert path.stat().st_uid == 0
    assert store(tmp_path).load("kernel") == CODE


@pytest.mark.parametrize("whose", ["the folder", "one above it"])
@pytest.mark.parametrize("how", [pytest.param("owner", marks=needs_root), "everybody", "group"])
def test_a_folder_that_others_may_write_to_is_not_used(
    whose: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mer.paths._is_own_group", lambda number: False)
    folder = tmp_path / "above" / "folder"
    path = saved(folder)
    changed = folder if whose == "the folder" else folder.parent
    if how == "owner":
        os.chown(changed, OTHERS_UID, -1)
    else:
        changed.chmod(0o702 if how == "everybody" else 0o720)
    fresh = store(folder)
    assert fresh.load("kernel") is None
    assert str(changed) in caplog.messages[0]
    path.unlink()
    fresh.save("kernel", CODE)
    assert not path.exists()
    assert fresh.failure is not None
    assert len(caplog.messages) == 1


def test_a_folder_for_everybody_where_nobody_replaces_the_others_files_may_be_above(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    saved(folder)
    folder.parent.chmod(0o1777)
    assert store(folder).load("kernel") == CODE


class NoWrites:
    """Lets every call fail that would change a file system."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.tried = 0
        real = os.open

        def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.tried += 1
                raise OSError(number, os.strerror(number))
            return real(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", open_)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EMFILE])
def test_a_cache_that_cannot_be_written_is_read(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)
    writes = NoWrites(monkeypatch, number)
    fresh = store(tmp_path)
    fresh.save("new", CODE)
    fresh.save("newer", CODE)
    assert writes.tried == 1
    assert fresh.load("kernel") == CODE
    assert caplog.messages == [f"compiled kernels cannot be kept: {tmp_path}: {os.strerror(number)}"]
    assert fresh.failure == f"{tmp_path}: {os.strerror(number)}"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_disk_that_fails_half_way_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, failing)
    fresh = store(tmp_path)
    fresh.save("kernel", CODE)
    assert os.listdir(tmp_path) == []
    assert fresh.failure is not None


@pytest.mark.parametrize("obstacle", ["file", "dangling link", "link to itself", "file above"])
def test_what_is_no_folder_is_in_the_way_of_nothing_but_the_cache(
    obstacle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "mer"
    if obstacle == "link to itself":
        place.symlink_to(place)
    elif obstacle == "dangling link":
        place.symlink_to("nowhere")
    else:
        place.write_text("no folder")
    fresh = store(place / "kernels" if obstacle == "file above" else place)
    assert fresh.load("kernel") is None
    fresh.save("kernel", CODE)
    assert fresh.failure is not None
    assert len(caplog.messages) == 1


def test_without_descriptors_nothing_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path)

    def failing(*_arguments: Any, **_keywords: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    fresh = store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        assert fresh.load("kernel") is None
    assert len(caplog.messages) == 1
    assert fresh.load("kernel") == CODE


def test_without_a_folder_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def nowhere() -> Path:
        raise ConfigError("there is no folder")

    fresh = ObjectStore(nowhere, "facts")
    assert caplog.messages == []  # nothing is needed yet
    fresh.save("kernel", CODE)
    assert fresh.load("kernel") is None
    assert fresh.failure == "there is no folder"
    assert caplog.messages == ["compiled kernels cannot be kept: there is no folder"]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    codes = [bytes([number]) * 50_000 for number in range(4)]
    saved(tmp_path, code=codes[0])
    seen: list[bytes | None] = []

    def write(code: bytes) -> None:
        for _ in range(10):
            store(tmp_path).save("kernel", code)

    threads = [threading.Thread(target=write, args=(code,)) for code in codes]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.append(store(tmp_path).load("kernel"))
    seen.append(store(tmp_path).load("kernel"))
    assert set(seen) <= set(codes)
    assert len(os.listdir(tmp_path)) == 1
    assert caplog.messages == []


def test_what_killed_processes_have_left_goes_when_the_next_kernel_is_kept(tmp_path: Path) -> None:
    left = tmp_path / f".{saved(tmp_path).name}.0123abcd"
    others = [
        left.with_name(f"{left.name}e"),  # no temporary file's name
        left.with_name(left.name[1:]),
        left.with_name(".notes.0123abcd"),
        left.with_name(f"{left.name[:-1]}e"),  # a folder
        left.with_name(f"{left.name[:-1]}f"),  # under way
    ]
    for path in (left, *others):
        path.mkdir() if path is others[3] else path.write_bytes(b"half")
        age_s = 3500 if path is others[4] else 3700
        os.utime(path, times=(time.time() - age_s,) * 2)
    assert store(tmp_path).load("kernel") == CODE
    assert left.exists(), "a run that only loads kernels takes the time to sweep"
    kept = saved(tmp_path, "other")
    assert set(tmp_path.iterdir()) == {*others, kept, kept.with_name(left.name[1:].removesuffix(".0123abcd"))}


def test_what_cannot_be_swept_is_in_the_way_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".{saved(tmp_path).name}.0123abcd"
    left.write_bytes(b"half")
    os.utime(left, times=(0, 0))

    def refuse(_path: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        saved(tmp_path, "other")
    assert left.exists()
    assert store(tmp_path).load("other") == CODE
