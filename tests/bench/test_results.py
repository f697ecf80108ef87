"""Quantiles, bounds and the probe's plan of reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.bench import probe
from mer.bench.datafile import plan_data
from mer.bench.geometry import parse_geometry
from mer.bench.results import bounds
from mer.bench.stream import Task, count
from mer.bench.tally import quantile
from mer.bench.workload import Workload, load_workload
from mer.errors import ReadError


@given(values=st.lists(st.floats(0, 100), min_size=1), q=st.floats(0.001, 1))
def test_quantiles(values: list[float], q: float) -> None:
    assert quantile(values, q) == np.quantile(values, q, method="inverted_cdf")


def test_no_values_have_no_quantile() -> None:
    assert quantile([], 0.5) is None


def test_bounds_look_up_one_expert_after_the_other() -> None:
    """With one slot, expert 1 pushes out expert 0 within the iteration; the oracle keeps 0 for the next one."""
    workload = Workload(name="x", n_layers=1, n_experts=2, events=((0, (0, 1)), (0, (0,)), (0, (0,))))
    bound = bounds(workload, 1)
    assert (bound.lru, bound.belady) == (1 / 4, 2 / 4)


@given(
    extents=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 60_000)), min_size=1, max_size=8),
    pages=st.integers(1, 6),
)
def test_a_probe_reads_whole_extents_in_aligned_chunks(extents: list[tuple[int, int]], pages: int) -> None:
    chunks = list(probe._chunks(extents, pages * 4096, 4096))
    for start, length, needed in chunks:
        assert start % 4096 == length % 4096 == 0
        assert 0 < needed <= length <= pages * 4096
    covered = {page for start, length, _ in chunks for page in range(start // 4096, (start + length) // 4096)}
    wanted = {page for offset, n in extents for page in range(offset // 4096, -(-(offset + n) // 4096))}
    assert covered == wanted
    ends = max(offset + n for offset, n in extents)
    assert max(start + needed for start, _, needed in chunks) == ends  # nothing behind the last byte is asked for


def test_a_probe_stops_after_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_BYTES", 10 * 4096)
    extents = [(n * 65536, 65536) for n in range(100)]
    assert sum(length for _, length, _ in probe._chunks(extents, 16384, 4096)) == 12 * 4096


def test_a_probe_of_a_real_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(300_000))
    assert probe.disk_bytes_per_s(path, [(0, 200_000), (200_000, 100_000)], chunk_bytes=16384, depth=3) > 0
    with pytest.raises(ReadError, match="truncated"):
        probe.disk_bytes_per_s(path, [(0, 400_000)], chunk_bytes=16384, depth=3)


@pytest.mark.parametrize(("stream", "table"), [("article", "| article, slots |"), ("skewed", "| skewed, slots |")])
def test_the_documented_hits_are_those_of_this_release(stream: str, table: str) -> None:
    document = (Path(__file__).parents[2] / "docs" / "bench-stream.md").read_text()
    names = [cell.strip() for cell in document[document.index(table) :].splitlines()[0].split("|")[2:-1]]
    row = next(line for line in document[document.index(table) :].splitlines() if line.startswith("| 16 |"))
    documented = dict(zip(names, (cell.strip() for cell in row.split("|")[2:-1]), strict=True))
    workload = load_workload(stream, 10_000)
    plan = plan_data(Path(), parse_geometry("64x32", "q4_0"), 1, 256)
    task = Task(workload=workload, data=plan, n_slots=16, threads=1)
    bound = bounds(workload, 16)
    rates = {"lfru": count(task, "lfru").hit_rate, "seed": count(task, "seed").hit_rate}
    rates |= {"LRU": bound.lru, "Belady": bound.belady}
    assert documented == {name: f"{100 * rate:.2f}" for name, rate in rates.items()}
