"""The command with the real engine on the embedded model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mer.cli.app import run_app
from mer.embedded import embedded_model_path

ROOT = Path(__file__).parents[2]
MEMORY = ("--memory", "2GiB")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_app(["run", *MEMORY, *arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def test_text_and_json_and_ids_agree(capsys: pytest.CaptureFixture[str]) -> None:
    by_text = run_json(capsys, "Once upon a time", "-n", "20")
    assert run_app(["run", *MEMORY, "Once upon a time", "-n", "20"]) == 0
    assert capsys.readouterr().out == by_text["text"] + "\n"
    stats = by_text["stats"]
    assert (by_text["finish_reason"], len(by_text["tokens"])) == ("length", 20)
    assert (stats["prompt_tokens"], stats["completion_tokens"]) == (6, 20)
    assert stats["cache_hits"] + stats["cache_misses"] >= 20 * 6 * 2
    assert stats["cache_misses"] >= stats["decode_bytes_read"] // (300 << 10)
    assert 0 < stats["decode_bytes_read"] < stats["bytes_read"]
    assert 0 < stats["peak_rss_bytes"] < 2 << 30
    assert all(stats[name] > 0 for name in ("load_s", "prefill_s", "decode_s"))
    longer = run_json(capsys, "Once upon a time", "-n", "5")
    assert longer["tokens"] == by_text["tokens"][:5]


def test_token_ids_are_used_exactly_as_given(capsys: pytest.CaptureFixture[str]) -> None:
    with_bos = run_json(capsys, "--tokens", "1,301,384", "-n", "4")
    without = run_json(capsys, "--tokens", "301,384", "-n", "4")
    assert with_bos["stats"]["prompt_tokens"] == 3
    assert without["stats"]["prompt_tokens"] == 2
    assert run_app(["run", *MEMORY, "--tokens", "4096"]) == 2
    assert "token id 4096" in capsys.readouterr().err


def test_few_slots_read_more_and_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    many = run_json(capsys, "Once upon a time", "-n", "12")
    few = run_json(capsys, "Once upon a time", "-n", "12", "--slots", "7", "--threads", "1")
    assert few["tokens"] == many["tokens"]
    assert few["stats"]["bytes_read"] > many["stats"]["bytes_read"]


def test_the_seed_decides(capsys: pytest.CaptureFixture[str]) -> None:
    sampled = [run_json(capsys, "Once", "-n", "12", "--temperature", "1.5", "--seed", seed)["tokens"] for seed in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_stop_string_ends_the_text_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    whole = run_json(capsys, "Once upon a time", "-n", "30")["text"]
    stop = whole[20:25]
    stopped = run_json(capsys, "Once upon a time", "-n", "30", "--stop", stop)
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_too_little_memory_has_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run", "x"], ["plan"]):
        assert run_app([*command, "--memory", "64MiB"]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert "the smallest that works is" in err
        assert "expert slots" in err


def test_a_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["run", *MEMORY, "--chat", "Hello"]) == 1
    assert "template" in capsys.readouterr().err


def test_a_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["plan", str(embedded_model_path()), *MEMORY, "--slots", "12", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["budget_bytes"] == 2 << 30
    assert sum(plan["parts"].values()) + plan["unused_bytes"] == plan["budget_bytes"]
    assert plan["parts"]["expert slots"] == 12 * plan["slot_bytes"][0]
    assert plan["expected_read_bytes_per_token"] == plan["expert_bytes_per_token"] * 3 // 4
    slowest_s = max(plan["disk_s_per_token"], plan["memory_s_per_token"])
    assert plan["limit_tokens_per_s"] == pytest.approx(1 / slowest_s)
    assert plan["disk_s_per_token"] == plan["expected_read_bytes_per_token"] / plan["disk_bytes_per_s"]
    assert plan["binds"] == ("disk" if slowest_s == plan["disk_s_per_token"] else "memory")
    assert run_app(["plan", *MEMORY]) == 0
    out = capsys.readouterr().out
    assert "kernel compiler" in out
    assert "48 slots of 252 KiB for 48 experts: 100% stay in memory" in out


def test_ctrl_c_stops_the_real_engine() -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mer", "run", *MEMORY, "--slots", "2", "Once upon a time"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)  # the first text is there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert b"(interrupted)" in err
    assert b"lookups hit" in err
    assert b"Traceback" not in err
