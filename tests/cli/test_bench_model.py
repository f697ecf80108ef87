"""`mer bench MODEL` with the real engine on the embedded model."""

from __future__ import annotations

import csv
import io
import json
import signal
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mer.bench.model_run import run_case
from mer.cli import bench_model
from mer.cli.app import run_app
from mer.embedded import embedded_model_path

SMALL = ("-p", "8", "-n", "4", "-r", "2", "--no-warmup", "--memory", "2GiB", "--threads", "1")
LAYERS, USED = 6, 2  # of the embedded model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe nothing: these figures are the limits."""
    for name in ("MER_MEMORY", "MER_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench_model, "_probe", lambda _model, _threads: (8e9, 2e9))


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    assert run_app(["bench", *SMALL, *arguments, "-o", "json"]) == code
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_a_row_for_every_test(capsys: pytest.CaptureFixture[str]) -> None:
    prompt, generation = bench(capsys, str(embedded_model_path()))
    assert (prompt["test"], prompt["n_tokens"], generation["test"], generation["n_tokens"]) == ("pp8", 8, "tg4", 4)
    for row in (prompt, generation):
        assert (row["model"], row["backend"], row["threads"]) == ("mer-tales", "CPU", 1)
        assert row["path"] == str(embedded_model_path())
        assert 12 << 20 < row["size_bytes"] < embedded_model_path().stat().st_size
        assert row["memory_bytes"] == row["settings"]["memory_bytes"] == 2 << 30
        assert row["kernels"] == row["settings"]["kernels"]
        assert row["settings"]["prefix_reuse"] is False
        assert row["settings"]["context"] == 9
        assert 0 < row["compile_s"] < row["load_s"]
        speeds = [one["tokens_per_s"] for one in row["rounds"]]
        assert len(speeds) == 2
        assert speeds == [row["n_tokens"] / one["time_s"] for one in row["rounds"]]
        assert row["tokens_per_s"] == pytest.approx(statistics.mean(speeds))
        assert row["tokens_per_s_sd"] == pytest.approx(statistics.stdev(speeds))
        took_s = sum(one["time_s"] for one in row["rounds"])
        assert row["weights_bytes_per_s"] == pytest.approx(sum(one["weights_bytes"] for one in row["rounds"]) / took_s)
        assert row["memory_rate_share"] == pytest.approx(row["weights_bytes_per_s"] / 8e9)
        hits, misses, read, reading_s = (
            sum(one[name] for one in row["rounds"]) for name in ("hits", "misses", "bytes_read", "reading_s")
        )
        assert row["hit_rate"] == hits / (hits + misses)
        assert row["read_bytes_per_token"] == read / (2 * row["n_tokens"])
        if read:
            assert row["disk_rate_share"] == pytest.approx(read / reading_s / 2e9)
        assert row["first_token_s"] > 0
        assert row["interrupted"] is False
    assert [one["first_token_s"] for one in prompt["rounds"]] == [one["time_s"] for one in prompt["rounds"]]
    assert prompt["rounds"][0]["misses"] > 0
    for one in generation["rounds"]:
        assert one["batches"] == 4
        assert one["hits"] + one["misses"] == 4 * LAYERS * USED


def test_lists_depths_and_warm_ups(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[Any] = []

    async def record(engine: Any, case: Any, seed: Any, on_token: Any) -> Any:
        seeds.append(seed)
        return await run_case(engine, case, seed, on_token)

    monkeypatch.setattr(bench_model, "run_case", record)
    arguments = ["-p", "8,16", "-p", "0", "-n", "2", "-d", "0,20", "-r", "1", "--memory", "2GiB", "-o", "json"]
    assert run_app(["bench", *arguments]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["test"] for row in rows] == ["pp8", "pp16", "tg2", "pp8 @ d20", "pp16 @ d20", "tg2 @ d20"]
    assert len(seeds) == len(set(seeds)) == 12
    assert {seed[0] for seed in seeds} == {rows[0]["settings"]["seed"]}
    assert [row["tokens_per_s_sd"] for row in rows] == [None] * 6
    assert rows[0]["settings"]["context"] == 37
    assert rows[3]["rounds"][0]["time_s"] < rows[3]["rounds"][0]["first_token_s"]


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", *SMALL]) == 0
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| model | size | backend | threads | test | t/s | ")
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[4] for line in lines[2:]] == ["pp8", "tg4"]
    assert lines[2].startswith("| mer-tales | 12.2 MiB | CPU | 1 | pp8 | ")
    assert all(" ± " in line for line in lines[2:])
    assert "memory budget 2.00 GiB" in out
    assert "probed: memory 8.00, 8.00 GB/s, disk 2.00, 2.00 GB/s" in out
    assert err == ""


def test_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", *SMALL, "-o", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["test"], row["n_tokens"]) for row in rows] == [("pp8", "8"), ("tg4", "4")]
    for row in rows:
        speeds = [one["tokens_per_s"] for one in json.loads(row["rounds"])]
        assert float(row["tokens_per_s"]) == pytest.approx(statistics.mean(speeds))


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["-r", "0"], 2, "--rounds 0: write a number from 1 to 1000"),
        (["-r", "9999"], 2, "from 1 to 1000"),
        (["-p", "x"], 2, "--prompt-tokens x"),
        (["-n", "-4"], 2, "-4"),
        (["-d", "1,,2"], 2, "--depth"),
        (["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["-p", "256"], 2, "pp256 needs 257 positions; the model was trained for 256"),
        (["-o", "xml"], 2, "xml"),
        (["--policy", "lru"], 2, "lru"),
        (["--memory", "8X"], 2, "not a size"),
        (["--memory", "64MiB"], 4, "the smallest that works"),
        (["--memories", "2GiB,64MiB"], 4, "the smallest that works"),
        (["--memories", "2GiB,"], 2, "--memories"),
        (["--plot", "x.png"], 2, "--memories"),
        (["--plot", "x.png", "--memories", "2GiB", "-n", "0"], 2, "--tokens a number above 0"),
        (["--plot", "x.pdf", "--memories", "2GiB"], 2, "end in .png"),
        (["--plot", "/no/such/x.png", "--memories", "2GiB"], 2, "no file of that name"),
        (["--vs", "/no/such/llama-bench"], 1, "no program of that name"),
        (["--vs", "/bin/true", "--memories", "2GiB"], 2, "exclude each other"),
        (["/no/such/model.gguf"], 3, "/no/such/model.gguf"),
    ],
)
def test_hostile_options(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str) -> None:
    assert run_app(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err


@pytest.mark.parametrize("output", ["json", "md", "csv"])
def test_ctrl_c_prints_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    def press(bars: Any, stage: str, total: int, done: int) -> None:
        if stage == "tg4, round 2 of 2" and done == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench_model, "_show", press)
    assert run_app(["bench", *SMALL, "-o", output]) == 130
    out, err = capsys.readouterr()
    if output == "json":
        prompt, generation = json.loads(out)
        assert (len(prompt["rounds"]), len(generation["rounds"])) == (2, 1)
        assert prompt["interrupted"] is generation["interrupted"] is True
        assert len(prompt["disk_bytes_per_s"]) == 1
    else:
        assert "interrupted: these are the figures so far" in (out if output == "md" else err)


