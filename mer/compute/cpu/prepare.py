"""Preparation of kernels: those that the cache holds are loaded, and the others compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio

from mer.compute.kernels import runtime
from mer.compute.kernels.step import CFunction, Compiled
from mer.config import Progress

RUNTIME: Final = tuple(one for one in vars(runtime).values() if isinstance(one, CFunction))


async def prepare_kernels(kernels: Sequence[Compiled], on_progress: Callable[[Progress], None]) -> None:
    """Load kernels and the functions that run them, and compile what the cache lacks, off the trio thread.

    `on_progress` is told of the stage "kernels", and then of "compiling kernels" if there are any to compile. If
    cancelled, a kernel that is being compiled is finished in its thread.
    """
    every = [*RUNTIME, *kernels]
    missing = []
    on_progress(Progress("kernels", 0, len(every), "kernels"))
    for number, kernel in enumerate(every, 1):
        if not await trio.to_thread.run_sync(kernel.find):
            missing.append(kernel)
        on_progress(Progress("kernels", number, len(every), "kernels"))
    if missing:
        on_progress(Progress("compiling kernels", 0, len(missing), "kernels"))
    for number, kernel in enumerate(missing, 1):
        await trio.to_thread.run_sync(kernel.compile)
        on_progress(Progress("compiling kernels", number, len(missing), "kernels"))
