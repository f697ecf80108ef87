"""Description of a simulation: an engine and its settings, its faults, and the callers that come."""

from __future__ import annotations

import enum
from functools import partial

import attrs

from mer.config import PrefetchMode, Sampling
from mer.sched.policies.registry import DEFAULT_POLICY
from mer.testing.simdisk import DiskProfile
from mer.testing.simworker import JobCost, SimModel


class Feature(enum.Enum):
    """Features that a world may have; a swarm switches each on or off for every seed.

    Testing with few features at a time finds what testing with all of them hides: a full cache hides that nothing is
    ever evicted, a fault early in every run hides all that comes after it.
    """

    FEW_SLOTS = "few slots"
    OTHER_POLICIES = "cache policies other than the default"
    PREFETCH = "guesses read in advance"
    SLOW_DISK = "slow disk"
    UNEVEN_DISK = "reads that overtake each other"
    STALLS = "reads that take 500 times as long"
    FEW_READS = "one or two reads at a time"
    SMALL_CHUNKS = "reads in several chunks"
    MIRRORS = "several copies of the files"
    FAST_COMPUTE = "jobs that take no time"
    SLOW_COMPUTE = "jobs that take long"
    LONG_PROMPTS = "long prompts"
    SHARED_PROMPTS = "prompts that begin alike"
    NO_REUSE = "no reuse of prefixes"
    CROWD = "more callers than places, some of which do not wait for one"
    FEW_KV_BLOCKS = "few KV blocks"
    SMALL_CHANNELS = "channels of few events"
    SLOW_READERS = "callers that read slowly"
    SAMPLING = "drawn tokens"
    STOP_STRINGS = "stop strings"
    CANCELLATIONS = "callers that leave"
    DESERTION = "callers that leave all at once"
    FREEZES = "a disk that pauses"
    FAILING_READS = "reads that fail some times"
    UNREADABLE = "bytes that cannot be read"
    HANGING_READS = "reads that never return"
    FAILING_JOBS = "jobs that fail"
    DAMAGED_WEIGHTS = "tokens that make NaN"
    CLOSING = "an engine that is closed early"
    JOB_READS = "jobs that read by themselves"


FAULTS = frozenset(
    {
        Feature.FAILING_READS,
        Feature.UNREADABLE,
        Feature.HANGING_READS,
        Feature.FAILING_JOBS,
        Feature.DAMAGED_WEIGHTS,
        Feature.CLOSING,
    }
)
"""The features with which a generation may fail."""


@attrs.frozen(kw_only=True)
class SimRequest:
    """One caller and what it asks for; it reads a stream, event by event."""

    arrives_s: float = 0.0
    prompt: tuple[int, ...] = (2,)
    max_tokens: int = 4
    ignore_eos: bool = True
    sampling: Sampling = attrs.Factory(partial(Sampling, seed=0))
    stop: tuple[str, ...] = ()
    reads_every_s: float = 0.0  # how long it takes over each event
    cancelled_after_s: float | None = None  # counted from its arrival
    nowait: bool = False  # whether it goes away when the queue is full


@attrs.frozen(kw_only=True)
class ReadFault:
    """A page in the middle of one of an expert's matrices that cannot be read, with all the experts that share it."""

    layer: int
    expert: int
    part: int  # 0 gate, 1 up, 2 down
    errno: int | None  # None: reads of it never return
    times: int | None = None  # None: for ever
    copy: int | None = None  # of the files; None: all of them


@attrs.frozen(kw_only=True)
class WorkerFaults:
    """Faults of the computation."""

    failing_jobs: frozenset[int] = frozenset()  # numbers, from 0
    nan_tokens: frozenset[int] = frozenset()  # their hidden state is NaN


@attrs.frozen(kw_only=True)
class SimWorld:
    """An engine of simulated parts, its faults, and who comes."""

    features: frozenset[Feature] = attrs.field(default=frozenset(), repr=lambda f: repr(sorted(x.name for x in f)))
    model: SimModel = attrs.Factory(SimModel)
    n_slots: int = 12
    policy: str = DEFAULT_POLICY
    prefetch: PrefetchMode = "off"
    prefix_reuse: bool = True
    batch_tokens: int = 8
    max_sequences: int = 4
    max_waiting: int = 8
    context: int = 64
    kv_blocks: int = 64
    channel_events: int = 64
    profile: DiskProfile = attrs.Factory(DiskProfile)
    mirrors: tuple[DiskProfile, ...] = ()
    io_threads: int = 4
    chunk_bytes: int = 1 << 21
    read_deadline_s: float = 30.0
    job_reads: bool = False
    cost: JobCost = attrs.Factory(JobCost)
    read_faults: tuple[ReadFault, ...] = ()
    freezes: tuple[tuple[float, float], ...] = ()  # when, and for how long
    worker_faults: WorkerFaults = attrs.Factory(WorkerFaults)
    closed_after_s: float | None = None
    requests: tuple[SimRequest, ...] = ()
    deserted_at_s: float | None = None  # when all that are there leave
    seed: int = 0  # of the disk: its bytes, its latencies
