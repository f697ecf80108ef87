"""What the operating system says of memory, read from texts as kernels write them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from mer.system import cgroup_limit_bytes, default_budget, peak_rss_bytes, private_bytes

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
        ("0::/a\n", {"b/memory.max": "1\n", "a/memory.high": "1\n"}, None),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:cpu,memory:/a\n4:pids:/a\n", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ("5:memory:/a\n", {"memory/a/memory.limit_in_bytes": NO_LIMIT_V1}, None),
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


def test_this_process_is_as_big_as_the_system_says() -> None:
    assert 0 < private_bytes() <= peak_rss_bytes() * 1.5
    assert peak_rss_bytes() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.1)
    limit = cgroup_limit_bytes()
    assert limit is None or limit > 0
    assert default_budget()[0] > 0
