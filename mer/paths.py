"""Folder of files that `mer` can make again, and checks that nobody else can have written there."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

from mer.errors import ConfigError


def cache_folder() -> Path:
    """Return the user's cache folder for `mer`: `$XDG_CACHE_HOME/mer`, or `~/.cache/mer`; it may not exist yet.

    A relative `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification asks; so is a relative `HOME`.

    Raises:
        ConfigError: neither is set, and the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else _home() / ".cache") / "mer"


def _home() -> Path:
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not os.path.isabs(home):
        raise ConfigError(
            f"there is no cache folder: HOME is not set, and user {os.getuid()} has no home folder; "
            "let XDG_CACHE_HOME name a folder"
        )
    return Path(home)


def make_private_folder(path: Path) -> None:
    """Make a folder that only this user may write to, and all above it that are missing.

    Raises:
        OSError: that failed, or something else is there.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        if not path.is_dir():
            raise
    except FileNotFoundError:
        if path.is_symlink():  # to nowhere
            raise
        make_private_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def distrust(path: Path) -> str | None:
    """Return why somebody else but root could have written to a folder, or None if nobody could.

    Raises:
        OSError: it cannot be looked at.
    """
    real = Path(os.path.realpath(path, strict=True))
    if not real.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(real))
    for folder in (real, *real.parents):
        status = os.stat(folder)
        sticky = folder != real and status.st_mode & stat.S_ISVTX  # others cannot put something else in its place
        reason = None if sticky else distrust_status(status)
        if reason is not None:
            return f"{folder} {reason}"
    return None


def distrust_status(status: os.stat_result) -> str | None:
    """Return why somebody else but root could have written to what has this status, or None if nobody could."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "may be written by everybody"
    if status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
        return f"may be written by group {status.st_gid}"
    return None


def _is_own_group(number: int) -> bool:
    """Return whether this user alone is in a group, as where each user has a group of the same name."""
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and group.gr_gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name}
