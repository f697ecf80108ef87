"""Words: the arguments in a step's row, each named once for the kernel that reads it and the builder that writes it."""

from __future__ import annotations

import inspect
from collections import namedtuple
from typing import Any, TypeVar, cast, dataclass_transform

ROW_WORDS = 32  # int64 per program row: function, barrier flag, work counter, arguments, an entry (see `entry.py`)
FUNCTION, BARRIER, COUNTER, ARG0 = range(4)
ENTRY = 24


@dataclass_transform(kw_only_default=True)
class Words:
    """Declares the words of a step's row: a subclass annotates each with int, and its docstring says what each is.

    They lie from column `ARG0` on, a base class's first. One with a default need not be given: steps before set it
    while the program runs, or it says what most rows do. Subclasses are declarations, which nobody makes instances of:
    attrs classes or named tuples would do as well, but making one takes longer than all else that adding a row does.
    """


_Declared = TypeVar("_Declared", bound=Words)


def names_of(words: type[Words]) -> tuple[str, ...]:
    """Return the names of the declared words, in their order.

    Raises:
        TypeError: they do not fit the row, or one is declared twice.
    """
    names = [name for base in reversed(words.__mro__) for name in inspect.get_annotations(base)]
    if len(set(names)) < len(names) or len(names) > ENTRY - ARG0:
        raise TypeError(f"{words.__name__} declares {names}; a row has room for {ENTRY - ARG0} words, each named once")
    return tuple(names)


def columns(words: type[_Declared]) -> _Declared:
    """Return the column of each word, as attributes: a named tuple of integers, which kernels read as constants."""
    names = names_of(words)
    make: Any = namedtuple  # of a name and fields that are known at run time only
    return cast(_Declared, make(words.__name__, names)(*range(ARG0, ARG0 + len(names))))
