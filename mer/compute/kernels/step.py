"""A step: one kernel compiled to a C function `void step(int64 *row, int64 thread, int64 n_threads)`.

A program is an int64 matrix with one row per step (see `runtime.py`). A step finds its arguments in its row, under the
names of its `Words`; addresses are integers and floats are passed by address. A step is compiled when its address is
first asked for. Those of this package are kept in mer's kernel cache.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, TypeAlias, cast

from numba import types

from mer.compute.kernels import back_end
from mer.compute.kernels.front_end import modules_of
from mer.compute.kernels.object_store import ObjectStore
from mer.compute.kernels.target import KERNEL_FOLDER
from mer.compute.kernels.words import Words, names_of
from mer.paths import cache_folder

STEP_SIGNATURE: Final = types.void(types.int64, types.int64, types.int64)
_Parameters = ParamSpec("_Parameters")
_Kernel: TypeAlias = Callable[[int, int, int], None]
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

    @functools.cached_property  # looked up for every row that is added
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
    """One kernel step; its docstring is the kernel's, and that of its words.

    Args:
        function: the kernel.
        words: declares what it reads in its row.
    """

    def __init__(self, function: _Kernel, words: type[Words]) -> None:
        super().__init__(function, STEP_SIGNATURE)
        self.words = names_of(words)
        self.row: Callable[..., Row] = _row_maker(self, words)
        self.__doc__ = f"{function.__doc__}\n\n{words.__doc__}"


class TypedStep(Step, Generic[_Parameters]):
    """A step whose words type checkers know; `row` takes each by name, and returns what `Program.add` takes."""

    row: Callable[_Parameters, Row]


Row: TypeAlias = tuple[Step, *tuple[int, ...]]  # a step, and its words in the order of their declaration


def _row_maker(step: Step, words: type[Words]) -> Callable[..., Row]:
    """Return a function of the words, by name; a call that leaves out one or gives another is a TypeError.

    It is compiled from text, as named tuples are, because Python passes arguments to a function with such parameters
    within 0.3 us, and takes a microsecond more to sort out a dictionary of them.
    """
    defaults = {name: vars(base)[name] for base in words.__mro__ for name in step.words if name in vars(base)}
    parameters = [f"{name}={defaults[name]}" if name in defaults else name for name in step.words]
    star = "*, " if parameters else ""
    made: Callable[..., Row] = eval(
        f"lambda {star}{', '.join(parameters)}: (step, {', '.join(step.words)})", {"step": step}
    )
    made.__qualname__ = f"{step.name}.row"
    return made


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


def step(words: Callable[_Parameters, Words]) -> Callable[[_Kernel], TypedStep[_Parameters]]:
    """Declare a kernel step, which reads these words (a subclass of `Words`)."""
    return lambda function: TypedStep(function, cast(type[Words], words))


def nogil_function(signature: Any) -> Callable[[Callable[..., Any]], CFunction]:
    """Declare a function that Python calls without holding the GIL, compiled for one signature."""
    return lambda function: CFunction(function, signature)
