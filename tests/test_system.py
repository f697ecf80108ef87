"""What the operating system says of memory and processors, read from texts as kernels write them."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest

from mer.system import cgroup_limit_bytes, default_budget, peak_rss_bytes, private_bytes, usable_cpus
from tests._lib.capped import run_capped

GIB = 1 << 30
STATUS = "Name:\tpython\nVmHWM:\t  204800 kB\nRssAnon:\t  102400 kB\nRssFile:\t 999999 kB\nVmPTE:\t     300 kB\n"
NO_LIMIT_V1 = "9223372036854771712\n"


def machine(
    folder: Path, membership: str | None, limits: dict[str, str], available_kib: int = 16 << 20
) -> tuple[Path, Path]:
    """Write the files of a machine and return where its procfs and its control groups are."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "self/status").write_text(STATUS)
    (proc / "meminfo").write_text(f"MemTotal:       99 kB\nMemAvailable:   {available_kib} kB\n")
    if membership is not None:
        (proc / "self/cgroup").write_text(membership)
    for name, text in limits.items():
        path = groups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, groups


@pytest.mark.parametrize(
    ("membership", "limits", "want"),
    [
        ("0::/\n", {}, None),
        (None, {}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "max\n"}, None),
        ("0::/a/b\n", {"a/b/memory.max": f"{2 * GIB}\n", "a/memory.max": "max\n"}, 2 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": f"{2 * GIB}\n", "a/memory.max": f"{GIB}\n"}, GIB),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        ("0::/gone/from/here\n", {"memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        ("0::/../other\n", {"memory.max": f"{3 * GIB}\n"}, 3 * GIB),
        ("0::/a\n", {"a/memory.max": "0\n"}, 0),
        ("0::/a\n", {"b/memory.max": "1\n"}, None),
        ("0::/a\n", {"a/memory.max": f"{3 * GIB}\n", "a/memory.high": f"{2 * GIB}\n"}, 2 * GIB),
        ("0::/a\n", {"a/memory.max": f"{3 * GIB}\n", "a/memory.high": "max\n"}, 3 * GIB),
        ("0::/a/b\n", {"a/b/memory.max": f"{3 * GIB}\n", "a/memory.high": f"{GIB}\n"}, GIB),
        ("0::/a\n", {"unified/a/memory.max": f"{GIB}\n"}, GIB),
        ("0::/a\n", {"a/memory.max": f"{GIB}\n", "a/memory.high": "\n"}, GIB),
        ("nonsense\n0::/a\n", {"a/memory.max": f"{GIB}\n"}, GIB),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:cpu,memory:/a\n4:pids:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": NO_LIMIT_V1}, None),
        ("5:cpu,memory:/a\n", {"cpu,memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        (
            "5:memory:/a\n",  # a group above that is not mounted here
            {
                "memory/a/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/a/memory.stat": f"hierarchical_memory_limit {GIB}\n",
            },
            GIB,
        ),
        ("5:memory:/docker/1f\n", {"memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("4:pids:/a\n1:name=systemd:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, None),
        (
            "5:memory:/a\n0::/b\n",  # hybrid: v1 controllers beside an empty v2 hierarchy
            {"memory/a/memory.limit_in_bytes": f"{2 * GIB}\n", "b/cgroup.procs": "1\n"},
            2 * GIB,
        ),
        ("0::/with:colon\n", {"with:colon/memory.max": f"{GIB}\n"}, GIB),
    ],
)
def test_the_smallest_limit_of_the_groups_counts(
    tmp_path: Path, membership: str | None, limits: dict[str, str], want: int | None
) -> None:
    assert cgroup_limit_bytes(*machine(tmp_path, membership, limits)) == want


def test_private_and_peak_memory(tmp_path: Path) -> None:
    proc, _ = machine(tmp_path, None, {})
    assert private_bytes(proc) == (102400 + 300) * 1024
    assert peak_rss_bytes(proc) == 204800 * 1024


def test_the_default_budget_leaves_a_reserve(tmp_path: Path) -> None:
    own = (102400 + 300) * 1024
    budget, source = default_budget(*machine(tmp_path / "big", None, {}))
    assert budget == 16 * GIB + own - GIB // 2
    assert "available" in source
    budget, source = default_budget(*machine(tmp_path / "group", "0::/a\n", {"a/memory.max": f"{8 * GIB}"}))
    assert budget == 8 * GIB - GIB // 2
    assert "control group" in source
    budget, _ = default_budget(*machine(tmp_path / "small-group", "0::/a\n", {"a/memory.max": f"{GIB}"}))
    assert budget == GIB - GIB // 8
    budget, source = default_budget(*machine(tmp_path / "loose", "0::/a\n", {"a/memory.max": f"{64 * GIB}"}))
    assert budget == 16 * GIB + own - GIB // 2
    assert "available" in source
    budget, _ = default_budget(*machine(tmp_path / "tiny", None, {}, available_kib=100 << 10))
    assert budget == own + (100 << 20) - (own + (100 << 20)) // 8


OWN = (102400 + 300) * 1024
V2_STAT = f"anon 1\ninactive_anon 7\nactive_file 5\ninactive_file {GIB}\n"
V1_STAT = f"cache 9\ninactive_file 1\ntotal_inactive_file {GIB}\nhierarchical_memory_limit {NO_LIMIT_V1}"


@pytest.mark.parametrize(
    ("membership", "files", "want"),
    [
        ("0::/a\n", {"a/memory.max": 8 * GIB, "a/memory.current": 3 * GIB + OWN, "a/memory.stat": V2_STAT}, 6 * GIB),
        ("0::/a\n", {"a/memory.max": 8 * GIB, "a/memory.current": 3 * GIB + OWN}, 5 * GIB),
        ("0::/a\n", {"a/memory.max": 8 * GIB, "a/memory.current": OWN // 2, "a/memory.stat": V2_STAT}, 8 * GIB),
        ("0::/a\n", {"a/memory.high": 8 * GIB, "a/memory.current": 3 * GIB + OWN, "a/memory.stat": V2_STAT}, 6 * GIB),
        (
            "5:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": 8 * GIB,
                "memory/a/memory.usage_in_bytes": 3 * GIB + OWN,
                "memory/a/memory.stat": V1_STAT,
            },
            6 * GIB,
        ),
        (  # the group above has the higher limit and less left
            "0::/a/b\n",
            {
                "a/b/memory.max": 7 * GIB,
                "a/b/memory.current": OWN,
                "a/memory.max": 9 * GIB,
                "a/memory.current": 5 * GIB + OWN,
            },
            4 * GIB,
        ),
        (  # more than the machine has, but others in the group use most of it
            "0::/a\n",
            {"a/memory.max": 64 * GIB, "a/memory.current": 60 * GIB + OWN},
            4 * GIB,
        ),
        ("0::/a\n", {"a/memory.max": 8 * GIB, "a/memory.current": 9 * GIB}, GIB // 2),
    ],
)
def test_what_others_in_a_group_use_is_not_ours(
    tmp_path: Path, membership: str, files: dict[str, int | str], want: int
) -> None:
    budget, source = default_budget(*machine(tmp_path, membership, {name: f"{text}\n" for name, text in files.items()}))
    assert budget == want - GIB // 2
    assert "control group" in source


@pytest.mark.parametrize(
    ("membership", "files", "want"),
    [
        (None, {}, 8),
        ("0::/a\n", {"a/cpu.max": "max 100000"}, 8),
        ("0::/a\n", {"a/cpu.max": "200000 100000"}, 2),
        ("0::/a\n", {"a/cpu.max": "250000 100000"}, 3),
        ("0::/a\n", {"a/cpu.max": "1000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "1600000 100000"}, 8),
        ("0::/a\n", {"a/cpu.max": "nonsense"}, 8),
        ("0::/a\n", {"a/cpu.max": "200000 0"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 50000"}, 3),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "20000"},
            3,
        ),
        ("3:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n",
            {
                "cpu/a/b/cpu.cfs_quota_us": "-1",
                "cpu/a/b/cpu.cfs_period_us": "100000",
                "cpu/a/cpu.cfs_quota_us": "200000",
                "cpu/a/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_a_quota_counts_as_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str | None, files: dict[str, str], want: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    tree = machine(tmp_path, membership, {name: f"{text}\n" for name, text in files.items()})
    number, why = usable_cpus(*tree)
    assert number == want
    assert ("quota" in why) == (want < 8)


def test_the_processors_of_this_process_are_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert usable_cpus(*machine(tmp_path, "0::/a\n", {"a/cpu.max": "400000 100000"}))[0] == 1


def test_this_process_is_as_big_as_the_system_says() -> None:
    assert 0 < private_bytes() <= peak_rss_bytes() * 1.5
    assert peak_rss_bytes() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)
    limit = cgroup_limit_bytes()
    assert limit is None or limit > 0
    assert default_budget()[0] > 0


BESIDE_A_NEIGHBOUR = """
import subprocess, sys
from mer.system import cgroup_limit_bytes, default_budget
alone, _ = default_budget()
hold = "import sys; held = b'x' * (200 << 20); print(flush=True); sys.stdin.read()"
neighbour = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
neighbour.stdout.readline()
beside, source = default_budget()
neighbour.communicate()
print(cgroup_limit_bytes(), alone, beside, source, sep=";")
"""


def test_a_real_group_and_a_neighbour_in_it() -> None:
    done = run_capped([sys.executable, "-c", BESIDE_A_NEIGHBOUR], GIB)
    assert done.returncode == 0, done.stderr
    if done.limit == "RLIMIT_DATA":
        pytest.skip("no control group can be made here")
    limit, alone, beside, source = done.stdout.split(";")
    assert int(limit) == GIB
    assert GIB // 2 < int(alone) <= GIB - GIB // 8
    assert 190 << 20 < int(alone) - int(beside) < 260 << 20
    assert "what others in it use" in source
