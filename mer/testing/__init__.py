"""Simulated parts and stress tests, public: what `mer` is tested with, for services that embed it.

`open_sim_engine` runs the production engine on a simulated disk and a simulated worker, under trio's MockClock. Around
it there are faults, callers, invariants, runs that are a function of a seed, cancellation at every step, and strategies
and state machines for hypothesis. docs/testing.md is a guide.

The strategies and the state machines need the extra `testing` (hypothesis and greenback); nothing else does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mer.testing.callers import Outcome, call, judge
    from mer.testing.cancel import Subject, cancel_at_every_step
    from mer.testing.deterministic import run_seeded, seeded_schedule
    from mer.testing.drawing import RandomSource, Source
    from mer.testing.hangs import fail_after
    from mer.testing.invariants import check_now, watch
    from mer.testing.loop import Hold, LoopWatch, watch_loop
    from mer.testing.machines import MACHINE_SETTINGS, StartedTask, TrioStateMachine, machine_test, run_machine
    from mer.testing.seeds import digest, make_world, open_world, run_seed, run_world
    from mer.testing.simdisk import DiskProfile, SimDisk, open_sim_disk
    from mer.testing.simengine import SimEngine, open_sim_engine
    from mer.testing.simworker import JobCost, SimModel, SimWorker
    from mer.testing.strategies import (
        disk_faults,
        disk_profiles,
        drawn,
        features,
        models,
        requests,
        worker_faults,
        worlds,
    )
    from mer.testing.world import FAULTS, Feature, ReadFault, SimRequest, SimWorld, WorkerFaults

_MODULES = {
    "callers": ("Outcome", "call", "judge"),
    "cancel": ("Subject", "cancel_at_every_step"),
    "deterministic": ("run_seeded", "seeded_schedule"),
    "drawing": ("RandomSource", "Source"),
    "hangs": ("fail_after",),
    "invariants": ("check_now", "watch"),
    "loop": ("Hold", "LoopWatch", "watch_loop"),
    "machines": ("MACHINE_SETTINGS", "StartedTask", "TrioStateMachine", "machine_test", "run_machine"),
    "seeds": ("digest", "make_world", "open_world", "run_seed", "run_world"),
    "simdisk": ("DiskProfile", "SimDisk", "open_sim_disk"),
    "simengine": ("SimEngine", "open_sim_engine"),
    "simworker": ("JobCost", "SimModel", "SimWorker"),
    "strategies": (
        "disk_faults",
        "disk_profiles",
        "drawn",
        "features",
        "models",
        "requests",
        "worker_faults",
        "worlds",
    ),
    "world": ("FAULTS", "Feature", "ReadFault", "SimRequest", "SimWorld", "WorkerFaults"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_EXTRA = ("hypothesis", "greenback")

__all__ = [
    "FAULTS",
    "MACHINE_SETTINGS",
    "DiskProfile",
    "Feature",
    "Hold",
    "JobCost",
    "LoopWatch",
    "Outcome",
    "RandomSource",
    "ReadFault",
    "SimDisk",
    "SimEngine",
    "SimModel",
    "SimRequest",
    "SimWorker",
    "SimWorld",
    "Source",
    "StartedTask",
    "Subject",
    "TrioStateMachine",
    "WorkerFaults",
    "call",
    "cancel_at_every_step",
    "check_now",
    "digest",
    "disk_faults",
    "disk_profiles",
    "drawn",
    "fail_after",
    "features",
    "judge",
    "machine_test",
    "make_world",
    "models",
    "open_sim_disk",
    "open_sim_engine",
    "open_world",
    "requests",
    "run_machine",
    "run_seed",
    "run_seeded",
    "run_world",
    "seeded_schedule",
    "watch",
    "watch_loop",
    "worker_faults",
    "worlds",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use.

    Raises:
        ModuleNotFoundError: it needs the extra `testing`.
    """
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'mer.testing' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"mer.testing.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ModuleNotFoundError(
            f"mer.testing.{name} needs {error.name}: pip install 'mer-engine[testing]'", name=error.name
        ) from error
    globals()[name] = value
    return value
