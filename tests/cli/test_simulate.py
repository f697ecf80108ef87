"""`mer simulate`: its table and its JSON against replays made here, and what it refuses."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest

from mer.cli.app import run_app
from mer.cli.exits import Exit
from mer.sched.belady import simulate_belady
from mer.sched.heat import HeatProfile
from mer.sched.policies.registry import POLICIES, CacheShape, make_policy
from mer.sched.simulate import Event, simulate
from mer.sched.trace import TraceHeader, TraceWriter

MODEL = bytes(range(32))
EVENTS: list[Event] = [(at % 2, (at * at % 7, 7 + at % 3)) for at in range(200)]


def write(path: Path, *, sizes: tuple[int, int] = (1000, 1000), model: bytes = MODEL) -> str:
    with TraceWriter(path, TraceHeader(2, 10, 2, model, sizes)) as writer:
        for layer, experts in EVENTS:
            writer.append(layer, 1, experts)
    return str(path)


def replay(name: str, n_slots: int, *, bypass: bool = False, sizes: tuple[int, ...] = (1000, 1000)) -> int:
    """Return the hits of a policy."""
    if name == "belady":
        return simulate_belady(EVENTS, n_slots, n_layers=2).hits
    profile = HeatProfile.count(MODEL, 2, 10, EVENTS)
    shape = CacheShape(n_layers=2, n_experts=10, n_slots=n_slots, expert_bytes=sizes, profile=profile)
    return simulate(EVENTS, make_policy(name, shape), n_slots, n_layers=2, bypass=bypass).hits


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run_app(["simulate", *arguments, "--json"]) == Exit.OK
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("bypass", [False, True])
def test_json_has_every_policy_and_the_bound(bypass: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t", sizes=(1000, 3000))
    report = run_json([trace, "--slots", "4, 8", *(["--bypass"] if bypass else [])], capsys)
    results = report.pop("results")
    assert report == {
        "trace": trace,
        "layers": 2,
        "experts_per_layer": 10,
        "top_k": 2,
        "fingerprint": MODEL.hex(),
        "events": 200,
        "lost_bytes": 0,
        "bypass": bypass,
    }
    assert [(r["slots"], r["policy"]) for r in results] == [(n, name) for n in (4, 8) for name in (*POLICIES, "belady")]
    for result in results:
        hits = replay(result["policy"], result["slots"], bypass=bypass, sizes=(1000, 3000))
        assert (result["hits"], result["lookups"], result["misses"]) == (hits, 400, 400 - hits)
        assert result["hit_rate"] == hits / 400
        by_layer = [n - m for n, m in zip(result["layer_lookups"], result["layer_hits"], strict=True)]
        assert result["layer_lookups"] == [200, 200]
        assert sum(by_layer) == 400 - hits
        assert result["missed_bytes"] == 1000 * by_layer[0] + 3000 * by_layer[1]


def test_the_table_shows_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["simulate", write(tmp_path / "t"), "--slots", "4,8"]) == Exit.OK
    head, names, *rows = capsys.readouterr().out.splitlines()
    assert head == "200 events, 2 layers of 10 experts, top 2, experts of 0.98 KiB; 400 lookups; hits in %"
    # experts cost the same, so that weighing the costs would show nothing new
    policies = [name for name in POLICIES if name != "cost"] + ["belady"]
    assert names.split() == ["slots", "share", *policies]
    for row, n_slots, share in zip(rows, (4, 8), ("20%", "40%"), strict=True):
        figures = [f"{100 * replay(name, n_slots) / 400:.2f}" for name in policies]
        assert row.split() == [str(n_slots), share, *figures]


def test_the_table_shows_bytes_where_they_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t", sizes=(1000, 3000))
    assert run_app(["simulate", trace, "--slots", "4", "--policy", "cost"]) == Exit.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["slots", "share", "cost", "belady"]
    assert lines[3:5] == ["", "bytes missed"]
    assert lines[5] == lines[1]
    assert len(lines) == 7


def test_slots_may_be_shares_of_all_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t")
    report = run_json([trace, "--slots", "3,25%,12.5%,1%,100%", "--policy", "lfu"], capsys)
    assert [r["slots"] for r in report["results"] if r["policy"] == "lfu"] == [3, 5, 2, 1, 20]
    report = run_json([trace, "--policy", "lfu"], capsys)
    assert [r["slots"] for r in report["results"][::2]] == [2, 5, 10, 15]


def test_heat_is_saved_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, heat = write(tmp_path / "t"), tmp_path / "heat.json"
    arguments = [trace, "--slots", "4", "--policy", "static"]
    own = run_json([*arguments, "--save-heat", str(heat)], capsys)
    saved = HeatProfile.load(heat, fingerprint=MODEL, n_layers=2, n_experts=10)
    assert saved.counts.tolist() == HeatProfile.count(MODEL, 2, 10, EVENTS).counts.tolist()
    assert run_json([*arguments, "--heat", str(heat)], capsys) == own
    HeatProfile(MODEL, 100 - saved.counts, saved.visits).save(heat)  # what is cold is hot
    assert run_json([*arguments, "--heat", str(heat)], capsys)["results"][0]["hits"] < own["results"][0]["hits"]


def test_an_unfinished_block_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write(tmp_path / "t")
    with open(trace, "ab") as stream:
        stream.write(b"\x01\x00\x00")
    assert run_app(["simulate", trace, "--json"]) == Exit.OK
    out, err = capsys.readouterr()
    assert json.loads(out)["lost_bytes"] == 3
    assert "the last 3 bytes are an unfinished block and were left out" in " ".join(err.split())


def test_an_empty_trace_has_no_hits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t"
    TraceWriter(path, TraceHeader(2, 10, 2, MODEL, (0, 0))).close()
    assert {r["hit_rate"] for r in run_json([str(path)], capsys)["results"]} == {0.0}
    assert {r["missed_bytes"] for r in run_json([str(path)], capsys)["results"]} == {None}
    assert run_app(["simulate", str(path)]) == Exit.OK
    assert capsys.readouterr().out.startswith("0 events, 2 layers of 10 experts, top 2; 0 lookups; hits in %\n")


SLOTS = ["0", "-1", "x", "", "4,", "4.5", "0%", "101%", "1e3", "4 5", "\u0663", "%", "12%%", "9" * 30]


@pytest.mark.parametrize("slots", SLOTS)
def test_slots_that_make_no_sense_are_a_usage_error(
    slots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["simulate", write(tmp_path / "t"), f"--slots={slots}"]) == Exit.USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert "write numbers above 0, or shares" in " ".join(err.split())


def test_a_trace_that_claims_more_than_any_model_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = struct.pack("<8sHHIII", b"MERTRACE", 1, 0, 1024, 32768, 8) + MODEL + bytes(8 * 1024)
    (tmp_path / "t").write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    tracemalloc.start()
    try:
        assert run_app(["simulate", str(tmp_path / "t")]) == Exit.FAILED
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert "65536 in all" in capsys.readouterr().err


def test_errors_say_what_and_have_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, heat = write(tmp_path / "t"), tmp_path / "heat.json"

    def refused(code: Exit, *arguments: str) -> str:
        assert run_app(["simulate", *arguments]) == code
        out, err = capsys.readouterr()
        assert out == ""
        return " ".join(err.split())

    assert "no policy is named 'fifo'; there are lfru, " in refused(Exit.USAGE, trace, "--policy", "fifo")
    refused(Exit.USAGE)
    refused(Exit.USAGE, trace, "--no-such-option")
    assert "No such file" in refused(Exit.FAILED, str(tmp_path / "none"))
    (tmp_path / "other").write_bytes(b"GGUF")
    assert "no routing trace" in refused(Exit.FAILED, str(tmp_path / "other"))
    damaged = bytearray(Path(trace).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    assert "checksum" in refused(Exit.FAILED, str(tmp_path / "damaged"))
    assert "No such file" in refused(Exit.FAILED, trace, "--heat", str(heat))
    HeatProfile.count(bytes(32), 2, 10, EVENTS).save(heat)
    assert "of another model" in refused(Exit.FAILED, trace, "--heat", str(heat))
    assert "No such file" in refused(Exit.FAILED, trace, "--save-heat", str(tmp_path / "no folder" / "h"))
