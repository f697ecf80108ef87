"""Outputs of real runs against dense arithmetic on the dequantized file, and their equality over all settings."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import trio

from mer.bench.datafile import DataFile, make_data, open_data, plan_data
from mer.bench.geometry import WEIGHT_TYPES, parse_geometry
from mer.bench.network import input_vector
from mer.bench.stream import POLICY_NAMES, SEED, StreamRun, Task, count
from mer.bench.workload import Workload
from mer.sched.simulate import Event

Floats = npt.NDArray[np.float64]

N_LAYERS, N_EXPERTS = 2, 6
EVENTS: tuple[Event, ...] = tuple(
    (at % 2, tuple((at * step + shift) % N_EXPERTS for shift in (0, 1, 4)[: 1 + at % 3]))
    for at, step in zip(range(30), [1, 2, 5] * 10, strict=True)
)
WORKLOAD = Workload(name="sets", n_layers=N_LAYERS, n_experts=N_EXPERTS, events=EVENTS)
ONE_AT_A_TIME = Workload(
    name="singles",
    n_layers=N_LAYERS,
    n_experts=N_EXPERTS,
    events=tuple((layer, (expert,)) for layer, experts in EVENTS for expert in experts),
)


@pytest.fixture(scope="module", params=WEIGHT_TYPES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataFile:
    folder = tmp_path_factory.mktemp("data")
    plan = plan_data(folder, parse_geometry("96x64", request.param), N_LAYERS, N_EXPERTS)
    make_data(plan, lambda done, total: None)
    opened = open_data(plan)
    assert opened is not None
    return opened


@functools.cache
def dense(path: Path) -> dict[str, Floats]:
    """Return the file's matrices as float64 by name."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in gguf.GGUFReader(path).tensors
    }


def expected(data: DataFile, event: Event) -> Floats:
    """Return the mean over the experts of down(silu(gate(x)) * up(x))."""
    layer, experts = event
    x = input_vector(data.plan.geometry.d_model).astype(np.float64)
    outputs = []
    for expert in experts:
        gate, up, down = (dense(data.plan.path)[f"blk.{layer}.ffn_{p}.{expert}.weight"] for p in ("gate", "up", "down"))
        inner = gate @ x
        outputs.append(down @ (inner / (1 + np.exp(-inner)) * (up @ x)))
    return np.asarray(np.mean(outputs, axis=0))


class Recorder:
    """Keeps the outputs that a tally would hash."""

    def __init__(self) -> None:
        self.outputs: list[Floats] = []

    def update(self, raw: bytes) -> None:
        self.outputs.append(np.frombuffer(raw, "<f4").astype(np.float64))


def run(data: DataFile, task: Task, policy: str) -> StreamRun:
    done = StreamRun(task, data, policy)
    trio.run(done.run, lambda progress: None)
    assert done.complete
    return done


def task_of(data: DataFile, n_slots: int, threads: int = 1) -> Task:
    return Task(workload=WORKLOAD, data=data.plan, n_slots=n_slots, threads=threads)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("n_slots", [1, 3, 12])
def test_outputs_are_those_of_the_experts_of_each_iteration(data: DataFile, policy: str, n_slots: int) -> None:
    recorder = Recorder()
    measured = StreamRun(task_of(data, n_slots, threads=2), data, policy)
    measured.tally.outputs = recorder
    trio.run(measured.run, lambda progress: None)
    assert measured.complete
    tolerance = 1e-5 if data.plan.geometry.type.name == "F32" else 0.03  # of activations rounded to int8
    for event, output in zip(EVENTS, recorder.outputs, strict=True):
        wanted = expected(data, event)
        assert np.linalg.norm(output - wanted) <= tolerance * np.linalg.norm(wanted)


def test_one_hash_for_every_policy_slot_count_and_thread_count(data: DataFile) -> None:
    digests = {run(data, task_of(data, 2, threads), SEED).tally.outputs.hexdigest() for threads in (1, 2, 3)}
    for policy in POLICY_NAMES:
        digests |= {run(data, task_of(data, n_slots), policy).tally.outputs.hexdigest() for n_slots in (1, 4, 12)}
    assert len(digests) == 1
    assert digests != {hashlib.sha256().hexdigest()}


@pytest.mark.parametrize(
    ("policy", "n_slots", "workload"),
    [
        *((SEED, n_slots, WORKLOAD) for n_slots in (1, 2, 3, 5, 12)),
        # An iteration that needs more than all slots runs in waves, whose order is the disk's.
        *((policy, n_slots, WORKLOAD) for policy in ("lfru", "lfu", "static", "cost") for n_slots in (3, 5, 12)),
        # Of two experts that come together, the disk decides which one LRU takes for the older.
        *(("layer-lru", n_slots, ONE_AT_A_TIME) for n_slots in (1, 2, 3, 5, 12)),
    ],
    ids=lambda value: value.name if isinstance(value, Workload) else None,
)
def test_counts_are_those_of_the_cache_alone(data: DataFile, policy: str, n_slots: int, workload: Workload) -> None:
    task = Task(workload=workload, data=data.plan, n_slots=n_slots, threads=1)
    tally, alone = run(data, task, policy).tally, count(task, policy)
    names = ("iterations", "lookups", "hits", "reads", "prefetches", "prefetches_used", "bytes_read")
    assert [getattr(tally, name) for name in names] == [getattr(alone, name) for name in names]
    assert len(tally.read_s) == tally.reads
    assert tally.bytes_transferred == tally.reads * data.plan.stride_bytes
    assert len(tally.compute_s) == tally.iterations == len(workload.events)
    assert 0 < sum(tally.compute_s) <= tally.wall_s


def test_the_input_is_the_same_everywhere() -> None:
    vector = input_vector(4096)
    assert vector.dtype == np.float32
    assert hashlib.sha256(vector.tobytes()).hexdigest()[:16] == VECTOR
    assert -1 <= vector.min() < -0.99
    assert 0.99 < vector.max() <= 1
    assert abs(vector.mean()) < 0.03


VECTOR = "ca68b24ec9fe3f86"
