"""One workload through one policy: counted only, or read and computed for real."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import attrs

from mer.bench.datafile import DataFile, DataPlan
from mer.bench.mer_run import MerRun
from mer.bench.network import open_worker
from mer.bench.seed_cache import simulate_seed
from mer.bench.seed_run import SeedRun, seed_buffers, seed_reads
from mer.bench.tally import Tally
from mer.bench.workload import Workload
from mer.compute.cpu.worker import CPUWorker
from mer.compute.kernels.target import FORM
from mer.config import Progress
from mer.errors import ConfigError, NotEnoughMemory
from mer.io.arena import Arena
from mer.io.chunks import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS
from mer.io.files import IoMode
from mer.io.reader import Reader
from mer.io.thread_reader import ThreadReader
from mer.sched.heat import HeatProfile
from mer.sched.layer import WorkerLink
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy
from mer.sched.policy import Policy
from mer.sched.simulate import simulate
from mer.system import default_budget
from mer.units import format_bytes

SEED: Final = "seed"
POLICY_NAMES: Final = (*POLICIES, SEED)
MAX_SLOTS: Final = 1 << 20


@attrs.frozen(kw_only=True)
class Reading:
    """Reads of a policy."""

    buffers: int  # of one expert each: the slots, and what is needed besides
    buffer_bytes: int
    io_threads: int  # reads in flight at once
    chunk_bytes: int  # the longest of them


@attrs.frozen(kw_only=True)
class InForce(Reading):
    """Settings in force of a run."""

    threads: int
    io_mode: IoMode
    huge_pages: bool
    kernels: str  # instruction-set form


@attrs.frozen(kw_only=True)
class Task:
    """Inputs that every policy gets."""

    workload: Workload
    data: DataPlan
    n_slots: int
    threads: int


def check_task(policies: list[str], n_slots: int) -> None:
    """Check what a user has asked for.

    Raises:
        ConfigError: there is no such policy, or `n_slots` is out of range.
    """
    for name in policies:
        if name not in POLICY_NAMES:
            raise ConfigError(f"no policy is named {name!r}; there are {', '.join(POLICY_NAMES)}")
    if len(set(policies)) != len(policies):
        raise ConfigError(f"--policy is given twice for one name: {', '.join(policies)}")
    if not 1 <= n_slots <= MAX_SLOTS:
        raise ConfigError(f"--slots {n_slots}: write a number from 1 to {MAX_SLOTS}")


def fresh_policy(name: str, task: Task) -> Policy:
    """Return a policy that has seen nothing; "static" knows in hindsight how often each expert is used."""
    workload = task.workload
    return make_policy(
        name,
        CacheShape(
            n_layers=workload.n_layers,
            n_experts=workload.n_experts,
            n_slots=task.n_slots,
            expert_bytes=(task.data.geometry.expert_bytes,) * workload.n_layers,
            profile=HeatProfile.count(bytes(32), workload.n_layers, workload.n_experts, workload.events),
        ),
    )


def reading(task: Task, policy: str) -> Reading:
    """Return how a policy reads the experts of a task."""
    workload, stride_bytes = task.workload, task.data.stride_bytes
    if policy == SEED:
        return Reading(
            buffers=seed_buffers(workload, task.n_slots),
            buffer_bytes=stride_bytes,
            io_threads=seed_reads(workload),
            chunk_bytes=stride_bytes,
        )
    return Reading(
        buffers=min(task.n_slots, workload.n_layers * workload.n_experts),
        buffer_bytes=stride_bytes,
        io_threads=DEFAULT_THREADS,
        chunk_bytes=DEFAULT_CHUNK_BYTES,
    )


def count(task: Task, policy: str) -> Tally:
    """Run the cache alone, without reading or computing; the tally has no times.

    Raises:
        ConfigError: there is no such policy.
    """
    workload = task.workload
    if policy == SEED:
        totals = simulate_seed(workload.flat(), n_experts=workload.n_layers * workload.n_experts, n_slots=task.n_slots)
        tally = Tally(
            lookups=totals.lookups,
            hits=totals.hits,
            reads=totals.reads,
            prefetches=totals.prefetches,
            prefetches_used=totals.prefetches_used,
        )
    else:
        result = simulate(workload.events, fresh_policy(policy, task), task.n_slots, n_layers=workload.n_layers)
        tally = Tally(lookups=result.lookups, hits=result.hits, reads=result.lookups - result.hits)
    tally.iterations = len(workload.events)
    tally.bytes_read = tally.reads * task.data.geometry.expert_bytes
    return tally


class StreamRun:
    """One run of a task with one policy, from an empty cache on.

    Attributes:
        policy: its name.
        tally: what has been counted so far; complete once `run` has returned.
        in_force: the settings, once `run` has opened everything.
    """

    def __init__(self, task: Task, data: DataFile, policy: str) -> None:
        self.policy = policy
        self.tally = Tally()
        self.in_force: InForce | None = None
        self._task, self._data = task, data

    @property
    def complete(self) -> bool:
        """Whether every iteration has been run."""
        return self.tally.iterations == len(self._task.workload.events)

    async def run(self, on_progress: Callable[[Progress], None]) -> None:
        """Open reader, memory and worker, run every iteration, and close them.

        If cancelled, the running job is finished first; the tally keeps the iterations that had ended.

        Args:
            on_progress: called as kernels are loaded and compiled.

        Raises:
            NotEnoughMemory: the buffers do not fit the memory.
            ReadError: the data file could not be read.
            ComputeError: a job failed.
        """
        task, workload = self._task, self._task.workload
        how = reading(task, self.policy)
        _check_memory(how)
        with ExitStack() as stack:
            reader = stack.enter_context(
                ThreadReader([task.data.path], n_threads=how.io_threads, chunk_bytes=how.chunk_bytes)
            )
            arena = Arena([how.buffers], [how.buffer_bytes])
            stack.callback(arena.close)
            async with open_worker(workload, self._data, task.threads, on_progress) as worker:
                self.in_force = InForce(
                    **attrs.asdict(how),
                    threads=task.threads,
                    io_mode=reader.modes[0],
                    huge_pages=arena.huge_pages,
                    kernels=FORM.value,
                )
                await self._runner(reader, arena, worker).run()

    def _runner(self, reader: Reader, arena: Arena, worker: CPUWorker) -> SeedRun | MerRun:
        task, data, tally = self._task, self._data, self.tally
        if self.policy == SEED:
            return SeedRun(
                workload=task.workload,
                data=data,
                n_slots=task.n_slots,
                reader=reader,
                arena=arena,
                link=WorkerLink(worker.jobs, worker.results),
                tally=tally,
            )
        return MerRun(
            workload=task.workload,
            data=data,
            policy=fresh_policy(self.policy, task),
            reader=reader,
            arena=arena,
            worker=worker,
            tally=tally,
        )


def _check_memory(how: Reading) -> None:
    """Refuse buffers that the machine has no memory for.

    Raises:
        NotEnoughMemory: with the arithmetic.
    """
    needed_bytes, (budget_bytes, source) = how.buffers * how.buffer_bytes, default_budget()
    if needed_bytes > budget_bytes:
        raise NotEnoughMemory(
            f"{how.buffers} buffers of {format_bytes(how.buffer_bytes)} need {format_bytes(needed_bytes)}; the budget "
            f"is {format_bytes(budget_bytes)} ({source}); choose fewer --slots or smaller experts with --geometry",
            budget_bytes=budget_bytes,
            needed_bytes=needed_bytes,
        )