def test_ctrl_c_before_the_first_round_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_model, "_show", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run_app(["bench", "-p", "8", "-n", "4", "--memory", "2GiB"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted before the first round ended" in err


def test_budgets_are_swept_and_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Axes:
        def __getattr__(self, name: str) -> Any:
            return lambda *positional, **named: calls.append((name, positional))

    class Figure:
        def __init__(self, **_: Any) -> None:
            pass

        def add_subplot(self) -> Axes:
            return Axes()

        def savefig(self, path: Path, **_: Any) -> None:
            path.write_bytes(b"a picture")

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    picture = tmp_path / "curve.png"
    assert run_app(["bench", *SMALL, "--memories", "3GiB,2GiB", "--plot", str(picture)]) == 0
    out, err = capsys.readouterr()
    assert "| threads | memory | test |" in out
    assert [" | ".join(line.split(" | ")[4:6]) for line in out.splitlines()[2:6]] == [
        "3.00 GiB | pp8",
        "3.00 GiB | tg4",
        "2.00 GiB | pp8",
        "2.00 GiB | tg4",
    ]
    in_force = [line for line in out.splitlines() if line.startswith("in force: ")]
    assert ["3.00 GiB" in in_force[0], "2.00 GiB" in in_force[1], len(in_force)] == [True, True, 2]
    assert picture.read_bytes() == b"a picture"
    assert f"drawn: {picture}" in err
    points = dict(calls)["errorbar"]
    assert points[0] == [2.0, 3.0]
    assert dict(calls)["set_ylabel"] == ("tokens/s, tg4",)


def test_a_picture_needs_matplotlib(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_app(["bench", *SMALL, "--memories", "2GiB", "--plot", str(tmp_path / "x.png")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install matplotlib" in err
