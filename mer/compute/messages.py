"""Messages between the scheduler and a compute worker: jobs of operations one way, results the other.

A worker keeps the residual stream of one batch at a time. For each batch the scheduler sends `Begin`, then for each
routed layer `Advance`, one or more `RunExperts`, and `Combine`, and at the end `Advance` to the logits. Several
operations may share one job.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final, Protocol, runtime_checkable

import attrs
import numpy as np
import numpy.typing as npt
import trio

from mer.errors import MerError
from mer.io.loan.loan import Loan

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]


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
class Advance:
    """Run everything up to and with the router of a routed layer, or to the logits.

    Routed layers, those with experts, are numbered from 0, and `layer` means that number in all messages. Up to a
    router the result's `expert_ids` are filled in. With `to` the number of routed layers, everything after the last
    experts is run, and the `logits` of the rows that the batch asked for are filled in.

    With `predict`, also apply the next router to the residual stream as it is before this layer's experts; the result's
    `predicted_ids` are filled in, unless this is the last router. No other bit changes.
    """

    to: int
    predict: bool = False


class Stage(enum.Enum):
    """Which part of an expert's feed-forward network to compute. Results do not depend on how it is divided."""

    WHOLE = "whole"
    INNER = "inner"  # all matrices but the last, and the activation; the last one need not be in memory
    OUTER = "outer"  # the last matrix, after this layer's INNER; the others need not be in memory any more


@attrs.frozen
class LoadedExpert:
    """Where one expert's matrices lie in memory, and what to compute with them.

    Matrices that are `raw` are as read from the file. The worker re-arranges in place those that are raw and that
    the stage uses: afterwards they are not raw any more (but see `Done.arranged`). An expert that a `Tier` holds is
    `AWAY`: it has no addresses.
    """

    expert: int
    addresses: tuple[int, ...]  # of its matrices, in the order of `ExpertExtents.parts`
    raw: tuple[bool, bool]  # those of the inner stage; that of the outer one
    stage: Stage = Stage.WHOLE


AWAY: Final[tuple[int, ...]] = ()
"""The addresses of an expert that is in the worker's own memory."""


@attrs.frozen
class RunExperts:
    """Compute the feed-forward networks of these experts for the tokens that were routed to them.

    An expert is given once in an operation; stages may be mixed.
    """

    layer: int
    experts: tuple[LoadedExpert, ...]


@attrs.frozen(eq=False)
class RunResident:
    """Go on after `Advance` to a layer, through all routers, as long as the experts that they choose are in memory.

    If one of a layer is not, the job ends after that layer's router, and operations that follow are not run. The
    result's `routes` are filled in, and `expert_ids` with the last of them. For batches of at most
    `ComputeWorker.resident_rows` rows. No byte of the experts changes, even if the job fails. A worker with a `Tier`
    looks there, and not at the addresses.

    With `reads`, the worker reads missing experts by itself; what it has computed with is not raw any more. It takes
    the slots of other experts for that, whose addresses become 0. If there is none, or a read fails or takes long, the
    job ends after that layer's router too.
    """

    layer: int
    addresses: Int64Array  # [L, E, MAX_MATRICES] of every expert's matrices; 0 if it is not there, -1 if it is raw
    reads: Loan | None = None


@attrs.frozen
class RunShared:
    """Compute the network that a layer's experts share, which is always in memory, and add it to the residual stream.

    It may run between any two jobs of its layer after `Advance`, and runs with `Combine` if it has not: so that no bit
    depends on when, it is added before the routed experts in either case.
    """

    layer: int


@attrs.frozen
class Combine:
    """Add the weighted expert outputs of a layer to the residual stream, in router order."""

    layer: int


@attrs.frozen
class ReadBlocks:
    """Hand out the KV of blocks that nobody writes to while the result is used; between two batches."""

    blocks: tuple[int, ...]


@attrs.frozen(eq=False)
class WriteBlocks:
    """Put KV that `ReadBlocks` once gave into blocks; between two batches."""

    blocks: tuple[int, ...]
    kv: tuple[Uint8Array, ...]  # the bytes of each block


