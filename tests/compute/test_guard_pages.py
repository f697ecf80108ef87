"""No kernel touches a byte outside of its areas: each of them ends at a page that may not be touched."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mer.compute.kernels.target import FORM
from mer.io.extents import MATRIX_TYPES


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "faulthandler", "-m", "tests._lib.fenced_runs", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


def test_kernels_stay_inside_their_areas(tmp_path: Path) -> None:
    """fuzz/guard_pages.py does the same for every form of the kernels that the processor can run."""
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [FORM.value, *(kind.name for kind in sorted(MATRIX_TYPES))]


@pytest.mark.parametrize("bug", ["element", "kv"])
def test_an_area_that_is_too_short_is_noticed(tmp_path: Path, bug: str) -> None:
    done = run(tmp_path, bug, "Q8_0")
    assert done.returncode == -signal.SIGSEGV, (done.stdout, done.stderr)
    assert done.stdout.split() == [FORM.value]
