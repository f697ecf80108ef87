"""`mer bench stream`, with real reads of tiny experts."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mer.bench import stream as bench_runs
from mer.bench.stream import POLICY_NAMES
from mer.cli import bench_stream
from mer.cli.app import run_app
from mer.sched.trace import TraceHeader, TraceWriter

TINY = ("--geometry", "64x32", "--threads", "1")
COUNTS = ("iterations", "lookups", "hits", "hit_rate", "reads", "prefetches", "prefetches_used", "bytes_read")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.delenv("MER_THREADS", raising=False)
    monkeypatch.setattr("mer.bench.probe.MAX_BYTES", 1 << 20)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "routes.trace"
    header = TraceHeader(n_layers=3, n_experts=5, top_k=2, fingerprint=bytes(32), expert_bytes=(0, 0, 0))
    with TraceWriter(path, header) as writer:
        for at in range(40):
            writer.append(at % 3, 1, [at % 5, (at + 1 + at % 2) % 5])
    return path


def bench(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    assert run_app(["bench", "stream", *arguments, "-o", "json"]) == code
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


@pytest.mark.parametrize(
    ("iterations", "hits", "prefetches", "reads"), [(500, 158, 155, 997), (10_000, 3098, 6891, 23_793)]
)
def test_the_cache_alone_gives_the_golden_figures(
    capsys: pytest.CaptureFixture[str], iterations: int, hits: int, prefetches: int, reads: int
) -> None:
    one = bench(capsys, "--policy", "seed", "--simulate", "--iterations", str(iterations), "--geometry", "mixtral")
    assert (one["iterations"], one["lookups"]) == (iterations, 2 * iterations)
    assert (one["hits"], one["prefetches"], one["reads"]) == (hits, prefetches, reads)
    assert one["bytes_read"] == reads * 99_090_432
    assert one["prefetches_used"] + one["prefetches_wasted"] == prefetches
    assert one["simulated"] is True
    for name in ("wall_s", "iterations_per_s", "read_p50_s", "compute_p50_s", "disk_share", "output_sha256"):
        assert one[name] is None


def test_the_bounds_of_the_article(capsys: pytest.CaptureFixture[str]) -> None:
    one = bench(capsys, "--simulate", "--iterations", "10000")
    assert one["policy"] == "lfru"
    assert one["lru_hit_rate"] == pytest.approx(0.147, abs=5e-4)
    assert one["belady_hit_rate"] == pytest.approx(0.360, abs=5e-4)
    assert 0.147 <= one["hit_rate"] <= one["belady_hit_rate"]


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_real_run_counts_as_the_cache_alone(capsys: pytest.CaptureFixture[str], policy: str) -> None:
    arguments = ("--policy", policy, "--iterations", "60", *TINY)
    real, alone = bench(capsys, *arguments), bench(capsys, *arguments, "--simulate")
    if policy != "layer-lru":  # of two experts that come together, the disk decides which is the older
        assert [real[name] for name in COUNTS] == [alone[name] for name in COUNTS]
    assert real["reads"] == real["lookups"] - real["hits"] + real["prefetches"]
    assert real["bytes_read"] == real["reads"] * 3 * 64 * 18
    assert real["bytes_transferred"] == real["reads"] * 3 * 4096
    assert real["wall_s"] > 0
    assert real["iterations_per_s"] == pytest.approx(60 / real["wall_s"])
    assert 0 < real["read_p50_s"] <= real["read_p95_s"] <= real["read_p99_s"]
    assert 0 < real["compute_p50_s"] < real["wall_s"]
    assert real["bytes_per_s"] == pytest.approx(real["bytes_transferred"] / real["wall_s"])
    before, after = real["disk_bytes_per_s"]
    assert real["disk_share"] == pytest.approx(real["bytes_per_s"] / ((before + after) / 2))
    settings = real["settings"]
    assert (settings["slots"], settings["geometry"], settings["type"], settings["threads"]) == (16, "64x32", "Q4_0", 1)
    assert settings["buffers"] == (18 if policy == "seed" else 16)
    assert settings["io_threads"] == (3 if policy == "seed" else 4)
    assert settings["io_mode"]["reason"]
    assert real["interrupted"] is False


def test_one_output_for_every_policy_and_slot_count(capsys: pytest.CaptureFixture[str]) -> None:
    hashes = {
        bench(capsys, "--iterations", "20", "--policy", policy, "--slots", slots, *TINY)["output_sha256"]
        for policy in POLICY_NAMES
        for slots in ("1", "16")
    }
    assert len(hashes) == 1
    assert hashes != {bench(capsys, "--iterations", "21", *TINY)["output_sha256"]}


def test_policies_take_turns_and_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    show = bench_stream._show

    def record(bars: Any, stage: str, total: int, done: int) -> None:
        if done == 1:
            order.append(stage)
        show(bars, stage, total, done)

    monkeypatch.setattr(bench_stream, "_show", record)
    both = bench(capsys, "--policy", "lfru", "--policy", "seed", "--iterations", "12", *TINY)
    assert order == [f"{name}, round {number} of 3" for number in (1, 2, 3) for name in ("lfru", "seed")]
    mer, seed = both["results"]
    assert (mer["policy"], seed["policy"], mer["rounds"], seed["rounds"]) == ("lfru", "seed", 3, 3)
    for one in (mer, seed):
        assert len(one["wall_s_of_rounds"]) == 3
        assert one["wall_s"] == sorted(one["wall_s_of_rounds"])[1]
    ratio = both["iterations_per_s_ratios"]["lfru/seed"]
    assert ratio == pytest.approx(seed["wall_s"] / mer["wall_s"])


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--policy", "lfru", "--policy", "seed", "--rounds", "1", "--iterations", "12", *TINY]
    assert run_app(["bench", "stream", *arguments]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert lines[:2] == ["| policy | lfru | seed |", "| --- | ---: | ---: |"]
    assert all(line.count("|") == 4 for line in lines)
    assert "| iterations/s | " in out
    assert "Belady" in out
    assert "iterations/s, lfru/seed: " in out
    assert "tokens/s" not in out
    assert run_app(["bench", "stream", "--simulate"]) == 0
    out = capsys.readouterr().out
    assert "| iterations/s | - |" in out
    assert "disk" not in out


def test_a_trace_is_replayed_layer_by_layer(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    for policy in ("lfru", "seed"):
        arguments = ("--stream", str(trace), "--slots", "6", "--policy", policy, *TINY)
        real, alone = bench(capsys, *arguments), bench(capsys, *arguments, "--simulate")
        assert [real[name] for name in COUNTS] == [alone[name] for name in COUNTS]
        assert (real["iterations"], real["lookups"]) == (40, 80)
        assert (real["settings"]["layers"], real["settings"]["experts_per_layer"]) == (3, 5)
        assert real["stream"] == str(trace)
        assert bench(capsys, *arguments, "--iterations", "7")["iterations"] == 7


def test_a_trace_that_was_cut_off_is_replayed_as_far_as_it_goes(
    capsys: pytest.CaptureFixture[str], trace: Path
) -> None:
    trace.write_bytes(trace.read_bytes() + b"\x09\0\0\0")
    assert run_app(["bench", "stream", "--stream", str(trace), "--simulate"]) == 0
    assert "the last 4 bytes are an unfinished block" in capsys.readouterr().err


def test_the_data_are_made_once_and_announced(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    arguments = ["bench", "stream", "--iterations", "3", "--data", str(path), *TINY]
    assert run_app(arguments) == 0
    err = capsys.readouterr().err
    assert f"making {path}" in err
    assert "3.07 MiB of disk space for 256 experts of 3.38 KiB" in err
    made = path.stat().st_mtime_ns
    assert run_app(arguments) == 0
    assert "making" not in capsys.readouterr().err
    assert path.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--stream", "articel"], 2, "one of article, skewed"),
        (["--iterations", "0"], 2, "from 1 to 1000000"),
        (["--iterations", "x"], 2, "iterations"),
        (["--slots", "0"], 2, "--slots 0"),
        (["--slots", "-3"], 2, "slots"),
        (["--slots", "9999999"], 2, "from 1 to 1048576"),
        (["--policy", "lru"], 2, "there are lfru, layer-lru, lfu, static, cost, seed"),
        (["--policy", "seed", "--policy", "seed"], 2, "given twice"),
        (["--geometry", "mixtral/3"], 2, "can be divided by"),
        (["--weights", "q8_0"], 2, "q4_0"),
        (["--rounds", "0"], 2, "--rounds 0"),
        (["--threads", "0"], 2, "--threads 0"),
        (["--data", "/no/such/folder/x.gguf"], 2, "is no folder"),
        (["-o", "csv"], 2, "csv"),
        (["--speed", "3"], 2, "--speed"),
    ],
)
def test_hostile_options(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, reason: str) -> None:
    assert run_app(["bench", "stream", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err


def test_a_damaged_trace(capsys: pytest.CaptureFixture[str], trace: Path) -> None:
    data = bytearray(trace.read_bytes())
    data[-1] ^= 0xFF
    trace.write_bytes(data)
    assert run_app(["bench", "stream", "--stream", str(trace)]) == 1
    assert str(trace) in capsys.readouterr().err


def test_a_full_disk(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert run_app(["bench", "stream", "--data", str(tmp_path / "x.gguf")]) == 1
    assert "takes 1.48 GiB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runs, "default_budget", lambda: (100_000, "a test"))
    assert run_app(["bench", "stream", *TINY]) == 4
    assert "16 buffers of 12.0 KiB need 192 KiB" in capsys.readouterr().err
    assert bench(capsys, "--slots", "8", "--iterations", "2", *TINY)["settings"]["buffers"] == 8


def test_data_of_other_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "data.gguf")
    assert run_app(["bench", "stream", "--iterations", "1", "--data", path, *TINY]) == 0
    assert run_app(["bench", "stream", "--iterations", "1", "--data", path, "--geometry", "32x32"]) == 3
    assert "a data file of other experts" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["seed", "lfru"])
def test_ctrl_c_prints_what_was_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    show = bench_stream._show

    def press(bars: Any, stage: str, total: int, done: int) -> None:
        show(bars, stage, total, done)
        if done == 5:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench_stream, "_show", press)
    one = bench(capsys, "--policy", policy, "--iterations", "5000", *TINY, code=130)
    assert one["interrupted"] is True
    assert 5 <= one["iterations"] < 5000
    assert one["lookups"] == 2 * one["iterations"]
    assert len(one["disk_bytes_per_s"]) == 1
    alone = bench(capsys, "--policy", policy, "--iterations", str(one["iterations"]), "--simulate")
    assert one["hits"] == alone["hits"]
    assert run_app(["bench", "stream", "--policy", policy, "--iterations", "5000", *TINY]) == 130
    assert "interrupted: these are the figures so far" in capsys.readouterr().out


def test_ctrl_c_keeps_the_rounds_that_are_complete(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(bars: Any, stage: str, total: int, done: int) -> None:
        if stage.startswith("seed, round 2") and done == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(bench_stream, "_show", press)
    both = bench(capsys, "--policy", "lfru", "--policy", "seed", "--iterations", "300", *TINY, code=130)
    mer, seed = both["results"]
    assert (mer["rounds"], seed["rounds"]) == (2, 1)
    assert (mer["iterations"], seed["iterations"]) == (300, 300)
    assert both["iterations_per_s_ratios"].keys() == {"lfru/seed"}


def test_the_help_of_bench_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["bench", "--help"]) == 0
    assert "stream" in capsys.readouterr().out


def test_a_data_file_of_its_own_that_is_cut_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    counts = ("--iterations", "2", "--slots", "4", "--policy", "lfru", *TINY)
    bench(capsys, *counts)
    (data,) = (tmp_path / "mer" / "bench").glob("*.gguf")
    whole = data.read_bytes()
    data.write_bytes(whole[:-5000])
    bench(capsys, *counts)
    assert data.read_bytes() == whole
    data.write_bytes(whole[:-5000])
    assert run_app(["bench", "stream", *counts, "--data", str(data)]) == 3
    assert data.read_bytes() == whole[:-5000]
