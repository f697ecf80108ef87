"""Runs the state machines; test_testers.py shows what they catch, and fuzz/fuzz_schedule.py runs them for long."""

from __future__ import annotations

import pytest
from hypothesis import settings

from mer.testing.machines import MACHINE_SETTINGS, machine_test
from tests.sim.cache_machine import CacheMachine
from tests.sim.engine_machine import EngineMachine
from tests.sim.fetch_machine import FetchMachine
from tests.sim.pool_machine import PoolMachine

TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, deadline=None)

TestPool = pytest.mark.slow(PoolMachine.TestCase)
TestPool.settings = settings(max_examples=150, deadline=None)

test_fetcher = pytest.mark.slow(
    machine_test(FetchMachine, settings(MACHINE_SETTINGS, max_examples=60, stateful_step_count=40))
)

test_engine = pytest.mark.slow(
    machine_test(EngineMachine, settings(MACHINE_SETTINGS, max_examples=60, stateful_step_count=30))
)
