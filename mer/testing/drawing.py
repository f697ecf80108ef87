"""Drawing worlds: the same code draws them from a seed and as examples of hypothesis."""

from __future__ import annotations

import errno
import random
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

import attrs

from mer.config import Sampling
from mer.sched.governor import GuessMode
from mer.sched.policies.registry import DEFAULT_POLICY, POLICIES
from mer.testing.simdisk import DiskProfile
from mer.testing.simworker import JobCost, SimModel
from mer.testing.world import FAULTS, Feature, ReadFault, SimRequest, SimWorld, WorkerFaults

T = TypeVar("T")

DELAYS_S = (0.0, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 0.1)
PAUSES_S = (0.0, 1e-4, 1e-3, 1e-2, 0.1)
VOCAB_SIZE = 16
PREFETCH_MODES: tuple[GuessMode, ...] = ("markov", "gate", "auto")
BLOCK_TOKENS = 4  # positions in a KV block of the simulated worker
TRANSIENT = (errno.EIO, errno.EAGAIN)
LASTING = (errno.EIO, errno.ESTALE, errno.ENODEV)


class Source(Protocol):
    """Source of choices; the simplest are the least numbers and the first values."""

    def integer(self, least: int, most: int) -> int:
        """Return a whole number, both ends included."""

    def choice(self, values: Sequence[T]) -> T:
        """Return one of several values."""


class RandomSource:
    """Choices of a seed: the same on every machine and in every process."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, least: int, most: int) -> int:
        """See `Source`."""
        return self._random.randint(least, most)

    def choice(self, values: Sequence[T]) -> T:
        """See `Source`."""
        return values[self._random.randrange(len(values))]


def draw_features(source: Source, among: Collection[Feature] = tuple(Feature)) -> frozenset[Feature]:
    """Return some features, each one as likely as not; half of the time no faults, else about a third of them."""
    odds = {True: [False, False, True], False: [False]}[source.choice([False, True])]
    return frozenset(
        feature
        for feature in Feature
        if feature in among and source.choice(odds if feature in FAULTS else [False, True])
    )


def draw_model(source: Source, features: Collection[Feature] = ()) -> SimModel:
    """Return the shape of a small model, often with few experts of which most are used.

    With guesses to be read, there is often something to be guessed.
    """
    guess = Feature.PREFETCH in features
    n_experts = source.integer(5 if guess else 2, 6)
    return SimModel(
        n_layers=source.integer(2 if guess else 1, 3),
        n_experts=n_experts,
        top_k=source.integer(1, min(3, n_experts)),
        vocab_size=VOCAB_SIZE,
        seed=source.integer(0, 3),
        habit=source.choice([12, 15, 0]) if guess else 0,
        shared=frozenset(layer for layer in range(3) if source.choice([False, False, True])),
        n_matrices=source.choice([3, 2]),
    )


def draw_request(source: Source, features: Collection[Feature] = (), *, max_prompt: int = 20) -> SimRequest:
    """Return a caller; without features one that stays and reads as fast as it can.

    Args:
        source: of the choices.
        features: what it may do.
        max_prompt: tokens of the longest prompt.
    """
    prompt: tuple[int, ...] = ()
    if Feature.SHARED_PROMPTS in features:
        prompt = tuple(2 + i * i % (VOCAB_SIZE - 2) for i in range(source.integer(0, max_prompt - 1)))
    n_more = source.integer(1, max_prompt - len(prompt) if not prompt else min(4, max_prompt - len(prompt)))
    prompt += tuple(source.integer(0, VOCAB_SIZE - 1) for _ in range(n_more))
    sampling = Sampling(seed=0)
    if Feature.SAMPLING in features:
        sampling = Sampling(
            temperature=source.choice([0.0, 0.5, 1.0, 3.0]),
            top_k=source.choice([0, 1, 3]),
            top_p=source.choice([1.0, 0.5]),
            seed=source.integer(0, 3),
        )
    stop: tuple[str, ...] = ()
    if Feature.STOP_STRINGS in features:
        letters = "abcdefghijklmnop"
        stop = tuple(
            "".join(source.choice(letters) for _ in range(source.integer(1, 2))) for _ in range(source.integer(0, 3))
        )
    return SimRequest(
        arrives_s=source.choice(DELAYS_S),
        prompt=prompt,
        max_tokens=source.integer(1, 40 - len(prompt) // 2 if Feature.PREFETCH in features else 12),
        ignore_eos=source.choice([True, False]),
        sampling=sampling,
        stop=stop,
        reads_every_s=source.choice(PAUSES_S) if Feature.SLOW_READERS in features else 0.0,
        cancelled_after_s=source.choice([*[None] * len(DELAYS_S), *DELAYS_S])
        if Feature.CANCELLATIONS in features
        else None,
    )


def draw_profile(source: Source, features: Collection[Feature] = ()) -> DiskProfile:
    """Return how a drive performs; without features an even and fast one."""
    return DiskProfile(
        latency_s=source.choice([1e-4, 1e-5, 1e-3]),
        jitter=source.choice([1.0, 30.0]) if Feature.UNEVEN_DISK in features else 0.0,
        bytes_per_s=source.choice([1e7, 1e6]) if Feature.SLOW_DISK in features else 2e9,
        stall_rate=source.choice([0.1, 0.01]) if Feature.STALLS in features else 0.0,
    )


def draw_read_faults(
    source: Source, model: SimModel, features: Collection[Feature], n_copies: int = 1
) -> tuple[ReadFault, ...]:
    """Return what cannot be read of a model's files; nothing without a feature that says so."""

    def faults(numbers: Sequence[int | None], times: Sequence[int | None]) -> list[ReadFault]:
        return [
            ReadFault(
                layer=source.integer(0, model.n_layers - 1),
                expert=source.integer(0, model.n_experts - 1),
                part=source.integer(0, model.n_matrices - 1),
                errno=source.choice(numbers),
                times=source.choice(times),
                copy=source.choice([None, *range(n_copies)]) if n_copies > 1 else None,
            )
            for _ in range(source.integer(1, 2))
        ]

    drawn: list[ReadFault] = []
    if Feature.FAILING_READS in features:
        drawn += faults(TRANSIENT, [1, 2, 3, 4, 9])
    if Feature.UNREADABLE in features:
        drawn += faults(LASTING, [None])
    if Feature.HANGING_READS in features:
        drawn += faults([None], [1, 2, None])
    return tuple(drawn)


