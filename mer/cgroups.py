"""Control groups of this process, from its own up to the root (versions 1 and 2, or both at once)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


@attrs.frozen
class Group:
    """A control group, seen by one controller."""

    folder: Path
    unified: bool  # of version 2

    def text(self, name: str) -> str:
        """Return what a file of the group says, without the line's end; nothing if there is none, or it is private."""
        try:
            return (self.folder / name).read_text().strip()
        except OSError:
            return ""

    def number(self, name: str) -> int | None:
        """Return the whole number that a file of the group holds; None if it holds none, such as "max"."""
        return whole_number(self.text(name))


def whole_number(text: str) -> int | None:
    """Return a number from 0 up, or None if the text is not one."""
    return int(text) if text.isascii() and text.isdigit() else None


def groups_upwards(controller: str, proc: Path = PROC, cgroups: Path = CGROUPS) -> Iterator[Group]:
    """Yield the groups whose limits bind this process: its own and all that hold it, the root last.

    In a container the group may lie elsewhere than its name says: what is not there is passed over, and the mounted
    root comes in any case. References: proc_pid_cgroup(5), cgroups(7), cgroup_namespaces(7).

    Args:
        controller: as the kernel names it, such as "memory".
        proc: where procfs is mounted.
        cgroups: where the control groups are mounted.
    """
    try:
        membership = (proc / "self/cgroup").read_text()
    except FileNotFoundError:  # a kernel without control groups
        return
    for line in membership.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        unified = controllers == ""
        if unified:
            roots = [cgroups, cgroups / "unified"]  # the second beside version 1
        elif controller in controllers.split(","):
            roots = [cgroups / controllers, cgroups / controller]
        else:
            continue
        for root in roots:
            if root.is_dir():
                yield from _upwards(root, group, unified=unified)


def _upwards(root: Path, group: str, *, unified: bool) -> Iterator[Group]:
    """Yield a group of one hierarchy and what it lies in, of those that are mounted."""
    folder = root / group.lstrip("/")
    outside = ".." in folder.parts  # of what a namespace shows: only its root can be asked
    for candidate in (root,) if outside else (folder, *folder.parents):
        if candidate.is_dir():
            yield Group(candidate, unified)
        if candidate == root:
            return
