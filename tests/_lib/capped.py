"""Running a command under a real memory limit: a control group where one can be made, else RLIMIT_DATA."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs


@attrs.frozen
class CappedRun:
    """How a limited process ended."""

    limit: str  # "cgroup v1", "cgroup v2" or "RLIMIT_DATA"
    returncode: int
    stdout: str
    stderr: str
    peak_bytes: int | None  # most memory charged to the control group, page cache included


@contextmanager
def _control_group(limit_bytes: int) -> Iterator[tuple[Path, str] | None]:
    """Make a control group with a memory limit; None where that is not allowed."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = "cgroup v1" if controllers else "cgroup v2"
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        knob = "memory.limit_in_bytes" if controllers else "memory.max"
        folder = root / own.lstrip("/") / f"mer-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / knob).exists():
                (folder / knob).write_text(str(limit_bytes))
                yield folder, version
                return
        finally:
            folder.rmdir()
    yield None


def run_capped(command: Sequence[str], limit_bytes: int, env: Mapping[str, str] | None = None) -> CappedRun:
    """Run a command that is killed, or refused memory, above `limit_bytes`."""
    with _control_group(limit_bytes) as group:
        if group is None:
            enter, name = f"ulimit -d {limit_bytes // 1024}", "RLIMIT_DATA"
        else:
            enter, name = f"echo $$ > {group[0]}/cgroup.procs", group[1]
        shell = ["sh", "-c", f'{enter} && exec "$@"', "sh", *command]
        done = subprocess.run(shell, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
        peak = None
        if group is not None:
            peak_file = "memory.max_usage_in_bytes" if group[1] == "cgroup v1" else "memory.peak"
            if (group[0] / peak_file).exists():
                peak = int((group[0] / peak_file).read_text())
        return CappedRun(name, done.returncode, done.stdout, done.stderr, peak)
