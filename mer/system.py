"""Memory and processors by the operating system: limits, free memory, and the use by this process."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mer.cgroups import CGROUPS, PROC, Group, groups_upwards, whole_number

RESERVE_BYTES = 512 << 20  # left to the rest of the machine when the budget is chosen by default
_UNLIMITED = 1 << 60  # version 1 reports no limit as a huge number


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


def mapped_bytes(proc: Path = PROC) -> int:
    """Return the size of this process's address space (VmSize), whatever of it is in memory."""
    return _kib((proc / "self/status").read_text(), "VmSize")


def cgroup_limit_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Return the smallest memory limit of this process's control groups (v1 or v2), or None if there is none.

    Above `memory.high` the kernel slows a group down to a crawl, so that this is as much a limit as `memory.max`.

    Args:
        proc: where procfs is mounted.
        cgroups: where the control groups are mounted.
    """
    limits = [_limit_bytes(group) for group in groups_upwards("memory", proc, cgroups)]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_bytes(group: Group) -> int | None:
    """Return the limit on a group's memory: its own or, with version 1, the least of the groups above it too."""
    if group.unified:
        limits = [group.number("memory.max"), group.number("memory.high")]
    else:
        limits = [group.number("memory.limit_in_bytes"), _stat(group, "hierarchical_memory_limit")]
    return min((limit for limit in limits if limit is not None and limit < _UNLIMITED), default=None)


def _stat(group: Group, key: str) -> int | None:
    """Return one number of a group's `memory.stat`."""
    match = re.search(rf"^{key} (\d+)$", group.text("memory.stat"), re.MULTILINE)
    return int(match[1]) if match else None


def _bytes_of_others(group: Group, own_bytes: int) -> int:
    """Return the memory that others in a group hold: its use, less what the kernel would reclaim first and our own."""
    if group.unified:
        used, inactive = group.number("memory.current"), _stat(group, "inactive_file")
    else:  # "total": with the groups in it, which version 2 means anyway
        used, inactive = group.number("memory.usage_in_bytes"), _stat(group, "total_inactive_file")
    return max(0, (used or 0) - (inactive or 0) - own_bytes)


def default_budget(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, str]:
    """Return the memory budget to use when none is given, in bytes, and where it comes from.

    What is available (MemAvailable) and what this process holds already, less a reserve for the rest of the machine;
    or, if that is less, a control group's limit, less what others in the group use and a reserve.
    """
    own = private_bytes(proc)
    available = _kib((proc / "meminfo").read_text(), "MemAvailable") + own
    budgets = [(available - _reserve(available), "the memory available less a reserve")]
    for group in groups_upwards("memory", proc, cgroups):
        limit = _limit_bytes(group)
        if limit is not None:
            others = _bytes_of_others(group, own)
            less = "less a reserve and what others in it use" if others else "less a reserve"
            budgets.append((max(0, limit - _reserve(limit) - others), f"the control group's limit {less}"))
    return min(budgets)


def _reserve(n_bytes: int) -> int:
    return min(RESERVE_BYTES, n_bytes // 8)


def usable_cpus(proc: Path = PROC, cgroups: Path = CGROUPS) -> tuple[int, str]:
    """Return how many threads of this process can run all the time, at least 1, and what limits them.

    No more than the processors that it may run on (sched_setaffinity, cpusets), and than the quota of each of its
    control groups allows (`cpu.max`, or `cpu.cfs_quota_us` per `cpu.cfs_period_us`). A part of a processor counts as
    a whole one.

    Args:
        proc: where procfs is mounted.
        cgroups: where the control groups are mounted.
    """
    processors = len(os.sched_getaffinity(0))
    quotas = [_quota(group) for group in groups_upwards("cpu", proc, cgroups)]
    worth = max(1, min((quota for quota in quotas if quota is not None), default=processors))
    if worth < processors:
        return worth, f"the CPU quota of its control group, on {processors} processors"
    return processors, "the processors that this process may use"


def _quota(group: Group) -> int | None:
    """Return how many processors a group's quota is worth, rounded up; None if it has no quota."""
    if group.unified:
        text, _, per = group.text("cpu.max").partition(" ")
        quota, period = whole_number(text), whole_number(per)
    else:
        quota, period = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    return None if quota is None or not period else -(-quota // period)
