"""What the operating system says of memory: limits, what is free, and what this process uses."""

from __future__ import annotations

import re
from pathlib import Path

RESERVE_BYTES = 512 << 20  # left to the rest of the machine when the budget is chosen by default
_UNLIMITED = 1 << 60  # cgroup v1 reports no limit as a huge number


def _kib(path: str, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def private_bytes() -> int:
    """Return the anonymous memory and page tables of this process (RssAnon + VmPTE), which nothing can reclaim."""
    return _kib("/proc/self/status", "RssAnon") + _kib("/proc/self/status", "VmPTE")


def peak_rss_bytes() -> int:
    """Return the largest resident set that this process has had (VmHWM), file pages included."""
    return _kib("/proc/self/status", "VmHWM")


def cgroup_limit_bytes() -> int | None:
    """Return the smallest memory limit of this process's control groups (v1 or v2), or None if there is none."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
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


def default_budget() -> tuple[int, str]:
    """Return the memory budget to use when none is given, and where it comes from.

    The control group's limit, if there is one that is below the memory at hand; else what is available (MemAvailable)
    and what this process holds already, less a reserve for the rest of the machine.
    """
    available = _kib("/proc/meminfo", "MemAvailable") + private_bytes()
    reserve = min(RESERVE_BYTES, available // 8)
    limit = cgroup_limit_bytes()
    if limit is not None and limit < available:
        return limit - min(RESERVE_BYTES, limit // 8), "the control group's limit less a reserve"
    return available - reserve, "the memory available less a reserve"
