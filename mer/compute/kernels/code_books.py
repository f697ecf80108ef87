"""Code books: the weights of the IQ1, IQ2 and IQ3 types come four or eight at a time from a list of such tuples.

The lists are the `gguf` package's. A kernel has them in its own constants, an entry being a word of 32 or 64 bits, the
first weight in its lowest byte.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gguf.quants
import numpy as np
from llvmlite import ir

from mer.compute.kernels.ir import I32, I64, i64, load
from mer.compute.kernels.numba_api import cgutils

V32I8 = ir.VectorType(ir.IntType(8), 32)


@functools.cache
def entries(name: str, factor: int = 1, lift: int = 0) -> tuple[int, ...]:
    """Return the entries of a type's list, each weight as an unsigned byte: factor * weight + lift."""
    quant: Any = getattr(gguf.quants, name)
    quant.init_grid()
    numbers = factor * quant.grid.reshape(quant.grid_shape).astype(np.int64) + lift
    if numbers.min() < 0 or numbers.max() > 255:
        raise ValueError(f"the code book of {name} times {factor} plus {lift} does not fit unsigned bytes")
    words = numbers.astype(np.uint8).view(np.uint32 if numbers.shape[1] == 4 else np.uint64)
    return tuple(words[:, 0].tolist())


class CodeBook:
    """The list of one type, in the constants of each kernel that looks something up.

    Args:
        name: the type's.
        per_entry: weights to an entry: 4 or 8.
        factor, lift: a weight is kept as factor * weight + lift, an unsigned byte.
    """

    def __init__(self, name: str, per_entry: int, factor: int = 1, lift: int = 0) -> None:
        self._of, self._word = (name, factor, lift), {4: I32, 8: I64}[per_entry]
        self.per_entry = per_entry

    def look_up(self, b: Any, numbers: Sequence[Any]) -> Any:
        """Return 32 weights as <32 x i8>, from the numbers of their entries as i64."""
        # Loads of single entries: a gather takes a processor longer, if only by what it does about leaks
        table, size = b.ptrtoint(self._table(b), I64), self.per_entry
        vector = ir.Constant(ir.VectorType(self._word, len(numbers)), ir.Undefined)
        for i, number in enumerate(numbers):
            entry = load(b, table, b.mul(number, i64(size)), self._word, size)
            vector = b.insert_element(vector, entry, ir.Constant(I32, i))
        return b.bitcast(vector, V32I8)

    def _table(self, b: Any) -> Any:
        """Return the module's constant; those of one kernel's modules become one when they are linked."""
        symbol = "mer.code_book.{}.{}.{}".format(*self._of)
        known = b.module.globals.get(symbol)
        if known is not None:
            return known
        words = entries(*self._of)
        table = cgutils.add_global_variable(b.module, ir.ArrayType(self._word, len(words)), symbol)
        table.initializer = ir.Constant(table.value_type, words)
        table.global_constant, table.linkage, table.align = True, "linkonce_odr", 64
        return table
