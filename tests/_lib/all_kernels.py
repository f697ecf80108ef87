"""Compiling every kernel of this form, as a program: `python -m tests._lib.all_kernels [then-products-of FORM]`.

Another form's products are compiled by the same program, started anew with the form in its environment.
"""

from __future__ import annotations

import os
import sys

from mer.compute.cpu.blocks.attention import KV_KINDS
from mer.compute.cpu.forward import steps_for
from mer.compute.kernels.matmul import FINE_STEPS, INTERLEAVE_STEPS, STEPS
from mer.compute.kernels.step import Step
from mer.io.ggml import GGMLType


def all_steps() -> dict[str, Step]:
    """Return every kernel step by name."""
    kinds = [GGMLType(kind) for kind in STEPS]
    return {step.name: step for planes in (1, 2) for kv in KV_KINDS for step in steps_for(kinds, planes, kv)}


def products() -> list[Step]:
    """Return the steps of products and of what brings matrices into their layout."""
    return [*STEPS.values(), *FINE_STEPS.values(), *INTERLEAVE_STEPS.values()]


def main(arguments: list[str]) -> None:
    """Compile, and print each step's name and whether the cache had it."""
    steps = {step.name: step for step in products()} if arguments == ["products"] else all_steps()
    for name, step in steps.items():
        print(name, step.compile())
    match arguments:
        case ["then-products-of", form]:
            command = [sys.executable, "-m", "tests._lib.all_kernels", "products"]
            sys.stdout.flush()
            os.execve(sys.executable, command, os.environ | {"MER_KERNELS": form})


if __name__ == "__main__":
    main(sys.argv[1:])
