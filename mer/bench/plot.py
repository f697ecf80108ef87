"""tokens/s against the memory budget, as a picture; matplotlib draws it where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mer.errors import ConfigError

GiB = 1 << 30


def load_figure() -> Any:
    """Return matplotlib's class of figures.

    Raises:
        ConfigError: matplotlib is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib ({error}); install it with: pip install matplotlib") from error


def check_path(path: Path) -> None:
    """Check, before anything is measured, that a picture can be written.

    Raises:
        ConfigError: the name does not end in .png, or there can be no file of that name.
    """
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: the name of the picture must end in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there can be no file of that name")


def first_generation(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of the first test that generates, one for each memory budget, by budget."""
    name = next((row["test"] for row in rows if row["test"].startswith("tg")), None)
    return sorted((row for row in rows if row["test"] == name), key=lambda row: row["memory_bytes"])


def draw(figure_class: Any, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture of the first test that generates; its rows are at least one."""
    points = first_generation(rows)
    figure = figure_class(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.errorbar(
        [row["memory_bytes"] / GiB for row in points],
        [row["tokens_per_s"] for row in points],
        yerr=[row["tokens_per_s_sd"] or 0.0 for row in points],
        marker="o",
        capsize=3,
    )
    axes.set_xlabel("memory budget, GiB")
    axes.set_ylabel(f"tokens/s, {points[0]['test']}")
    axes.set_title(f"{points[0]['model']}, {points[0]['threads']} threads, {points[0]['kernels']}")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
