"""The targets of fuzz/fuzz_schedule.py without hypofuzz."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "fuzz" / "fuzz_schedule.py"


def run(folder: Path, *command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, so that no examples are taken from the tree or left there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "CI")}
    environment.update(variables)
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_every_target_passes_a_few_examples(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "pytest", "-v", "-p", "no:cacheprovider", SCRIPT)
    assert done.returncode == 0, done.stdout
    passed = {line.split("::")[1].split()[0] for line in done.stdout.splitlines() if " PASSED" in line}
    assert passed == {"test_pool", "test_cache", "test_fetcher", "test_engine"}


@pytest.mark.parametrize("variables", [{}, {"CI": "true"}], ids=["at a desk", "in CI"])
def test_a_failure_is_kept_and_replayed(tmp_path: Path, variables: dict[str, str]) -> None:
    (tmp_path / "seeded.py").write_text(
        "from tests.sim import bugs\n"
        "from hypothesis import Phase, settings\n"
        "import sys\n"
        "settings.register_profile('find', phases=[Phase.generate])\n"
        "settings.register_profile('replay', phases=[Phase.reuse])\n"
        "settings.load_profile(sys.argv[-1])\n"
        "bug = bugs.newcomer_overtakes()\n"
        "bug.__enter__()\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import fuzz_schedule\n"
        "one = settings(fuzz_schedule.SETTINGS, max_examples=1000, report_multiple_bugs=False)  # ten may miss it\n"
        "fuzz_schedule.SETTINGS = one\n"
        "try:\n"
        "    fuzz_schedule.make_test('pool')()\n"
        "except AssertionError as error:\n"
        "    print('caught:', error)\n",
        encoding="utf-8",
    )
    environment_path = str(SCRIPT.parents[1])
    program = f"import sys; sys.path.insert(0, {environment_path!r}); exec(open('seeded.py').read())"
    found, replayed = (run(tmp_path, "-c", program, profile, **variables) for profile in ("find", "replay"))
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("caught: ")  # which of the machine's checks finds it first is chance
    assert (replayed.returncode, replayed.stdout) == (0, found.stdout), replayed.stderr


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        "sys.modules['hypofuzz'] = None\n"
        f"sys.argv = ['fuzz_schedule.py', '--seconds', '1']\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = run(tmp_path, "-c", program)
    assert done.returncode == 2
    assert "pip install hypofuzz" in done.stderr
    assert "python -m pytest fuzz/fuzz_schedule.py" in done.stderr


def test_unknown_targets_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, SCRIPT, "pool", "puddle")
    assert done.returncode == 2
    assert "no target is called 'puddle'; there are pool, cache, fetcher, engine" in done.stderr
