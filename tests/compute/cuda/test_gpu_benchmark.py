"""The benchmark of the card runs from end to end, on torch's `cpu` device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_it_checks_measures_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "torch-cpu", "--small", "--seconds", "0", "--out", out]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# torch-cpu (small sizes)"
    assert sum("| within" in line for line in lines) == 7 * 5 + 1
    assert sum("GB/s" in line for line in lines) == 8
    assert sum("tokens/s" in line for line in lines) == 8
