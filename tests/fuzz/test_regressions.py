"""Replays every seed and every former finding of the fuzzers, without their engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
DRAWS_ITS_INPUTS = {"schedule"}  # see test_schedule.py
TARGETS = sorted({path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.py")} - DRAWS_ITS_INPUTS)
INPUTS = [
    pytest.param(target, path, id=path.relative_to(FUZZ).as_posix())
    for target in TARGETS
    for kind in ("corpus", "regressions")
    for path in sorted((FUZZ / kind / target).iterdir())
]


def load_check(target: str) -> Callable[[bytes], None]:
    """Return the function `check` of fuzz/fuzz_TARGET.py."""
    spec = importlib.util.spec_from_file_location(f"fuzz_{target}", FUZZ / f"fuzz_{target}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check: Callable[[bytes], None] = module.check
    return check


@pytest.mark.parametrize(("target", "path"), INPUTS)
def test_inputs_pass(target: str, path: Path) -> None:
    load_check(target)(path.read_bytes())


def test_every_target_has_seeds() -> None:
    assert TARGETS
    assert {param.values[0] for param in INPUTS} == set(TARGETS)
