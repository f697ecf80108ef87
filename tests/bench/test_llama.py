"""What llama-bench is asked and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mer.bench.cases import Case
from mer.bench.llama import Answer, LlamaBenchError, command, describe, parse

PP, TG = Case(n_prompt=512), Case(n_gen=128)
TEST = {"model_type": "llama 7B Q4_0", "model_size": 7, "backends": "CPU,BLAS", "n_threads": 2}


def printed(*tests: dict[str, Any]) -> str:
    return json.dumps([TEST | test for test in tests])


def test_the_command_line() -> None:
    start = ["/b", "-m", "/m.gguf"]
    end = ["-t", "3", "-r", "1", "-o", "json"]
    assert command(Path("/b"), Path("/m.gguf"), PP, 3, "f16") == [*start, "-p", "512", "-n", "0", *end]
    assert command(Path("/b"), Path("/m.gguf"), Case(n_gen=8, depth=5), 3, "f16") == [
        *start, "-p", "0", "-n", "8", "-d", "5", *end
    ]  # fmt: skip
    assert command(Path("/b"), Path("/m.gguf"), PP, 3, "q8_0") == [
        *start, "-p", "512", "-n", "0", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "1", *end
    ]  # fmt: skip


def test_the_test_that_was_asked_for_is_taken() -> None:
    out = printed({"n_prompt": 512, "n_gen": 0, "avg_ts": 40.5}, {"n_prompt": 0, "n_gen": 128, "avg_ts": 7})
    assert parse(PP, [], 0, out, "").tokens_per_s == 40.5
    assert parse(TG, [], 0, out, "noise") == Answer(
        tokens_per_s=7, model="llama 7B Q4_0", size_bytes=7, backend="CPU,BLAS", threads=2
    )
    bare = json.dumps([{"n_prompt": 512, "n_gen": 0, "avg_ts": 1, "n_threads": "2", "model_type": None}])
    assert parse(PP, [], 0, bare, "") == Answer(tokens_per_s=1, model="", size_bytes=0, backend="", threads=0)


@pytest.mark.parametrize(
    ("returncode", "out", "reason"),
    [
        (1, "", "failed with exit code 1"),
        (-9, printed({"n_prompt": 512, "n_gen": 0, "avg_ts": 1}), "ended by signal 9"),
        (0, "", "did not print JSON"),
        (0, "| model | t/s |", "did not print JSON"),
        (0, "[" * 100_000, "did not print JSON"),
        (0, "[]", "no avg_ts"),
        (0, "{}", "no avg_ts"),
        (0, "[1, null]", "no avg_ts"),
        (0, printed({"n_prompt": 0, "n_gen": 128, "avg_ts": 1}), "no avg_ts above 0 for pp512"),
        *((0, printed({"n_prompt": 512, "n_gen": 0, "avg_ts": bad}), "no avg_ts") for bad in (0, -1, True, None, "1")),
        (0, '[{"n_prompt": 512, "n_gen": 0, "avg_ts": NaN}]', "no avg_ts"),
        (0, '[{"n_prompt": 512, "n_gen": 0, "avg_ts": 1e999}]', "no avg_ts"),
    ],
)
def test_anything_else_is_an_error_that_shows_it(returncode: int, out: str, reason: str) -> None:
    with pytest.raises(LlamaBenchError, match=reason) as caught:
        parse(PP, ["/b", "-p"], returncode, out, "said on stderr")
    text = str(caught.value)
    assert "it was run as: /b -p" in text
    assert text.endswith("said on stderr")
    assert out[-100:] in text
    assert len(text) < 6000


def test_the_ratio_is_the_median_of_those_of_the_rounds() -> None:
    ours = {
        "test": "pp512", "depth": 0, "n_tokens": 512, "model": "m", "path": "/m", "size_bytes": 3, "threads": 2,
        "interrupted": False, "hit_rate": 0.5, "rounds": [{"tokens_per_s": speed} for speed in (10.0, 30.0, 8.0, 99.0)],
    }  # fmt: skip
    answers = [parse(PP, [], 0, printed({"n_prompt": 512, "n_gen": 0, "avg_ts": speed}), "") for speed in (5, 4, 8)]
    mer, llama = describe(ours, answers, ["/b"])
    assert mer["vs_ratios"] == [2.0, 7.5, 1.0]
    assert mer["vs_ratio"] == 2.0
    assert llama["tokens_per_s"] == pytest.approx(17 / 3)
    assert llama["hit_rate"] is None
    assert (llama["program"], llama["model"], llama["backend"]) == ("llama-bench", "llama 7B Q4_0", "CPU,BLAS")
    assert mer.keys() | {"program", "backend", "tokens_per_s", "tokens_per_s_sd", "settings"} == llama.keys()
