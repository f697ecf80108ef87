"""Room in the address space (RLIMIT_AS, `ulimit -v`), asked for before libraries end the process for want of it."""

from __future__ import annotations

import resource
from typing import Final

from mer.errors import NotEnoughMemory
from mer.system import mapped_bytes
from mer.units import format_bytes

# What the interpreter, NumPy, numba and LLVM map before anything of a model is read: 400 MiB, and room to import them.
LIBRARY_BYTES: Final = 512 << 20
# The C library reserves 64 MiB for the heap of each thread, and does without where it cannot; LLVM and OpenBLAS, which
# do not, share what is left.
HEAP_BYTES: Final = 256 << 20


def address_space_limit() -> int | None:
    """Return the limit on this process's address space in bytes (RLIMIT_AS), or None if there is none."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def check_libraries_fit() -> None:
    """Refuse an address space in which the libraries could not even be loaded.

    Raises:
        NotEnoughMemory: the limit is too small.
    """
    _check(LIBRARY_BYTES, "to load its libraries")


def check_address_space(anonymous_bytes: int) -> None:
    """Refuse to allocate so many bytes more in an address space that may not have them.

    Raises:
        NotEnoughMemory: the limit is too small.
    """
    _check(mapped_bytes() + max(0, anonymous_bytes) + HEAP_BYTES, "for this budget and this model")


def _check(needed_bytes: int, what: str) -> None:
    limit = address_space_limit()
    if limit is not None and limit < needed_bytes:
        raise NotEnoughMemory(
            f"the address space is limited to {format_bytes(limit)} (RLIMIT_AS), and mer needs about "
            f"{format_bytes(needed_bytes)} {what}: raise the limit (ulimit -v), or give a smaller --memory",
            budget_bytes=limit,
            needed_bytes=needed_bytes,
        )
