"""Figures of a whole-model benchmark, and their tables."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import attrs
import pytest

from mer.bench.cases import Case
from mer.bench.model_results import Counts, Limits, Measured, Round, Setup, describe, mean_sd
from mer.bench.tables import to_csv, to_json, to_markdown

SETUP = Setup(
    model="a|b\nc",
    path="/m.gguf",
    size_bytes=3 << 30,
    kernels="portable",
    threads=3,
    memory_bytes=2 << 30,
    lookup_bytes=1000,
    dense_bytes=50,
    compile_s=1.5,
    load_s=2.0,
    settings={"context": 9},
)
LIMITS = Limits(memory_bytes_per_s=(1000.0, 3000.0), disk_bytes_per_s=(400.0,))


def a_round(time_s: float, **counts: float) -> Round:
    return Round(n_tokens=8, first_token_s=time_s / 2, counts=Counts(time_s=time_s, **counts))


def measured(*rounds: Round, depth: int = 0) -> Measured:
    return Measured(case=Case(n_gen=8, depth=depth), setup=SETUP, rounds=list(rounds))


def two() -> dict[str, Any]:
    return describe(
        measured(
            a_round(2.0, batches=8, hits=3, misses=1, bytes_read=600, reading_s=1.0),
            a_round(4.0, batches=8, hits=4, misses=0, bytes_read=200, reading_s=3.0),
        ),
        LIMITS,
    )


def test_the_mean_and_the_sample_standard_deviation() -> None:
    assert mean_sd([4.0, 2.0]) == pytest.approx((3.0, 2**0.5))
    assert mean_sd([4.0]) == (4.0, None)


def test_moments_between_counts() -> None:
    start, end = Counts(time_s=1.0, hits=10, bytes_read=100), Counts(time_s=3.0, hits=30, bytes_read=500)
    assert start.towards(end, 0) == start
    assert start.towards(end, 1) == end
    assert start.towards(end, 0.25) == Counts(time_s=1.5, hits=15, bytes_read=200)
    assert end.since(start) == Counts(time_s=2.0, hits=20, bytes_read=400)


def test_every_figure() -> None:
    row = two()
    assert (row["test"], row["n_tokens"], row["model"], row["backend"], row["threads"]) == (
        "tg8",
        8,
        "a|b\nc",
        "CPU",
        3,
    )
    assert [one["tokens_per_s"] for one in row["rounds"]] == [4.0, 2.0]
    assert row["tokens_per_s"] == 3.0
    assert row["tokens_per_s_sd"] == pytest.approx(2**0.5)
    assert row["weights_bytes_per_s"] == (8 * 1000 + 16 * 50) / 6
    assert row["memory_rate_share"] == pytest.approx(8800 / 6 / 2000)
    assert row["hit_rate"] == 7 / 8
    assert row["read_bytes_per_token"] == 800 / 16
    assert row["read_bytes_per_s"] == 200
    assert row["disk_rate_share"] == 0.5
    assert row["first_token_s"] == 1.5
    assert (row["compile_s"], row["load_s"], row["memory_bytes"]) == (1.5, 2.0, 2 << 30)
    assert row["settings"] == {"context": 9}


def test_what_was_not_measured_is_none() -> None:
    row = describe(measured(a_round(2.0, batches=8)), Limits(), interrupted=True)
    assert row["interrupted"] is True
    for name in ("tokens_per_s_sd", "memory_rate_share", "hit_rate", "read_bytes_per_s", "disk_rate_share"):
        assert row[name] is None
    assert row["read_bytes_per_token"] == 0
    line = to_markdown([row]).splitlines()[2]
    assert "| 4.00 | 0.00 | - | - | 0 B | - | 1.00 s |" in line


def test_markdown_as_llama_bench_writes_it() -> None:
    head, rule, line = to_markdown([two()]).splitlines()
    assert head.startswith("| model | size | backend | threads | test | t/s | weights GB/s |")
    assert rule.count("|") == head.count("|")
    assert line.startswith("| a\\|b c | 3.00 GiB | CPU | 3 | tg8 | 3.00 ± 1.41 | 0.00 | 73% | 87.5% | 50 B | 50% | ")
    bigger = describe(
        Measured(case=Case(n_prompt=8, depth=4), setup=attrs.evolve(SETUP, memory_bytes=4 << 30), rounds=[a_round(1)]),
        LIMITS,
    )
    table = to_markdown([two(), bigger])
    assert "| threads | memory | test |" in table
    assert "| 4.00 GiB | pp8 @ d4 | 8.00 |" in table
    assert "program" not in table


def test_json_and_csv_parse_back() -> None:
    rows = [two(), describe(measured(a_round(2.0), depth=5), LIMITS)]
    assert json.loads(to_json(rows)) == rows
    parsed = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [row["test"] for row in parsed] == ["tg8", "tg8 @ d5"]
    for row, one in zip(rows, parsed, strict=True):
        assert list(one) == list(row)
        assert float(one["tokens_per_s"]) == row["tokens_per_s"]
        assert json.loads(one["rounds"]) == row["rounds"]
        assert one["model"] == row["model"]
        assert one["interrupted"] == "false"
    assert parsed[1]["tokens_per_s_sd"] == ""