def nothing() -> None:
    """Do nothing: what is called where nothing is to be done."""


Operation = Begin | Advance | RunExperts | RunResident | RunShared | Combine | ReadBlocks | WriteBlocks


@attrs.frozen(eq=False)
class Job:
    """Operations to run in order."""

    operations: tuple[Operation, ...]
    on_started: Callable[[], None] = nothing  # called in the trio thread once the job computes: that costs no time


@attrs.frozen(eq=False)
class Done:
    """What a job gave; exactly one comes back for each job, in order."""

    expert_ids: Int32Array | None = None  # [T, K] of the job's Advance, in descending order of router weight
    predicted_ids: Int32Array | None = None  # [T, K] of the job's predicting Advance, in the next layer
    routes: Int32Array | None = None  # [layers, T, K] experts of the layers that the job's RunResident has come to
    logits: Float32Array | None = None  # [N, V] of the job's Advance to the logits
    damaged: Int32Array | None = None  # rows of the batch whose router logits were not finite so far
    kv: tuple[Uint8Array, ...] | None = None  # of the job's ReadBlocks: read-only, a copy or the worker's own memory
    arranged: frozenset[int] | None = None  # experts that the job's RunExperts re-arranged; None: all
    error: MerError | None = None  # the batch is lost; the worker takes the next `Begin`
    compute_s: float = 0.0  # time the job ran


class Tier(Protocol):
    """Experts that a worker keeps in memory of its own, such as a GPU's: they need no slot. Used from the trio thread.

    What is there stays until a job with `RunExperts` needs its room.
    """

    @property
    def full(self) -> bool:
        """Whether every expert of the model is there."""

    def resident(self, layer: int, expert: int) -> bool:
        """Return whether an expert is there."""

    def hold(self, layer: int, expert: int) -> bool:
        """Keep an expert there until `release`, if it is there, and return whether it is; holds are counted."""

    def release(self, layer: int, expert: int) -> None:
        """Take back one `hold`."""


@attrs.frozen(kw_only=True)
class VRAMStatistics:
    """What became of experts in the device's own memory; `hits + uploads + cpu_runs` are the experts computed."""

    slots: int
    resident: int
    held: int  # of them: for a batch that is running
    hits: int  # experts that were there when they were computed
    uploads: int  # experts that were copied to the device
    staged: int  # of them: used once and not kept
    upload_bytes: int
    evictions: int
    cpu_runs: int  # experts that the processor computed from memory, in a hybrid run
    graphs: int  # CUDA graphs captured


@attrs.define
class JobCounters:
    """What every worker counts; see `WorkerStatistics`."""

    jobs: int = 0
    tokens: int = 0
    expert_runs: int = 0
    compute_s: float = 0.0


@attrs.frozen
class WorkerStatistics:
    """Counters of a compute worker since it started."""

    name: str  # "cpu"
    kernels: str  # instruction-set form in force
    n_threads: int  # that may compute
    active_threads: int  # that took part in the last job
    active_reason: str  # why it was so many
    jobs: int
    tokens: int  # batch rows begun
    expert_runs: int  # (layer, expert) pairs computed
    compute_s: float
    vram: VRAMStatistics | None = None  # of the CUDA worker


@runtime_checkable
class ComputeWorker(Protocol):
    """A worker behind two memory channels."""

    jobs: trio.MemorySendChannel[Job]
    results: trio.MemoryReceiveChannel[Done]

    @property
    def staged_pairs(self) -> int:
        """Largest number of (token, choice) pairs of a batch, T * K, that may use the stages INNER and OUTER.

        Of such a batch the worker keeps the inner activations of all pairs; a larger one must run experts WHOLE.
        """

    @property
    def resident_rows(self) -> int:
        """Most rows of a batch for `RunResident`; 0 if the worker cannot."""

    @property
    def shared_layers(self) -> frozenset[int]:
        """Routed layers whose experts share a network, which `RunShared` computes."""

    async def run(self) -> None:
        """Serve jobs until the job channel is closed or the task is cancelled."""

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the worker's counters."""
