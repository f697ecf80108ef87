"""What the operating system says of memory: limits, what is free, and what this process uses."""

from __future__ import annotations

import re
from pathlib import Path

RESERVE_BYTES = 512 << 20  # left to the rest of the machine when the budget is chosen by default
_UNLIMITED = 1 << 60  # cgroup v1 reports no limit as a huge number


PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def _kib(text: str, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def private_bytes(proc: Path = PROC) -> int:
    """Return the anonymous memory and page tables of this process (RssAnon + VmPTE), which nothing can reclaim."""
    status = (proc / "self/status").read_text()
    return _kib(status, "RssAnon") + _kib(status, "VmPTE")


def peak_rss_bytes(proc: Path = PROC) -> int:
    """Return the largest resident set that this process has had (VmHWM), file pages included."""
    return _kib((proc / "self/status").read_text(), "VmHWM")


def cgroup_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the smallest memory limit of this process's control groups (v1 or v2), or None if there is none.

    A limit above the process's own group binds it too. In a container the group may lie elsewhere than its name says:
    what is not there is passed over, and the mounted root is asked in any case. References: proc_pid_cgroup(5), and
    the kernel's documents on control groups, v1 "memory" and v2.

    Args:
        proc: where procfs is mounted.
        cgroups: where the control groups are mounted.
    """
    try:
        membership = (proc / "self/cgroup").read_text()
    except FileNotFoundError:  # a kernel without control groups
        return None
    limits = []
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        for candidate in (folder, *folder.parents):
            try:
                text = (candidate / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
            if candidate == root:
                break
    return min(limits, default=None)


def default_budget(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, str]:
    """Return the memory budget to use when none is given, and where it comes from.

    The control group's limit, if there is one that is below the memory at hand; else what is available (MemAvailable)
    and what this process holds already, less a reserve for the rest of the machine.
    """
    available = _kib((proc / "meminfo").read_text(), "MemAvailable") + private_bytes(proc)
    reserve = min(RESERVE_BYTES, available // 8)
    limit = cgroup_limit_bytes(proc, cgroups)
    if limit is not None and limit < available:
        return limit - min(RESERVE_BYTES, limit // 8), "the control group's limit less a reserve"
    return available - reserve, "the memory available less a reserve"
