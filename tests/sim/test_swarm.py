"""Seeds: they pass, they are what they say, and a failing one is printed as the command that replays it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from mer.compute.messages import Done, Operation, RunExperts, RunResident, RunShared, Stage
from mer.testing import swarm
from mer.testing.seeds import make_world, run_seed
from mer.testing.simworker import SimWorker
from mer.testing.world import FAULTS, Feature
from tests.sim import bugs

N_SEEDS = 100


FEW = 5  # seeds that run every time
PORTIONS: list[Any] = [
    (0, FEW),
    *(pytest.param(max(FEW, first), first + 25, marks=pytest.mark.slow) for first in range(0, N_SEEDS, 25)),
]


@pytest.mark.parametrize(("first", "end"), PORTIONS)
def test_seeds(first: int, end: int) -> None:
    for seed in range(first, end):
        try:
            run_seed(seed)
        except BaseException as error:
            error.add_note(f"python -m mer.testing.swarm --seed {seed}")
            raise


@pytest.mark.slow
def test_a_seed_is_the_same_in_every_process() -> None:
    code = (
        "import sys; from mer.testing.seeds import run_seed; assert 'numba' not in sys.modules;"  # it takes a second
        "print([run_seed(seed) for seed in range(0, 40, 5)])"
    )
    digests = set()
    for hash_seed in ("0", "1", "12345"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=600
        )
        digests.add(run.stdout.strip())
    assert digests == {str([run_seed(seed) for seed in range(0, 40, 5)])}
    assert len(set(eval(digests.pop()))) == 8


def test_another_seed_is_another_world() -> None:
    worlds = [make_world(seed) for seed in range(200)]
    assert len(set(map(repr, worlds))) == 200
    times = Counter(feature for world in worlds for feature in world.features)
    assert set(times) == set(Feature)
    assert all(20 < n < 140 for n in times.values())
    assert sum(not world.features & FAULTS for world in worlds) > 60


def test_seeds_get_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts run whole and in both stages; layers are passed in one job, to the end and to a missing expert."""
    seen: Counter[object] = Counter()
    original = SimWorker._run_operation

    async def recorded(self: SimWorker, operation: Operation, done: Done, *, fails: bool) -> Done:
        result = await original(self, operation, done, fails=fails)
        if isinstance(operation, RunExperts):
            seen.update(loaded.stage for loaded in operation.experts)
        elif isinstance(operation, RunShared):
            seen["shared"] += 1
        elif isinstance(operation, RunResident):
            seen["stopped" if self._is_away else "through"] += 1
        return result

    monkeypatch.setattr(SimWorker, "_run_operation", recorded)
    for seed in range(18):
        run_seed(seed)
    assert set(seen) == {*Stage, "shared", "stopped", "through"}
    assert min(seen.values()) > 10


def test_features_can_be_left_out() -> None:
    sound = set(Feature) - FAULTS
    for seed in range(50):
        world = make_world(seed, sound)
        assert world.features <= sound
        assert not world.read_faults
        assert not world.worker_faults.failing_jobs
        assert world.closed_after_s is None


def test_the_command_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert swarm.main(["--seeds", "3:6"]) == 0
    assert capsys.readouterr().out == "3 seeds passed\n"
    assert swarm.main(["--seed", "4"]) == 0
    assert capsys.readouterr().out == f"seed 4: {run_seed(4)}\n"
    assert swarm.main(["--seconds", "0"]) == 0
    assert capsys.readouterr().out == "0 seeds passed\n"


def test_a_failing_seed_is_printed_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with bugs.pin_is_stale():
        assert swarm.main(["--seeds", "0:120"]) == 1
        out, err = capsys.readouterr()
        *told, world, command = err.splitlines()
        python, *arguments = shlex.split(command)
        assert (python, arguments[:3]) == ("python", ["-m", "mer.testing.swarm", "--seed"])
        seed = int(arguments[3])
        assert out == f"{seed} seeds passed, seed {seed} failed\n"
        assert world == f"seed {seed}: {make_world(seed)}"
        assert any("AssertionError" in line for line in told)

        assert swarm.main(arguments[2:]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-2:] == [world, command]
        assert last_error(err) == last_error("\n".join(told))

    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=600)
    assert run.stdout == f"seed {seed}: {run_seed(seed)}\n"  # without the bug it passes


def last_error(told: str) -> str:
    return [line.strip(" |") for line in told.splitlines() if re.search(r"Error(: |$)", line)][-1]


@pytest.mark.parametrize("seeds", ["7", "a:b", "1:2:3"])
def test_nonsense_is_refused(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        swarm.main(["--seeds", seeds])
    assert caught.value.code == 2
    assert "--seeds" in capsys.readouterr().err
