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

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.dots import Place, Quants, add_scaled_dots, dot2
from mer.compute.kernels.interleave import ROWS
from mer.compute.kernels.ir import I32, I64, const, fma, i64, splat
from mer.compute.kernels.lanes import FLOATS, PAIRS, WORDS, TilePiece
from mer.compute.kernels.numba_api import cgutils
from mer.compute.kernels.tile import PLANE_SHIFT, joined

TURNS = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """Weights that have a sub-scale in common.

    `position` is the first one's place, and `sums` the numbers of their activations' sums, both counted from where the
    turn's activations begin. Weights that stand for themselves need no sums.
    """

    scale: Any  # WORDS
    weights: Quants
    position: int
    sums: tuple[int, ...] = ()


class SubBlocks(Protocol):
    """How a type's sub-blocks are taken from a tile."""

    block_bytes: int

    def begin(self, b: Any, turn: Any) -> tuple[Any, Any]:
        """Return where the activations of turn `turn`, an IR value, begin: in weights, and in sums."""

    def parts(self, b: Any, weights: TilePiece, turn: Any) -> Iterable[Part]:
        """Emit the code that takes apart the sub-blocks of one turn; `weights` is a piece of the super-block."""


def integer_sums(b: Any, fmt: SubBlocks, weights: TilePiece, column: ActivationColumn, columns: int) -> list[list[Any]]:
    """Return for each column and each plane each row's int32 sum of sub-scale times dot product."""
    planes = range(column.planes)
    totals = [[cgutils.alloca_once_value(b, const(WORDS, 0)) for _ in planes] for _ in range(columns)]
    with cgutils.for_range(b, i64(TURNS), intp=I64) as loop:
        here = column.advanced(*fmt.begin(b, loop.index))
        piece = ROWS * fmt.block_bytes // TURNS
        weights.moved(times(b, loop.index, piece)).ask_ahead(piece, columns)
        for part in fmt.parts(b, weights, loop.index):
            for c, plane in itertools.product(range(columns), planes):
                total, place = totals[c][plane], Place(here, plane, c, part.position, part.sums)
                b.store(add_scaled_dots(b, b.load(total), part.scale, part.weights, place), total)
    return [[b.load(total) for total in of_planes] for of_planes in totals]


def add_planes(b: Any, sums: list[Any], scale: Any, acc: Any) -> Any:
    """Return acc + scale times the integer sums of all planes, which together may not fit int32."""
    for plane, total in enumerate(sums):
        weight = const(FLOATS, float(1 << PLANE_SHIFT * (len(sums) - 1 - plane)))
        acc = fma(b, b.sitofp(total, FLOATS), b.fmul(scale, weight), acc)
    return acc


def byte_pairs(b: Any, words: list[Any]) -> list[Any]:
    """Return the unsigned bytes of vectors of words as PAIRS: the even ones of each vector, then the odd ones."""
    halves = [b.bitcast(word, PAIRS) for word in words]
    return [part for v in halves for part in (b.and_(v, const(PAIRS, 0xFF)), b.lshr(v, const(PAIRS, 8)))]


def subtract_minima(b: Any, minima: list[Any], minimum: Any, column: ActivationColumn, c: int, acc: Any) -> Any:
    """Return acc less column c's product with the minima, given as `minimum` times the integers of `byte_pairs`."""
    planes = []
    for plane in range(column.planes):
        total = const(WORDS, 0)
        for pair, sums in zip(minima, column.sum_pairs(plane, c, 8 // len(minima)), strict=True):
            total = dot2(b, total, pair, sums)
        planes.append(total)
    return fma(b, b.sitofp(joined(b, planes), FLOATS), b.fneg(b.fmul(minimum, column.scale(c))), acc)


def shifted(b: Any, words: Any, amount: Any) -> Any:
    """Return vectors of words shifted right by an i64 value."""
    return b.lshr(words, splat(b, b.trunc(amount, I32), WORDS))


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
