"""The testers tested: each of them fails when a bug of its kind is seeded, and passes without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from mer.testing.cancel import cancel_at_every_step
from mer.testing.machines import run_machine
from mer.testing.seeds import run_seed
from tests.sim import bugs
from tests.sim.cache_machine import CacheMachine
from tests.sim.engine_machine import EngineMachine
from tests.sim.fetch_machine import FetchMachine
from tests.sim.guesses import check_guesses
from tests.sim.pool_machine import PoolMachine
from tests.sim.test_cancel import alone

pytestmark = pytest.mark.slow

FEW = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

Tester = Callable[[], object]


def pool() -> None:
    run_state_machine_as_test(PoolMachine, settings=settings(FEW, max_examples=150))  # as in test_machine_runs


def cache() -> None:
    run_state_machine_as_test(CacheMachine, settings=FEW)


def fetcher() -> None:
    run_machine(FetchMachine, settings(FEW, max_examples=150))


def engine() -> None:
    run_machine(EngineMachine, settings(FEW, max_examples=40, stateful_step_count=30))


def swarm() -> None:
    for seed in range(15, 60):
        run_seed(seed)


def cancellation() -> None:
    cancel_at_every_step(alone, any_task=True)


def guess_markov() -> None:
    check_guesses("markov")


def guess_gate() -> None:
    check_guesses("gate")


CAUGHT: list[tuple[Tester, bugs.Bug]] = [
    (pool, bugs.freed_slot_wakes_nobody),
    (pool, bugs.withdrawal_wakes_nobody),
    (pool, bugs.slot_is_leased_twice),
    (pool, bugs.newcomer_overtakes),
    (pool, bugs.speculation_takes_the_reserve),
    (pool, bugs.pin_is_stale),
    (cache, bugs.pin_is_ignored),
    (fetcher, bugs.abandoned_slot_leaks),
    (fetcher, bugs.hold_is_ignored),
    (fetcher, bugs.slot_is_given_back_before_its_reads),
    (fetcher, bugs.promotion_reads_again),
    (fetcher, bugs.gate_and_up_are_told_too_early),
    (fetcher, bugs.gate_and_up_are_not_told),
    (fetcher, bugs.end_of_a_fetch_is_not_told),
    (engine, bugs.end_of_a_fetch_wakes_nobody),
    (engine, bugs.room_in_the_queue_wakes_nobody),
    (engine, bugs.cancelled_sequence_leaks_its_blocks),
    (engine, bugs.used_expert_counts_as_fresh),
    (engine, bugs.expert_is_left_out),
    (swarm, bugs.end_of_a_fetch_wakes_nobody),
    (swarm, bugs.room_in_the_queue_wakes_nobody),
    (swarm, bugs.abandoned_slot_leaks),
    (swarm, bugs.cancelled_claim_leaks_its_ticket),
    (swarm, bugs.cancelled_sequence_leaks_its_blocks),
    (swarm, bugs.slot_is_leased_twice),
    (swarm, bugs.pin_is_stale),
    (swarm, bugs.pin_is_ignored),
    (swarm, bugs.slot_is_given_back_before_its_reads),
    (swarm, bugs.used_expert_counts_as_fresh),
    (swarm, bugs.expert_is_left_out),
    (cancellation, bugs.cancelled_claim_leaks_its_pin),
    (cancellation, bugs.cancelled_sequence_leaks_its_blocks),
    (guess_markov, bugs.threshold_is_out_of_reach),
    (guess_gate, bugs.threshold_is_out_of_reach),
    (guess_markov, bugs.threshold_is_nothing),
]


def name(function: Callable[..., object]) -> str:
    return function.__name__


@pytest.mark.parametrize(("tester", "bug"), CAUGHT, ids=name)
def test_a_bug_is_caught(tester: Tester, bug: bugs.Bug, capsys: pytest.CaptureFixture[str]) -> None:
    with bug(), pytest.raises((AssertionError, RuntimeError, TimeoutError, KeyError, ExceptionGroup)):
        tester()


SOUND = [tester for tester in dict.fromkeys(tester for tester, _ in CAUGHT) if tester is not swarm]


@pytest.mark.parametrize("tester", SOUND, ids=name)  # the swarm's seeds pass in test_swarm.py
def test_nothing_is_caught_without_a_bug(tester: Tester) -> None:
    tester()
