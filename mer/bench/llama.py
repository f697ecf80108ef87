"""llama-bench on the same file: its command line, and what it prints."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from mer.bench.cases import Case
from mer.bench.model_results import mean_sd
from mer.errors import MerError

PROGRAM: Final = "llama-bench"
_SHOWN_CHARS: Final = 2000  # of what it printed


class LlamaBenchError(MerError):
    """llama-bench cannot be run, failed, or printed something else than its figures."""


@attrs.frozen(kw_only=True)
class Answer:
    """Answer of llama-bench for one case."""

    tokens_per_s: float
    model: str
    size_bytes: int
    backend: str
    threads: int


def command(binary: Path, model: Path, case: Case, threads: int, kv_type: str) -> list[str]:
    """Return the command line that runs one case once, with keys and values of this type."""
    counts = ["-p", str(case.n_prompt), "-n", str(case.n_gen)]
    if case.depth:  # an option that older versions do not have
        counts += ["-d", str(case.depth)]
    if kv_type != "f16":  # its default
        counts += ["-ctk", kv_type, "-ctv", kv_type]
    if kv_type == "q8_0":  # quantized values need it
        counts += ["-fa", "1"]
    return [str(binary), "-m", str(model), *counts, "-t", str(threads), "-r", "1", "-o", "json"]


def parse(case: Case, arguments: Sequence[str], returncode: int, out: str, err: str) -> Answer:
    """Return what one run of llama-bench has measured.

    Raises:
        LlamaBenchError: it failed, or its output holds no figure of this case; the text carries what it printed.
    """
    printed = f"it was run as: {' '.join(arguments)}\n{_tail(out)}{_tail(err)}".rstrip()
    if returncode < 0:
        raise LlamaBenchError(f"{PROGRAM} was ended by signal {-returncode}; {printed}")
    if returncode:
        raise LlamaBenchError(f"{PROGRAM} failed with exit code {returncode}; {printed}")
    try:
        found = json.loads(out)
    except (ValueError, RecursionError):
        raise LlamaBenchError(f"{PROGRAM} did not print JSON; {printed}") from None
    for one in found if isinstance(found, list) else []:
        if isinstance(one, dict) and (one.get("n_prompt"), one.get("n_gen")) == (case.n_prompt, case.n_gen):
            speed = one.get("avg_ts")
            if isinstance(speed, int | float) and not isinstance(speed, bool) and math.isfinite(speed) and speed > 0:
                return Answer(
                    tokens_per_s=float(speed),
                    model=_text(one, "model_type"),
                    size_bytes=_whole(one, "model_size"),
                    backend=_text(one, "backends"),
                    threads=_whole(one, "n_threads"),
                )
    raise LlamaBenchError(f"{PROGRAM} printed no avg_ts above 0 for {case.name}; {printed}")


def describe(ours: dict[str, Any], answers: Sequence[Answer], arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Return our row with the ratios of the rounds, and llama-bench's row with the same fields, those it lacks None.

    Args:
        ours: what `model_results.describe` says of the same case.
        answers: one per round, at least one.
        arguments: the command line that gave them.
    """
    ratios = [one["tokens_per_s"] / answer.tokens_per_s for one, answer in zip(ours["rounds"], answers, strict=False)]
    mean, sd = mean_sd([answer.tokens_per_s for answer in answers])
    compared = {"vs_ratio": statistics.median(ratios), "vs_ratios": ratios}
    theirs = {
        "program": PROGRAM,
        "model": answers[0].model or ours["model"],
        "path": ours["path"],
        "size_bytes": answers[0].size_bytes or ours["size_bytes"],
        "backend": answers[0].backend,
        "threads": answers[0].threads or ours["threads"],
        "test": ours["test"],
        "depth": ours["depth"],
        "n_tokens": ours["n_tokens"],
        "tokens_per_s": mean,
        "tokens_per_s_sd": sd,
        "interrupted": ours["interrupted"],
        "rounds": [{"tokens_per_s": answer.tokens_per_s} for answer in answers],
        "settings": {"command": list(arguments)},
    }
    return [ours | compared, dict.fromkeys(ours | compared) | theirs]


def _text(one: dict[str, Any], key: str) -> str:
    value = one.get(key)
    return value if isinstance(value, str) else ""


def _whole(one: dict[str, Any], key: str) -> int:
    value = one.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _tail(text: str) -> str:
    text = text.strip()
    return f"{text[-_SHOWN_CHARS:]}\n" if text else ""
