"""Where the cache is, and whom else it may be from."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path
from typing import Any

import pytest

from mer.errors import ConfigError
from mer.paths import cache_folder, distrust_status, make_private_folder


@pytest.mark.parametrize(
    ("base", "home", "want"),
    [
        ("/x/y", "/h", "/x/y/mer"),
        ("", "/h", "/h/.cache/mer"),
        ("relative", "/h", "/h/.cache/mer"),
        (None, "/h", "/h/.cache/mer"),
        (None, "", "~/.cache/mer"),
        (None, "relative", "~/.cache/mer"),
        (None, None, "~/.cache/mer"),
    ],
)
def test_cache_folder(base: str | None, home: str | None, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("XDG_CACHE_HOME", base), ("HOME", home)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(want.replace("~", pwd.getpwuid(os.getuid()).pw_dir))


def test_a_user_without_a_home_has_no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"HOME is not set, and user .* let XDG_CACHE_HOME name a folder"):
        cache_folder()


def test_folders_are_private_and_those_that_exist_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "a" / "b" / "c")
        make_private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")]
    assert modes == [0o755, 0o700, 0o700]


@pytest.mark.parametrize("there", ["file", "dangling link"])
def test_what_is_no_folder_is_in_the_way(there: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if there == "file":
        path.write_text("")
    else:
        path.symlink_to("nowhere")
    for wanted in (path, path / "b"):
        with pytest.raises(OSError, match="a"):
            make_private_folder(wanted)


def status(mode: int, user: int, group: int) -> os.stat_result:
    return os.stat_result((stat.S_IFREG | mode, 0, 0, 1, user, group, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("mode", "user", "group", "members", "reason"),
    [
        (0o644, 1000, 1000, [], None),
        (0o644, 0, 0, [], None),
        (0o644, 1001, 1000, [], "belongs to user 1001"),
        (0o646, 1000, 1000, [], "may be written by everybody"),
        (0o664, 1000, 1000, [], None),  # a group of the user's own
        (0o664, 1000, 1000, ["me"], None),
        (0o664, 1000, 1000, ["me", "you"], "may be written by group 1000"),
        (0o664, 1000, 50, [], "may be written by group 50"),
        (0o664, 1000, 51, [], "may be written by group 51"),
    ],
)
def test_whom_something_may_be_from(
    mode: int, user: int, group: int, members: list[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group_of(number: int) -> Any:
        import grp

        if number == 51:
            raise KeyError(number)
        return grp.struct_group(("me" if number == 1000 else "staff", "x", number, members))

    me = pwd.struct_passwd(("me", "x", 1000, 1000, "", "/home/me", "/bin/sh"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr("pwd.getpwuid", lambda number: me)
    monkeypatch.setattr("grp.getgrgid", group_of)
    assert distrust_status(status(mode, user, group)) == reason
