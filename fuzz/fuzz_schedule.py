"""Coverage-guided fuzzing of what shares slots, reads and batches: the state machines of pool, cache, fetcher, engine.

    pip install hypofuzz "hypothesis<6.156"
    python fuzz/fuzz_schedule.py --seconds 300 pool fetcher

Without names it fuzzes all four, without `--seconds` until it is interrupted. Afterwards it replays what has failed;
the exit status is 1 if anything has. Each failure is printed as the steps of its machine, the fewest that lead there.
(With a newer hypothesis, hypofuzz 25.11 stops at the first failure; it is replayed all the same.)

Failures are kept in `.hypothesis/examples` of the working directory until they no longer fail, and are replayed,
before a few random examples and without hypofuzz, by

    python -m pytest fuzz/fuzz_schedule.py

Write the steps of a failure that was fixed as a test in tests/sim or tests/io.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `tests`, whichever way this file is run

from mer.testing.machines import MACHINE_SETTINGS, TrioStateMachine, machine_test
from tests.sim.cache_machine import CacheMachine
from tests.sim.engine_machine import EngineMachine
from tests.sim.fetch_machine import FetchMachine
from tests.sim.pool_machine import PoolMachine

SETTINGS = settings(
    MACHINE_SETTINGS,
    max_examples=10,  # for pytest; hypofuzz runs as many as it can
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),  # where CI is set, hypothesis has none otherwise
)

MACHINES: dict[str, type[RuleBasedStateMachine]] = {
    "pool": PoolMachine,
    "cache": CacheMachine,
    "fetcher": FetchMachine,
    "engine": EngineMachine,
}


def make_test(name: str) -> Callable[[], None]:
    """Return the test function of a machine, which keeps its failures where hypofuzz does."""
    machine = MACHINES[name]
    if issubclass(machine, TrioStateMachine):
        test = machine_test(machine, SETTINGS)
    else:
        test = get_state_machine_test(machine, settings=SETTINGS)
    hypothesis: Any = vars(test)["hypothesis"]
    hypothesis.inner_test._hypothesis_internal_add_digest = f"fuzz/fuzz_schedule.py::test_{name}".encode()
    return test


test_pool, test_cache, test_fetcher, test_engine = map(make_test, MACHINES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, replay what has failed, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python fuzz/fuzz_schedule.py", description="Fuzz the state machines.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(MACHINES)} (default: all)")
    parser.add_argument("--seconds", type=float, metavar="N", help="stop after this time (default: when interrupted)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that fuzz at once (default 1)")
    options = parser.parse_args(arguments)
    for name in set(options.targets) - set(MACHINES):
        parser.error(f"no target is called {name!r}; there are {', '.join(MACHINES)}")
    try:
        import hypofuzz  # noqa: F401
    except ModuleNotFoundError:
        print('fuzzing needs hypofuzz: pip install hypofuzz "hypothesis<6.156"', file=sys.stderr)
        print("without it, python -m pytest fuzz/fuzz_schedule.py runs the machines as tests", file=sys.stderr)
        return 2
    tests = [f"{Path(__file__).resolve()}::test_{name}" for name in options.targets or MACHINES]
    fuzz(tests, options.processes, options.seconds)
    print("replaying what has failed, and some further examples", file=sys.stderr)
    return int(subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=False).returncode != 0)


def fuzz(tests: Sequence[str], n_processes: int, seconds: float | None) -> None:
    """Let hypofuzz run until time is up, it is interrupted, or every test has failed."""
    code = "from hypofuzz.entrypoint import fuzz; fuzz()"
    command = [sys.executable, "-c", code, "--no-dashboard", "-n", str(n_processes), "--", *tests]
    process = subprocess.Popen(command, start_new_session=True)  # with the processes that it starts
    try:
        process.wait(seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
