"""What passes between the scheduler and a compute worker: jobs of operations one way, results the other.

A worker keeps the residual stream of one batch at a time. For each batch the scheduler sends `Begin`, then for each
layer `Attend`, one or more `RunExperts`, and `Combine`, at the end `Project`; several operations may share one job.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.errors import MerError

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


@attrs.frozen(eq=False)
class Batch:
    """Tokens that go through the layers together.

    The tokens of one sequence must be adjacent and in order of position.
    """

    tokens: Int32Array  # [T]
    positions: Int32Array  # [T]
    sequences: Int32Array  # [T] rows of `tables`
    tables: Int32Array  # [S, blocks] KV blocks of each sequence in order of position
    outputs: Int32Array  # [N] rows of the batch whose logits are wanted


@attrs.frozen(eq=False)
class Begin:
    """Start a batch: its token embeddings become the residual stream."""

    batch: Batch


@attrs.frozen
class Attend:
    """Run attention and the router of one layer; the result's `expert_ids` are filled in."""

    layer: int


@attrs.frozen
class LoadedExpert:
    """Where one expert's matrices lie in memory."""

    expert: int
    addresses: tuple[int, int, int]  # gate, up, down
    fresh: bool  # bytes are as read from the file; the worker re-arranges them in place before use


@attrs.frozen
class RunExperts:
    """Compute the feed-forward networks of these experts for the tokens that were routed to them."""

    layer: int
    experts: tuple[LoadedExpert, ...]


@attrs.frozen
class Combine:
    """Add the weighted expert outputs of a layer to the residual stream, in router order."""

    layer: int


@attrs.frozen
class Project:
    """Apply the final norm and the output head to the rows that the batch asked for."""


Operation = Begin | Attend | RunExperts | Combine | Project


@attrs.frozen(eq=False)
class Job:
    """Operations to run in order."""

    operations: tuple[Operation, ...]


@attrs.frozen(eq=False)
class Done:
    """What a job gave; exactly one comes back for each job, in order."""

    expert_ids: Int32Array | None = None  # [T, K] of the job's Attend, in descending order of router weight
    logits: Float32Array | None = None  # [N, V] of the job's Project
    damaged: Int32Array | None = None  # rows of the batch whose router logits were not finite so far
    error: MerError | None = None  # the batch is lost; the worker takes the next `Begin`
    compute_s: float = 0.0  # time the job ran


@attrs.frozen
class WorkerStatistics:
    """Counters of a compute worker since it started."""

    name: str  # "cpu"
    kernels: str  # instruction-set form in force
    n_threads: int
    jobs: int
    tokens: int  # batch rows begun
    expert_runs: int  # (layer, expert) pairs computed
    compute_s: float


@runtime_checkable
class ComputeWorker(Protocol):
    """A worker behind two memory channels."""

    jobs: trio.MemorySendChannel[Job]
    results: trio.MemoryReceiveChannel[Done]

    async def run(self) -> None:
        """Serve jobs until the job channel is closed or the task is cancelled."""

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the worker's counters."""
