"""Room in the address space (RLIMIT_AS, RLIMIT_DATA), asked for before libraries end the process for want of it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from mer.errors import ConfigError, NotEnoughMemory
from mer.system import mapped_bytes
from mer.units import format_bytes

# What the interpreter, NumPy, numba and LLVM map before anything of a model is read: 400 MiB, and room to import them.
LIBRARY_BYTES: Final = 512 << 20
# The C library reserves 64 MiB for the heap of each thread, and does without where it cannot; LLVM and OpenBLAS, which
# do not, share what is left.
HEAP_BYTES: Final = 256 << 20
# Of what they map, 128 MiB are private and writable, before LLVM compiles anything.
LIBRARY_DATA_BYTES: Final = 160 << 20


def address_space_limit() -> int | None:
    """Return the limit on this process's address space in bytes (RLIMIT_AS), or None if there is none."""
    return _limit(resource.RLIMIT_AS)


def data_limit() -> int | None:
    """Return the limit on what of it is private and writable in bytes (RLIMIT_DATA), or None if there is none."""
    return _limit(resource.RLIMIT_DATA)


def _limit(number: int) -> int | None:
    limit, _ = resource.getrlimit(number)
    return None if limit == resource.RLIM_INFINITY else limit


def check_libraries_fit() -> None:
    """Refuse an address space in which the libraries could not even be loaded.

    Raises:
        NotEnoughMemory: a limit is too small.
    """
    _check_address_space(LIBRARY_BYTES, "to load its libraries")
    what, cure = "the data of a process is limited to {} (RLIMIT_DATA)", "raise the limit (ulimit -d)"
    _check(data_limit(), LIBRARY_DATA_BYTES, what, "to load its libraries", cure)


def check_address_space(anonymous_bytes: int) -> None:
    """Refuse to allocate so many bytes more in an address space that may not have them.

    Raises:
        NotEnoughMemory: the limit is too small.
    """
    _check_address_space(mapped_bytes() + max(0, anonymous_bytes) + HEAP_BYTES, "for this budget and this model")


@contextmanager
def naming_refusals() -> Iterator[None]:
    """Turn the system's refusal of memory or of a thread, which Python's own errors tell of, into one of mer's.

    How much a library allocates in between cannot be foretold; what is large is asked for by `check_address_space`.

    Raises:
        NotEnoughMemory: in place of MemoryError.
        ConfigError: in place of RuntimeError for a thread that could not be started.
    """
    try:
        yield
    except MemoryError as error:
        limits = [limit for limit in (address_space_limit(), data_limit()) if limit is not None]
        raise NotEnoughMemory(
            "the system refuses more memory: give a smaller --memory, or raise the limits on this process "
            "(ulimit -v, ulimit -d)",
            budget_bytes=min(limits, default=0),
            needed_bytes=mapped_bytes(),
        ) from error
    except RuntimeError as error:
        if str(error) != "can't start new thread":
            raise
        raise ConfigError(
            "the system refuses a thread; raise the limit on processes (ulimit -u), or that of the control group"
        ) from error


def _check_address_space(needed_bytes: int, purpose: str) -> None:
    what = "the address space is limited to {} (RLIMIT_AS)"
    cure = "raise the limit (ulimit -v), or give a smaller --memory"
    _check(address_space_limit(), needed_bytes, what, purpose, cure)


def _check(limit: int | None, needed_bytes: int, what: str, purpose: str, cure: str) -> None:
    if limit is not None and limit < needed_bytes:
        raise NotEnoughMemory(
            f"{what.format(format_bytes(limit))}, and mer needs about {format_bytes(needed_bytes)} {purpose}: {cure}",
            budget_bytes=limit,
            needed_bytes=needed_bytes,
        )
