"""The Triton form against `gguf`, by Triton's interpreter, and its compilation; skipped where there is no Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "triton_checks.py"


def release(package: str) -> tuple[int, int]:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch's CUDA build only")
@pytest.mark.parametrize(("check", "interpret"), [("matvec", "1"), ("experts", "1"), ("chosen", "1"), ("compile", "0")])
def test_by_the_interpreter_and_the_compiler(check: str, interpret: str) -> None:
    """In a process of its own: whether kernels are interpreted is settled as Triton is imported."""
    if interpret == "1" and release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip("Triton's interpreter before 3.7 makes numbers of arrays, which NumPy 2.4 refuses")
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compute.cuda.triton_checks", check],
        env=environment,
        cwd=CHECKS.parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
