"""ctrl-C before the command listens for it, and after: no traceback, and the exit code of an interruption."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROLOGUE = """
import os, signal, sys
import mer.cli
press = lambda *_: os.kill(os.getpid(), signal.SIGINT)
sys.argv[1:] = ["--version"]
"""
MOMENTS = {
    "importing": "import mer.address_space; mer.address_space.check_libraries_fit = press",
    "running": "import mer.cli.app; mer.cli.app.run_app = press",
    "ending": "import atexit; atexit.register(press)",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interruption_is_an_exit_code_at_any_moment(moment: str) -> None:
    code = f"{PROLOGUE}{MOMENTS[moment]}\nmer.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (130, "")


def test_whoever_ignores_interruptions_is_not_interrupted() -> None:
    code = f"{PROLOGUE}{MOMENTS['importing']}\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nmer.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
