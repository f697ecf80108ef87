"""Guard pages behind every area of every kernel, for each weight type and each form of the kernels.

    python fuzz/guard_pages.py [FORM ...]

Without names it takes all forms that this processor can run (avx512-vnni, avx-vnni, avx2, portable). For each form,
engines of models of all weight types generate in memory in which every scratch area, weight, KV memory and slot ends at
a page that may not be touched, and the tests of the single kernels run on such areas. The exit status is 1 if a run
fails; an overrun is a SIGSEGV (status -11), and the traces tell the step. Compiling takes minutes for each form.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "tests" / "compute" / "kernels"
TESTS = [KERNELS / f"test_{name}.py" for name in ("matmul", "interleave", "pack", "elementwise", "router", "attention")]
FORMS = ("avx512-vnni", "avx-vnni", "avx2", "portable")
TRIAL = """
from mer.errors import ConfigError
try:
    import mer.compute.kernels.target
except ConfigError:
    raise SystemExit(1)
"""
FENCED_TESTS = """
import sys, pytest
from tests._lib import fence, steps
steps.Areas = fence.FencedAreas
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run(form: str, *arguments: str | Path) -> int:
    """Run Python with a form of the kernels and return its exit status."""
    environment = os.environ | {"MER_KERNELS": form, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "faulthandler", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every form and return the exit status."""
    parser = argparse.ArgumentParser(prog="python fuzz/guard_pages.py", description="Run kernels between guard pages.")
    parser.add_argument("forms", nargs="*", metavar="FORM", help=f"of {', '.join(FORMS)} (default: all that can run)")
    wanted = parser.parse_args(arguments).forms
    for name in set(wanted) - set(FORMS):
        parser.error(f"no form is called {name!r}; there are {', '.join(FORMS)}")
    able = wanted or [form for form in FORMS if run(form, "-c", TRIAL) == 0]
    failed = []
    for form in able:
        with tempfile.TemporaryDirectory() as folder:
            for name, command in (
                ("engines", ["-m", "tests._lib.fenced_runs", folder]),
                ("kernels", ["-c", FENCED_TESTS, *TESTS]),
            ):
                status = run(form, *command)
                print(f"{form}: {name}: {'passed' if status == 0 else f'status {status}'}", flush=True)
                failed += [(form, name)] if status else []
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
