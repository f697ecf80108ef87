"""Swarm tests by command: many seeds, each a different world.

    python -m mer.testing.swarm --seeds 0:500 --seconds 60
    python -m mer.testing.swarm --seed 1234

Exit status: 0 if all passed, 1 if a seed failed; the last line is then the command that replays it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from itertools import count

from mer.testing.seeds import make_world, run_seed


def run_seeds(seeds: Iterator[int] | Sequence[int], seconds: float = float("inf")) -> tuple[int, int | None]:
    """Run seeds until one fails, time is up or there are no more.

    The traceback of a failure goes to stderr, with the command that replays it as its last line.

    Returns:
        How many have passed, and the one that failed, or None.
    """
    until_s = time.monotonic() + seconds
    passed = 0
    for seed in seeds:
        if time.monotonic() >= until_s:
            break
        try:
            run_seed(seed)
        except Exception:
            traceback.print_exc()
            print(f"seed {seed}: {make_world(seed)}", file=sys.stderr)
            print(f"python -m mer.testing.swarm --seed {seed}", file=sys.stderr)
            return passed, seed
        passed += 1
    return passed, None


def _range(text: str) -> Iterator[int] | range:
    first, separator, last = text.partition(":")
    if not separator:
        raise ValueError(text)
    return range(int(first or 0), int(last)) if last else count(int(first or 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mer.testing.swarm", description="Run simulated engines by seed.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, help="run this one and print the digest of its trace")
    which.add_argument("--seeds", type=_range, default="0:500", metavar="FIRST:END", help="run these (default 0:500)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further seed after this time")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        passed, failed = run_seeds([options.seed])
        if failed is None:
            print(f"seed {options.seed}: {run_seed(options.seed)}")
    else:
        passed, failed = run_seeds(options.seeds, options.seconds)
        print(f"{passed} seeds passed" + ("" if failed is None else f", seed {failed} failed"))
    return 0 if failed is None else 1


if __name__ == "__main__":
    sys.exit(main())
