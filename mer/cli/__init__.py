"""The command `mer`: standard output carries the answer and nothing else, standard error everything else."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process and exit with its code."""
    from mer.cli.app import run_app

    sys.exit(run_app(sys.argv[1:]))
