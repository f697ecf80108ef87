"""A step: one kernel compiled to a C function `void step(int64 *row, int64 thread, int64 n_threads)`.

A program is an int64 matrix with one row per step (see `runtime.py`). A step finds its arguments in its row, from
column `ARG0` on; addresses are integers and floats are passed by address. A step is compiled when its address is first
asked for. Those of this package are kept in mer's kernel cache.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any, Final

from numba import types

from mer.compute.kernels import back_end
from mer.compute.kernels.front_end import modules_of
from mer.compute.kernels.object_store import ObjectStore
from mer.compute.kernels.target import KERNEL_FOLDER
from mer.paths import cache_folder

ROW_WORDS = 32  # int64 per program row: function, barrier flag, work counter, arguments, an entry (see `entry.py`)
FUNCTION, BARRIER, COUNTER, ARG0 = range(4)
ENTRY = 24
STEP_SIGNATURE: Final = types.void(types.int64, types.int64, types.int64)
_lock = threading.Lock()
_serials = itertools.count()
_store = ObjectStore(lambda: cache_folder() / "kernels" / KERNEL_FOLDER, back_end.facts())


def cache_failure() -> str | None:
    """Return why compiled kernels are not kept on disk, or None if they are."""
    return _store.failure


def kernel_cache() -> str:
    """Return the folder of the compiled kernels, or why none are kept."""
    folder = _store.folder
    return _store.failure or str(folder)


class Compiled:
    """A C function made from a Python function, compiled on first use, or found in the cache; `address` is its address.

    Args:
        function: what numba can compile.
        signature: numba's; int64 throughout, and void or int64 for the result.
    """

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self.name: str = function.__name__
        self.py_func = function
        self._signature = signature
        self._is_kept = function.__module__.startswith(f"{__package__}.")
        place = f"{function.__module__}.{self.name}".rpartition(f"{__package__}.")[2]
        self._key = place if self._is_kept else f"{place}.{next(_serials)}"  # unique in this process
        self._address = 0
        self._was_kept = False

    def find(self) -> bool:
        """Load the function if it is in the cache, and return whether it is loaded or compiled now; may block."""
        with _lock:
            return self._find()

    def compile(self) -> bool:
        """Compile the function, or load it from the cache, and return whether the cache had it; blocks."""
        with _lock:  # one thread at a time
            if not self._find():
                code = back_end.compile_object(self._modules(), self._symbol)
                self._address = back_end.load_object(code, self._symbol)
                if self._is_kept:
                    _store.save(self._key, code)
            return self._was_kept

    @property
    def address(self) -> int:
        """The C function's address, compiled now if it was not."""
        if not self._address:
            self.compile()
        return self._address

    @property
    def assembly(self) -> str:
        """The machine code as assembly text."""
        return back_end.assembly(self._modules(), self._symbol)

    @property
    def _symbol(self) -> str:
        return f"mer.{self._key}"

    def _modules(self) -> list[str | bytes]:
        return modules_of(self.py_func, self._signature, self._symbol)

    def _find(self) -> bool:
        if not self._address and self._is_kept:
            code = _store.load(self._key)
            if code is not None:
                self._address, self._was_kept = back_end.load_object(code, self._symbol), True
        return self._address != 0


class Step(Compiled):
    """One kernel step."""

    def __init__(self, function: Callable[[int, int, int], None]) -> None:
        super().__init__(function, STEP_SIGNATURE)


class CFunction(Compiled):
    """A C function that Python calls, without holding the GIL meanwhile."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        super().__init__(function, signature)
        result = None if signature.return_type is types.void else ctypes.c_int64
        self._prototype = ctypes.CFUNCTYPE(result, *(ctypes.c_int64 for _ in signature.args))
        self._call: Callable[..., Any] | None = None

    def __call__(self, *arguments: int) -> Any:
        """Call the function with integers; blocks until it returns."""
        if self._call is None:
            self._call = self._prototype(self.address)
        return self._call(*arguments)


def step(function: Callable[[int, int, int], None]) -> Step:
    """Declare a kernel step."""
    return Step(function)


def nogil_function(signature: Any) -> Callable[[Callable[..., Any]], CFunction]:
    """Declare a function that Python calls without holding the GIL, compiled for one signature."""
    return lambda function: CFunction(function, signature)