def draw_worker_faults(source: Source, features: Collection[Feature]) -> WorkerFaults:
    """Return what goes wrong with the computation; nothing without a feature that says so."""
    jobs: frozenset[int] = frozenset()
    tokens: frozenset[int] = frozenset()
    if Feature.FAILING_JOBS in features:
        jobs = frozenset(source.integer(0, 40) for _ in range(source.integer(1, 3)))
    if Feature.DAMAGED_WEIGHTS in features:
        tokens = frozenset(source.integer(0, VOCAB_SIZE - 1) for _ in range(source.integer(1, 2)))
    return WorkerFaults(failing_jobs=jobs, nan_tokens=tokens)


def draw_world(source: Source, features: Collection[Feature]) -> SimWorld:
    """Return a world that has these features and no others."""
    model = draw_model(source, features)
    n_all = model.n_layers * model.n_experts
    batch_tokens = source.integer(1, 12)
    crowd, long = Feature.CROWD in features, Feature.LONG_PROMPTS in features
    max_sequences = source.integer(1, max(1, batch_tokens // 2)) if crowd else max(1, batch_tokens // 2)
    max_prompt = 48 if long else 20
    requests = tuple(
        draw_request(source, features, max_prompt=max_prompt) for _ in range(source.integer(1, 8 if crowd else 4))
    )
    worker_faults = draw_worker_faults(source, features)
    mirrors = tuple(
        draw_profile(source, features) for _ in range(source.integer(1, 2) if Feature.MIRRORS in features else 0)
    )
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    fewest_blocks = -(-longest // BLOCK_TOKENS)
    n_slots = source.integer(1, n_all)
    if Feature.FEW_SLOTS in features:
        n_slots = min(n_slots, 4)
    cost = JobCost()
    if Feature.PREFETCH in features:  # time to read, and not all there already
        n_slots = max(3, n_slots // 2)
        cost = JobCost(job_s=1e-3)
    if Feature.FAST_COMPUTE in features:
        cost = JobCost(job_s=0, row_s=0, expert_s=0)
    if Feature.SLOW_COMPUTE in features:
        cost = attrs.evolve(cost, job_s=source.choice([1e-3, 1e-2]))
    world = SimWorld(
        features=frozenset(features),
        model=attrs.evolve(model, nan_hidden=worker_faults.nan_tokens),
        n_slots=n_slots,
        policy=source.choice(sorted(POLICIES)) if Feature.OTHER_POLICIES in features else DEFAULT_POLICY,
        prefetch=source.choice(PREFETCH_MODES) if Feature.PREFETCH in features else "off",
        prefix_reuse=Feature.NO_REUSE not in features,
        batch_tokens=batch_tokens,
        max_sequences=max_sequences,
        max_waiting=source.integer(1, 3) if crowd else 8,
        kv_blocks=fewest_blocks + source.integer(0, 6) if Feature.FEW_KV_BLOCKS in features else 128,
        channel_events=source.choice([1, 2, 4]) if Feature.SMALL_CHANNELS in features else 64,
        profile=draw_profile(source, features),
        mirrors=mirrors,
        io_threads=source.integer(1, 2) if Feature.FEW_READS in features else 4,
        chunk_bytes=4096 if Feature.SMALL_CHUNKS in features else 1 << 21,
        read_deadline_s=600.0 if Feature.STALLS in features else source.choice([1.0, 30.0]),
        job_reads=Feature.JOB_READS in features,
        cost=cost,
        read_faults=draw_read_faults(source, model, features, 1 + len(mirrors)),
        freezes=((source.choice(DELAYS_S), source.choice(DELAYS_S)),) if Feature.FREEZES in features else (),
        worker_faults=worker_faults,
        closed_after_s=source.choice([1.0, 0.1, 0.01, 1e-3]) if Feature.CLOSING in features else None,
        requests=requests,
        deserted_at_s=source.integer(0, 400) * 5e-5 if Feature.DESERTION in features else None,
        seed=source.integer(0, 3),
    )
    if not crowd:
        return world
    choices = [False, False, True]
    return attrs.evolve(
        world, requests=tuple(attrs.evolve(request, nowait=source.choice(choices)) for request in requests)
    )
