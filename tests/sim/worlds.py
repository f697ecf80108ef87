"""Small worlds: an engine of simulated parts whose routing is known, and an account of all its reads and jobs.

Every row of a batch uses the experts that its layer always uses, reads take equally long whatever their size, and the
disk reads one expert at a time: what is read when, and what is computed with what, can be said beforehand.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs

from mer.compute.messages import LoadedExpert, Operation, RunExperts, RunShared, Stage
from mer.io.fetch import Fetch, FetchListener
from mer.io.pool import Priority
from mer.io.reader import ReadOperation
from mer.testing import DiskProfile, JobCost, SimEngine, SimModel, open_sim_engine

READ_S = 1e-3
"""How long the disk takes for one expert."""

Read = tuple[str, int, int]
"""(demand, ahead or guess; layer; expert)"""

_KINDS = {Priority.DEMAND: "demand", Priority.READ_AHEAD: "ahead", Priority.PREFETCH: "guess"}


def demand(layer: int, *experts: int) -> list[Read]:
    """Return the reads of experts that a layer waits for."""
    return [("demand", layer, expert) for expert in experts]


def ahead(layer: int, *experts: int) -> list[Read]:
    """Return the reads of experts that a layer to come is certain to need."""
    return [("ahead", layer, expert) for expert in experts]


def guess(layer: int, *experts: int) -> list[Read]:
    """Return the reads of experts that a layer to come may need."""
    return [("guess", layer, expert) for expert in experts]


@attrs.frozen(kw_only=True)
class KnownModel(SimModel):
    """Every row uses the experts 0 to K - 1 of every layer."""

    def route(self, layer: int, x: int) -> list[int]:
        """Return the experts of a row in router order."""
        return list(range(self.top_k))


def _number(loaded: LoadedExpert) -> int:
    return loaded.expert


def _name(loaded: LoadedExpert) -> str:
    return str(loaded.expert) if loaded.stage is Stage.WHOLE else f"{loaded.expert} {loaded.stage.value}"


def _computed(operation: Operation) -> str:
    """Return which experts an operation computes."""
    match operation:
        case RunExperts(_, experts):
            return " ".join(map(_name, sorted(experts, key=_number)))
        case RunShared():
            return "shared"
        case _:
            return ""


@attrs.define(eq=False)
class World:
    """An engine, and what it has done.

    Attributes:
        sim: the engine.
        reads: all fetches in the order of their starts, with the priority that they were started with.
        untouched: of each read of a matrix, whether its slot's memory was said to have no pages yet.
    """

    sim: SimEngine
    reads: list[Read] = attrs.field(factory=list)
    untouched: list[bool] = attrs.field(factory=list)

    @property
    def jobs(self) -> list[str]:
        """The experts of every job that has any, in order, such as "0 1" or, in a stage, "0 inner"; or "shared"."""
        operations = [operation for _, job in self.sim.worker.log for operation in job.operations]
        return [text for text in map(_computed, operations) if text]

    async def ask(self, n_tokens: int, max_tokens: int = 1) -> None:
        """Let one caller generate for a prompt of so many tokens, and see to it that nothing is left over."""
        prompt = tuple(2 + i * i % 14 for i in range(n_tokens))
        done = await self.sim.engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
        assert done.tokens == self.sim.expected(prompt, max_tokens)[0]
        await self.sim.check_quiet()


@asynccontextmanager
async def open_world(*, n_layers: int, n_experts: int, top_k: int, **settings: Any) -> AsyncIterator[World]:
    """Open a world; `settings` are those of `open_sim_engine`, and `shared` of the model."""
    usual: dict[str, Any] = {
        "profile": DiskProfile(latency_s=READ_S, jitter=0.0, bytes_per_s=1e15),
        "io_threads": 3,  # the matrices of one expert
        "cost": JobCost(job_s=10e-6, row_s=0.0, expert_s=10e-6),
        "policy": "layer-lru",
    }
    shared = settings.pop("shared", frozenset())
    async with open_sim_engine(
        model=KnownModel(n_layers=n_layers, n_experts=n_experts, top_k=top_k, shared=shared), **usual | settings
    ) as sim:
        world = World(sim)
        start: Callable[..., Fetch] = sim.fetcher.start
        start_reads: Callable[..., None] = sim.disk.start

        def noted(
            layer: int,
            expert: int,
            slot: int,
            priority: Priority = Priority.DEMAND,
            listener: FetchListener | None = None,
        ) -> Fetch:
            fetch = start(layer, expert, slot, priority, listener)
            world.reads.append((_KINDS[priority], layer, expert))
            return fetch

        def noted_reads(*operations: ReadOperation) -> None:
            world.untouched += [operation.untouched for operation in operations]
            start_reads(*operations)

        sim.fetcher.start = noted  # type: ignore[method-assign]
        sim.disk.start = noted_reads  # type: ignore[method-assign]
        yield world
