"""Claiming the units of a step's work, so that a thread that is held up holds up nobody.

A row's work counter is zero when the threads come to it. Whoever takes a unit finishes it; a thread that finds none
left goes on. So how many threads share a step, and whether one of them is on a processor, decides nothing but time.
"""

from __future__ import annotations

from mer.compute.kernels.ir import atomic_add
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.words import COUNTER

_UNITS_PER_THREAD = 4


@njit
def claim_unit(row):  # type: ignore[no-untyped-def]
    """Return the number of the next unit of a row's work, from 0; the caller knows how many there are."""
    return atomic_add(row + 8 * COUNTER, 1)


@njit
def chunk_of(n_items, n_threads, least):  # type: ignore[no-untyped-def]
    """Return how many of n items make a unit: about 4 units for each thread, and no smaller ones than `least`."""
    return max(least, (n_items + _UNITS_PER_THREAD * n_threads - 1) // (_UNITS_PER_THREAD * n_threads))
