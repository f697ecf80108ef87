"""The rows of a whole-model benchmark as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from mer.json_text import json_text
from mer.units import format_bytes, format_duration

Row: TypeAlias = Mapping[str, Any]
_LEFT: Final = ("program", "model", "backend", "test")


def to_json(rows: Sequence[Row]) -> str:
    """Return the rows as a list of objects."""
    return json_text(rows)


def to_csv(rows: Sequence[Row]) -> str:
    """Return the rows with a header; what is a list or an object stands as JSON in its cell, and None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(name for row in rows for name in row))  # an interrupted comparison lacks some
    writer.writerow(names)
    for row in rows:
        values = [row.get(name) for name in names]
        writer.writerow(json_text(value) if isinstance(value, list | dict | bool) else value for value in values)
    return text.getvalue().rstrip("\n")


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table for people; programs and budgets have a column where there are several."""
    columns: dict[str, Callable[[Row], str]] = {}
    if len({row["program"] for row in rows}) > 1:
        columns["program"] = lambda row: row["program"]
    columns |= {
        "model": lambda row: row["model"],
        "size": lambda row: format_bytes(row["size_bytes"]),
        "backend": lambda row: row["backend"],
        "threads": lambda row: str(row["threads"]),
    }
    if len({row["memory_bytes"] for row in rows if row["memory_bytes"] is not None}) > 1:
        columns["memory"] = lambda row: format_bytes(row["memory_bytes"])
    columns |= {
        "test": lambda row: row["test"],
        "t/s": _speed,
        "weights GB/s": lambda row: _or_dash(row["weights_bytes_per_s"], lambda rate: f"{rate / 1e9:.2f}"),
        "of memory rate": lambda row: _or_dash(row["memory_rate_share"], "{:.0%}".format),
        "hits": lambda row: _or_dash(row["hit_rate"], "{:.1%}".format),
        "read per token": lambda row: _or_dash(row["read_bytes_per_token"], format_bytes),
        "of disk rate": lambda row: _or_dash(row["disk_rate_share"], "{:.0%}".format),
        "first token": lambda row: _or_dash(row["first_token_s"], format_duration),
    }
    lines = [list(columns), ["---" if name in _LEFT else "---:" for name in columns]]
    lines += [[_cell(show(row)) for show in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _speed(row: Row) -> str:
    mean, sd = row["tokens_per_s"], row["tokens_per_s_sd"]
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def _or_dash(value: float | None, show: Callable[[float], str]) -> str:
    return "-" if value is None else show(value)


def _cell(text: str) -> str:
    """Return a text that neither ends its cell nor its line."""
    return " ".join(text.replace("|", "\\|").split())
