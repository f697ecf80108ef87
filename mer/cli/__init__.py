"""The command `mer`: standard output carries the answer and nothing else, standard error everything else."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line of this process and exit with its code."""
    listens = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in the background of a shell
    if listens:
        signal.signal(signal.SIGINT, _leave)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open as long as the process

    # NumPy's OpenBLAS, which mer has no use for, would reserve tens of MiB of the data limit for each of its threads.
    if not os.environ.get("OPENBLAS_NUM_THREADS"):
        os.environ["OPENBLAS_NUM_THREADS"] = "1"

    from mer.address_space import check_libraries_fit
    from mer.errors import NotEnoughMemory

    try:
        check_libraries_fit()  # what does not fit ends in the middle of an import
    except NotEnoughMemory as error:
        print(f"mer: {error}", file=sys.stderr)
        sys.exit(4)

    from mer.cli.app import run_app

    try:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = run_app(sys.argv[1:])
        if listens:
            signal.signal(signal.SIGINT, _leave)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _leave(_number: int, _frame: object) -> None:
    """Leave on ctrl-C while modules are imported and while the interpreter ends: nothing is there to clean up."""
    os._exit(130)
