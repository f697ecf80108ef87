"""How long `mer` takes to start: importing it, and from the command to the first token on the embedded model.

Usage: python benchmarks/start.py [ROUNDS]

The first token is timed with a cold kernel cache once (every kernel is compiled) and with a warm one ROUNDS times;
figures are seconds of wall time of whole processes, medians where there are several.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time


def seconds(command: list[str], cache: str) -> float:
    """Run a command to its end and return how long it took."""
    begun_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "XDG_CACHE_HOME": cache})
    return time.perf_counter() - begun_s


def main() -> None:
    """Print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    bare = [sys.executable, "-c", "pass"]
    imported = [sys.executable, "-c", "import mer"]
    first_token = [sys.executable, "-m", "mer", "run", "Once upon a time", "--max-tokens", "1"]
    with tempfile.TemporaryDirectory() as cache:
        seconds(imported, cache)
        pairs = [(seconds(bare, cache), seconds(imported, cache)) for _ in range(rounds)]
        print(f"import mer            {statistics.median(b - a for a, b in pairs):.3f} s beyond the bare interpreter")
        print(f"first token, cold     {seconds(first_token, cache):.2f} s (aim: under 60)")
        warm = statistics.median(seconds(first_token, cache) for _ in range(rounds))
        print(f"first token, warm     {warm:.2f} s (aim: under 5)")


if __name__ == "__main__":
    main()
