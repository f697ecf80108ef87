"""Which model on which machine: what each shape needs, and the speed that the disk and the memory allow.

Usage: python benchmarks/machines.py [--type q4_k_m] [--disk BYTES_PER_S] [--memory-rate BYTES_PER_S]

Plans are made of files that have a header of real sizes and no data. Rates are assumed, not measured: the forecast is
that of `mer plan`, which takes every expert to be as likely as any other; real routing has favourites, and is kinder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import make_model
from shapes import SHAPES

from mer.cli.plan import forecast
from mer.config import EngineConfig
from mer.errors import NotEnoughMemory
from mer.plan.plan import load_and_plan

BUDGETS = ("8GiB", "16GiB", "32GiB", "64GiB")
GB, GIB = 1e9, 1 << 30


def row(path: Path, disk: float, memory: float) -> list[str]:
    """Return a model's cells: file, smallest budget, bytes of a token, and tokens/s at each budget."""
    cells = []
    floor = per_token = 0
    for budget in ("1MiB", *BUDGETS):
        config = EngineConfig(path=path, memory=budget, context=4096, max_sequences=1, device="cpu")
        try:
            _, plan = load_and_plan(config)
        except NotEnoughMemory as error:
            if floor:
                cells.append("-")
            floor = error.needed_bytes
            continue
        per_token = plan.expert_bytes_per_token + plan.dense_bytes_per_token
        cells.append(f"{forecast(plan, disk, memory)['limit_tokens_per_s']:.3g}")
    sizes = path.stat().st_size / GIB, floor / GIB, per_token / GIB
    return [*(f"{size:.3g}" for size in sizes), *cells]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--type", choices=make_model.MIXES, default="q4_k_m")
    parser.add_argument("--disk", type=float, default=3 * GB)
    parser.add_argument("--memory-rate", type=float, default=40 * GB)
    arguments = parser.parse_args()
    print("| model | file, GiB | smallest budget, GiB | GiB of a token |", " | ".join(BUDGETS), "|")
    print("| --- " * (4 + len(BUDGETS)), "|", sep="")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            path = Path(folder) / "model.gguf"
            mix = "mxfp4" if shape.arch == "gpt-oss" else arguments.type  # as they are published
            make_model.write(path, shape, mix, empty=True)
            print(f"| {name} |", " | ".join(row(path, arguments.disk, arguments.memory_rate)), "|", flush=True)


if __name__ == "__main__":
    main()
