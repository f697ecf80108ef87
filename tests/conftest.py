"""While the whole suite runs, the kernels that it needs are compiled beside it, once for all of its processes.

A test that comes first compiles what it needs by itself; both keep it in the same cache, so that no result depends on
who did.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

WHOLE = ("not demo", "not demo and not slow")
"""What selects the whole suite, and its fast half."""

_COMPILER: pytest.StashKey[subprocess.Popen[bytes]] = pytest.StashKey()


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start compiling, unless only some tests are asked for."""
    config = session.config
    if config.option.file_or_dir or config.option.collectonly or config.option.markexpr not in WHOLE:
        return
    if hasattr(config, "workerinput"):  # one of several processes of pytest-xdist, whose parent compiles
        return
    command = [sys.executable, "-m", "tests._lib.all_kernels", "then-products-of", "portable"]
    config.stash[_COMPILER] = subprocess.Popen(
        command, cwd=config.rootpath, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what is still compiling."""
    compiler = session.config.stash.get(_COMPILER, None)
    if compiler is not None:
        compiler.kill()
        compiler.wait()
