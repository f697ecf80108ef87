"""`mer bench MODEL --vs`, with a script in the place of llama-bench."""

from __future__ import annotations

import csv
import io
import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from mer.bench.llama import LlamaBenchError
from mer.bench.model_run import run_case
from mer.cli import bench_model
from mer.cli.app import run_app
from mer.embedded import embedded_model_path
from tests.cli.test_bench_model import SMALL, bench, quick

__all__ = ["quick"]  # a fixture that every test uses

FAKE = """#!{python}
import json, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(json.dumps(given) + "\\n")
print("loading the model", file=sys.stderr)
test = {{"n_prompt": int(given["-p"]), "n_gen": int(given["-n"]), "avg_ts": 250.0, "n_threads": int(given["-t"]),
         "model_type": "llama 12M Q8_0", "model_size": 12789504, "backends": "CPU"}}
{body}
"""
ANSWERS = "print(json.dumps([test]))"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


def fake_llama_bench(log: Path, body: str = ANSWERS) -> str:
    path = log.parent / "llama-bench"
    path.write_text(FAKE.format(python=sys.executable, log=str(log), body=body))
    path.chmod(0o755)
    return str(path)


def test_llama_bench_takes_turns(
    capsys: pytest.CaptureFixture[str], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    ask = bench_model._ask

    async def ours(engine: Any, case: Any, seed: Any, on_token: Any) -> Any:
        order.append(f"mer {case.name}")
        return await run_case(engine, case, seed, on_token)

    async def theirs(command: list[str], case: Any) -> Any:
        order.append(f"llama {case.name}")
        return await ask(command, case)

    monkeypatch.setattr(bench_model, "run_case", ours)
    monkeypatch.setattr(bench_model, "_ask", theirs)
    binary = fake_llama_bench(log)
    rows = bench(capsys, "-d", "5", "--vs", binary)
    assert order == [f"{who} {name} @ d5" for name in ("pp8", "tg4") for _ in range(2) for who in ("mer", "llama")]
    common = {"-m": str(embedded_model_path()), "-d": "5", "-t": "1", "-r": "1", "-o": "json"}
    given = [json.loads(line) for line in log.read_text().splitlines()]
    assert given == [common | {"-p": p, "-n": n} for p, n in (("8", "0"), ("8", "0"), ("0", "4"), ("0", "4"))]
    assert [(row["program"], row["test"]) for row in rows] == [
        (who, f"{name} @ d5") for name in ("pp8", "tg4") for who in ("mer", "llama-bench")
    ]
    mer, llama = rows[2:]
    assert mer["vs_ratios"] == [one["tokens_per_s"] / 250 for one in mer["rounds"]]
    assert mer["vs_ratio"] == statistics.median(mer["vs_ratios"])
    assert (llama["tokens_per_s"], llama["tokens_per_s_sd"], llama["model"]) == (250, 0, "llama 12M Q8_0")
    assert run_app(["bench", *SMALL, "--vs", binary]) == 0
    out = capsys.readouterr().out
    assert "| llama-bench | llama 12M Q8_0 | 12.2 MiB | CPU | 1 | tg4 | 250.00 ± 0.00 | - |" in out
    assert "tg4: mer / llama-bench " in out
    assert run_app(["bench", *SMALL, "--vs", binary, "-o", "csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 4


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('no such model')", "failed with exit code 1"),
        ("print('| model |')", "did not print JSON"),
        ("print('[]')", "printed no avg_ts above 0 for pp8"),
    ],
)
def test_llama_bench_fails(capsys: pytest.CaptureFixture[str], log: Path, body: str, reason: str) -> None:
    assert run_app(["bench", *SMALL, "--vs", fake_llama_bench(log, body)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert reason in err
    assert "loading the model" in err
    assert "Traceback" not in err


def test_a_program_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "llama-bench"
    path.write_bytes(b"\x00\x01\x02")
    path.chmod(0o755)
    assert run_app(["bench", *SMALL, "--vs", str(path)]) == 1
    assert "cannot be run" in capsys.readouterr().err


def test_ctrl_c_ends_llama_bench_too(
    capsys: pytest.CaptureFixture[str], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    press = "import os, signal\nos.kill(os.getppid(), signal.SIGINT)\n"
    for dies in ("signal.pause()", "os.kill(os.getpid(), signal.SIGINT)"):
        assert run_app(["bench", *SMALL, "--vs", fake_llama_bench(log, press + dies)]) == 130
        out, err = capsys.readouterr()
        assert "| pp8 |" in out
        assert "| tg4 |" not in out
        assert "llama-bench" not in out
        assert "interrupted: these are the figures so far" in out
        assert "signal" not in err
    body = f"{ANSWERS} if test['n_prompt'] else exec({press + 'signal.pause()'!r})"
    assert run_app(["bench", *SMALL, "--vs", fake_llama_bench(log, body), "-o", "csv"]) == 130
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["program"], row["test"]) for row in rows] == [("mer", "pp8"), ("llama-bench", "pp8"), ("mer", "tg4")]
    assert rows[0]["vs_ratio"]
    assert rows[2]["vs_ratio"] == ""


def test_an_error_that_ctrl_c_has_made_is_none(
    capsys: pytest.CaptureFixture[str], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(command: list[str], case: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        raise LlamaBenchError("ended by signal 2")

    monkeypatch.setattr(bench_model, "_ask", die)
    [row] = bench(capsys, "--vs", fake_llama_bench(log), code=130)
    assert (row["test"], len(row["rounds"]), row["interrupted"]) == ("pp8", 1, True)
