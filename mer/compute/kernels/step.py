"""A step: one kernel compiled to a C function `void step(int64 *row, int64 thread, int64 n_threads)`.

A program is an int64 matrix with one row per step (see `runtime.py`). A step finds its arguments in its row, from
column `ARG0` on; addresses are integers and floats are passed by address. A step is compiled when its address is first
asked for, and kept in mer's kernel cache.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba import types

from mer.compute.kernels.numba_api import njit, numba_config
from mer.compute.kernels.target import KERNEL_CACHE

ROW_WORDS = 32  # int64 per program row: function, barrier flag, work counter, arguments, an entry (see `entry.py`)
FUNCTION, BARRIER, COUNTER, ARG0 = range(4)
ENTRY = 24
_SIGNATURE = types.void(types.int64, types.int64, types.int64)
_lock = threading.Lock()
_log = logging.getLogger(__name__)
_cache_failure: list[str] = []  # why compiled kernels cannot be kept, once known


@contextmanager
def _kernel_cache() -> Iterator[bool]:
    """Point numba's on-disk cache to mer's folder while one function is declared; yield whether it can be used."""
    with _lock:
        if not _cache_failure:
            try:
                KERNEL_CACHE.mkdir(parents=True, exist_ok=True)
                (KERNEL_CACHE / ".writable").touch()
            except OSError as error:
                _cache_failure.append(f"{KERNEL_CACHE}: {error.strerror}")
                _log.warning("compiled kernels cannot be kept in %s: %s", KERNEL_CACHE, error.strerror)
        before = numba_config.CACHE_DIR
        numba_config.CACHE_DIR = str(KERNEL_CACHE)
        try:
            yield not _cache_failure
        finally:
            numba_config.CACHE_DIR = before


def cache_failure() -> str | None:
    """Return why compiled kernels are not kept on disk, or None if they are."""
    return _cache_failure[0] if _cache_failure else None


class Step:
    """One kernel step, compiled on first use; `address` is its C function's address."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        self.name = function.__name__
        self._function = function
        self._compiled: Any = None
        self._address = 0

    def compile(self) -> bool:
        """Compile the step, or load it from the cache, and return whether the cache had it."""
        with _kernel_cache() as keep:  # one thread at a time
            if self._compiled is None:
                self._compiled = numba.cfunc(_SIGNATURE, cache=keep, error_model="numpy")(self._function)
        return bool(self._compiled.cache_hits)

    @property
    def address(self) -> int:
        """The C function's address, compiled now if it was not."""
        if not self._address:
            self.compile()
            self._address = int(self._compiled.address)
        return self._address

    @property
    def assembly(self) -> str:
        """The machine code as assembly text."""
        self.compile()
        return str(self._compiled._library.get_asm_str())


def step(function: Callable[[int, int, int], None]) -> Step:
    """Declare a kernel step."""
    return Step(function)


def nogil_function(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Declare a function that Python calls without holding the GIL, compiled for one signature."""

    def declare(function: Callable[..., Any]) -> Any:
        with _kernel_cache() as keep:
            return njit(signature, nogil=True, cache=keep)(function)

    return declare
