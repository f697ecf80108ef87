"""Super-blocks of 256 weights in sub-blocks with integer sub-scales: what the K types and IQ4_XS have in common.

A tile's super-block is worked through in four turns of a loop, so that the code of all sub-blocks is compiled as that
of a quarter of them. The sum over all sub-blocks of sub-scale times dot product is exact in int32 for each plane of the
activations; so is that of the sub-minima times the sums of their activations. Order of the float32 operations on them:
one fma per plane, the first of two planes first, or one for both where their joined sum fits int32; then one for the
minimum, whose planes are joined as integers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any, Protocol

from mer.compute.kernels.interleave import ROWS
from mer.compute.kernels.ir import I32, I64, V16F32, V16I32, V32I16, V64I8, const, dot2, dot4, fma, i64, splat
from mer.compute.kernels.numba_api import cgutils
from mer.compute.kernels.tile import PLANE_SHIFT, ActivationColumn, ask_ahead, joined

TURNS = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """Weights that have a sub-scale in common, 4 bytes of each row to a vector, with `zero` added to each weight.

    `position` is the first one's place, and `sums` the numbers of their activations' sums, both counted from where the
    turn's activations begin. Types that add nothing need no sums.
    """

    scale: Any  # <16 x i32>
    vectors: list[Any]
    position: int
    zero: int = 0
    sums: tuple[int, ...] = ()


class SubBlocks(Protocol):
    """How a type's sub-blocks are taken from a tile."""

    block_bytes: int

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """Return where the activations of turn `turn`, an IR value, begin: in weights, and in sums."""

    def parts(self, b: Any, weights: Any, turn: Any) -> Iterable[Part]:
        """Emit the code that takes apart the sub-blocks of one turn; `weights` is the address of the super-block."""


def integer_sums(b: Any, fmt: SubBlocks, weights: Any, column: ActivationColumn, columns: int) -> list[list[Any]]:
    """Return for each column and each plane 16 int32: of each row, the sum of sub-scale times dot product."""
    planes = range(column.planes)
    totals = [[cgutils.alloca_once_value(b, const(V16I32, 0)) for _ in planes] for _ in range(columns)]
    with cgutils.for_range(b, i64(TURNS), intp=I64) as loop:
        here = column.advanced(*fmt.begin(b, loop.index))
        piece = ROWS * fmt.block_bytes // TURNS
        ask_ahead(b, b.add(weights, times(b, loop.index, piece)), piece, columns)
        for part in fmt.parts(b, weights, loop.index):
            for c, plane in itertools.product(range(columns), planes):
                dots = here.sum(plane, c, part.sums, -part.zero) if part.zero else const(V16I32, 0)
                for j, vector in enumerate(part.vectors):
                    dots = dot4(b, dots, vector, here.quad(plane, c, part.position + 4 * j, V64I8))
                total = totals[c][plane]
                b.store(b.add(b.load(total), b.mul(dots, part.scale)), total)
    return [[b.load(total) for total in of_planes] for of_planes in totals]


def add_planes(b: Any, sums: list[Any], scale: Any, acc: Any) -> Any:
    """Return acc + scale times the integer sums of all planes, which together may not fit int32."""
    for plane, total in enumerate(sums):
        weight = const(V16F32, float(1 << PLANE_SHIFT * (len(sums) - 1 - plane)))
        acc = fma(b, b.sitofp(total, V16F32), b.fmul(scale, weight), acc)
    return acc


def byte_pairs(b: Any, words: list[Any]) -> list[Any]:
    """Return the unsigned bytes of vectors of words as V32I16: the even ones of each vector, then the odd ones."""
    halves = [b.bitcast(word, V32I16) for word in words]
    return [part for v in halves for part in (b.and_(v, const(V32I16, 0xFF)), b.lshr(v, const(V32I16, 8)))]


def subtract_minima(b: Any, minima: list[Any], minimum: Any, column: ActivationColumn, c: int, acc: Any) -> Any:
    """Return acc less column c's product with the minima, given as `minimum` times the integers of `byte_pairs`."""
    planes = []
    for plane in range(column.planes):
        total = const(V16I32, 0)
        for pair, sums in zip(minima, column.sum_pairs(plane, c, 8 // len(minima)), strict=True):
            total = dot2(b, total, pair, sums)
        planes.append(total)
    return fma(b, b.sitofp(joined(b, planes), V16F32), b.fneg(b.fmul(minimum, column.scale(c))), acc)


def shifted(b: Any, words: Any, amount: Any) -> Any:
    """Return vectors of words shifted right by an i64 value."""
    return b.lshr(words, splat(b, b.trunc(amount, I32), V16I32))


def times(b: Any, turn: Any, factor: int) -> Any:
    """Return an i64 value times a constant."""
    return b.mul(turn, i64(factor))


def halves(b: Any, turn: Any) -> tuple[Any, Any]:
    """Return (half, odd) of a turn, for types with 2 halves whose odd sub-blocks of 16 come in turns of their own."""
    return b.lshr(turn, i64(1)), b.and_(turn, i64(1))


def begin_of_halves(b: Any, turn: Any) -> tuple[Any, Any]:
    """Return where the activations of these types' turns begin: sub-block 8 * half + odd, and each second one."""
    half, odd = halves(b, turn)
    sub = b.add(times(b, half, 8), odd)
    return times(b, sub, 16), sub
