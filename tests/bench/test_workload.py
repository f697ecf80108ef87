from __future__ import annotations

from pathlib import Path

import pytest

from mer.bench.streams.article import article_stream
from mer.bench.streams.skewed import skewed_stream
from mer.bench.workload import MAX_ITERATIONS, load_workload
from mer.errors import ConfigError
from mer.sched.trace import TraceError, TraceHeader, TraceWriter

EVENTS = [(0, (1, 3)), (1, (0, 2, 4)), (0, (3,)), (1, (4,))]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "routes.trace"
    header = TraceHeader(n_layers=2, n_experts=5, top_k=2, fingerprint=bytes(32), expert_bytes=(0, 0))
    with TraceWriter(path, header) as writer:
        for layer, experts in EVENTS:
            writer.append(layer, 1, experts)
    return path


def test_synthetic_streams_are_one_flat_layer() -> None:
    article = load_workload("article", 30)
    assert (article.name, article.n_layers, article.n_experts) == ("article", 1, 256)
    assert list(article.flat()) == [ids for _, ids in article.events] == list(article_stream(30))
    assert (article.lookups, article.widest) == (60, 2)
    assert list(load_workload("skewed", 30).flat()) == list(skewed_stream(30))
    assert len(load_workload("article", None).events) == 500


def test_a_trace_keeps_its_layers(trace: Path) -> None:
    workload = load_workload(str(trace), None)
    assert (workload.n_layers, workload.n_experts, workload.lost_bytes) == (2, 5, 0)
    assert list(workload.events) == EVENTS
    assert list(workload.flat()) == [(1, 3), (5, 7, 9), (3,), (9,)]
    assert (workload.lookups, workload.widest) == (7, 3)


def test_as_much_of_a_trace_as_is_wanted_and_there(trace: Path) -> None:
    assert list(load_workload(str(trace), 3).events) == EVENTS[:3]
    assert list(load_workload(str(trace), 400).events) == EVENTS


def test_an_unfinished_block_is_left_out_and_reported(trace: Path) -> None:
    trace.write_bytes(trace.read_bytes() + b"\x10\0\0\0\0\0")
    workload = load_workload(str(trace), None)
    assert list(workload.events) == EVENTS
    assert workload.lost_bytes == 6


def test_damage_is_an_error(trace: Path) -> None:
    data = bytearray(trace.read_bytes())
    data[-1] ^= 1
    trace.write_bytes(data)
    with pytest.raises(TraceError):
        load_workload(str(trace), None)


def test_a_trace_without_events(tmp_path: Path) -> None:
    path = tmp_path / "empty.trace"
    TraceWriter(path, TraceHeader(1, 1, 1, bytes(32), (0,))).close()
    with pytest.raises(ConfigError, match="no events"):
        load_workload(str(path), None)


@pytest.mark.parametrize("stream", ["", "articel", "/no/such/file", "a\0b", "x" * 5000, "."])
def test_no_such_stream(stream: str) -> None:
    with pytest.raises(ConfigError, match="one of article, skewed"):
        load_workload(stream, None)


@pytest.mark.parametrize("n_iterations", [0, -1, MAX_ITERATIONS + 1, 10**30])
def test_numbers_of_iterations(n_iterations: int) -> None:
    with pytest.raises(ConfigError, match="from 1 to 1000000"):
        load_workload("article", n_iterations)
