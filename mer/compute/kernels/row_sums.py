"""Integer sums of super-blocks whose weights come from code books, row after row.

Where an entry of a code book has 4 or 8 weights of one row, a lane for each row would have to be put together from
bytes of many entries. So a vector has 32 weights of a single row here, and meets 32 activations as they lie in memory;
the row's sums, one to a lane, are added up when its super-block is done. What else a group of 32 weights has, signs,
sub-scales and upper bits of entries' numbers, is taken apart for all rows at once before, and waits in a little room.

The sum over all groups of sub-scale times dot product is exact in int32 for each plane of the activations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from llvmlite import ir

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.code_books import V32I8
from mer.compute.kernels.dots import dot2
from mer.compute.kernels.interleave import ROWS
from mer.compute.kernels.ir import I8, I16, I32, I64, call, const, i64, load, splat, store, widen_half
from mer.compute.kernels.lanes import FLOATS, PAIRS, ROW_LANES, SHORTS, WORDS, TilePiece
from mer.compute.kernels.numba_api import cgutils
from mer.compute.kernels.super_block import add_planes, shifted, times
from mer.compute.kernels.target import FORM, Form
from mer.compute.kernels.tile import joined

GROUPS, GROUP = 8, 32  # groups of a super-block, and weights of one
_FEW = 2  # columns times planes for which the code is long rather than a loop
EIGHT_WORDS = ir.VectorType(I32, 8)  # of one row: 4 weights to a lane
_SCALES = ir.VectorType(I16, 16)
_BITS = ir.Constant(V32I8, [1 << i % 8 for i in range(32)])


@dataclasses.dataclass(frozen=True)
class RowWeights:
    """32 weights of a row: unsigned bytes up to 128, and which of them are negative, as bytes 0 or -1, if any are."""

    magnitudes: Any  # <32 x i8>
    negative: Any = None  # <32 x i8>


class RowGroup:
    """A group of one row: its words in the tile, and those that `prepare` left for it."""

    def __init__(self, b: Any, row: Any, group: Any, room: Any) -> None:
        self._b, self._row, self._group, self._room = b, row, group, room

    def numbers(self, offset: int, step: int, count: int) -> list[Any]:
        """Return `count` bytes of words that begin at `offset` plus `step` times the group of the tile, as i64."""
        b, begin = self._b, self._b.add(self._row, times(self._b, self._group, step))
        places = (offset + 4 * ROWS * (i // 4) + i % 4 for i in range(count))
        return [b.zext(load(b, begin, place, I8), I64) for place in places]

    def repeated(self, word: int) -> Any:
        """Return a word that was left for this row as 8 words."""
        return splat(self._b, self.prepared(word), EIGHT_WORDS)

    def prepared(self, word: int) -> Any:
        """Return a word that was left for this row, as i32."""
        return load(self._b, self._room, 4 * ROW_LANES * word, I32, 4)

    def prepared_numbers(self, word: int, count: int) -> list[Any]:
        """Return `count` numbers of 16 bits, two in each word from `word` on, as i64."""
        b = self._b
        places = (4 * ROW_LANES * (word + i // 2) + 2 * (i % 2) for i in range(count))
        return [b.zext(load(b, self._room, place, I16, 2), I64) for place in places]

    def negative(self, word: int) -> Any:
        """Return 0 or -1 for each of 32 weights from the signs of bits in a word that was left for this row."""
        b = self._b
        signs = b.bitcast(self.repeated(word), V32I8)
        order = [i // 16 * 16 + i // 8 for i in range(32)]  # every word of `signs` is the same
        spread = b.shuffle_vector(signs, signs, ir.Constant(ir.VectorType(I32, 32), order))
        return b.sext(b.icmp_signed("==", b.and_(spread, _BITS), _BITS), V32I8)


class CodeBookBlocks(Protocol):
    """How a type's super-blocks are taken from a tile."""

    block_bytes: int
    words: int  # that `prepare` returns
    halves: bool  # whether each 16 weights have a sub-scale of their own
    zeros: bool  # whether the weights are taken too large

    def prepare(self, b: Any, weights: TilePiece, group: Any) -> Sequence[Any]:
        """Return what group number `group`, an IR value, of each row needs, as WORDS.

        The first has the sub-scales of the first and of the second 16 weights, as 16 bits each. With `zeros` the second
        has in the same way sub-scale times what each weight is too large by.
        """

    def weights(self, b: Any, row: RowGroup) -> RowWeights:
        """Return the weights of a group of one row."""


def row_sums(
    b: Any, fmt: CodeBookBlocks, weights: TilePiece, column: ActivationColumn, columns: int
) -> list[list[Any]]:
    """Return for each column and each plane each row's int32 sum of sub-scale times dot product."""
    room = b.ptrtoint(_room(b, GROUPS * fmt.words * ROW_LANES), I64)
    with cgutils.for_range(b, i64(GROUPS), intp=I64) as loop:
        there = b.add(room, times(b, loop.index, 4 * fmt.words * ROW_LANES))
        for number, word in enumerate(fmt.prepare(b, weights, loop.index)):
            store(b, word, there, 4 * ROW_LANES * number)
    pairs = list(itertools.product(range(columns), range(column.planes)))
    totals = [cgutils.alloca_once_value(b, const(EIGHT_WORDS, 0)) for _ in pairs]
    kept = b.ptrtoint(_room(b, 8 * ROW_LANES * len(pairs)), I64)
    with cgutils.for_range(b, i64(ROW_LANES), intp=I64) as rows:
        weights.ask_ahead_of_row(rows.index, fmt.block_bytes, columns)
        for total in totals:
            b.store(const(EIGHT_WORDS, 0), total)
        for group in _each(b, GROUPS, unrolled=len(pairs) <= _FEW):
            here = b.add(times(b, group, 4 * fmt.words * ROW_LANES), times(b, rows.index, 4))
            row = RowGroup(b, weights.row(rows.index), group, b.add(room, here))
            found, scale = fmt.weights(b, row), _spread_scales(b, row.prepared(0), fmt.halves)
            run = column.advanced(times(b, group, GROUP), i64(0))
            for (c, plane), total in zip(pairs, totals, strict=True):
                activations = run.vector(plane, c, V32I8)
                b.store(_add_dot(b, b.load(total), scale, found, activations), total)
        for number, total in enumerate(totals):
            store(b, b.load(total), b.add(kept, times(b, rows.index, 32)), 32 * ROW_LANES * number, 32)
    sums = [_lanes_added(b, kept, 32 * ROW_LANES * number) for number in range(len(pairs))]
    if fmt.zeros:
        for group, (number, (c, plane)) in itertools.product(range(GROUPS), enumerate(pairs)):
            zeros = load(b, room, 4 * ROW_LANES * (fmt.words * group + 1), PAIRS, 4 * ROW_LANES)
            taken = dot2(b, const(WORDS, 0), zeros, column.neighbours(plane, c, group))
            sums[number] = b.sub(sums[number], taken)
    return [sums[c * column.planes : (c + 1) * column.planes] for c in range(columns)]


def _each(b: Any, count: int, *, unrolled: bool) -> Iterator[Any]:
    """Yield the numbers from 0 on as i64: in code of their own, or in a loop, which takes instructions of its own."""
    if unrolled:
        yield from map(i64, range(count))
        return
    with cgutils.for_range(b, i64(count), intp=I64) as loop:
        yield loop.index


def _room(b: Any, words: int) -> Any:
    """Return room for so many words on the stack, at a multiple of 64 bytes."""
    room = cgutils.alloca_once(b, ir.ArrayType(I32, words))
    room.align = 64
    return room


def _spread_scales(b: Any, word: Any, halves: bool) -> Any:
    """Return the two sub-scales of a word in front of the 16 pairs of weights they belong to, as <16 x i16>."""
    both = b.bitcast(splat(b, word, EIGHT_WORDS), _SCALES)
    if not halves:  # they are the same
        return both
    order = ir.Constant(ir.VectorType(I32, 16), [0] * 8 + [9] * 8)
    return b.shuffle_vector(both, both, order)


def _add_dot(b: Any, total: Any, scale: Any, weights: RowWeights, activations: Any) -> Any:
    """Return total + sub-scale * weights * activations, 4 products to a lane.

    The AVX-512 forms have no instruction that saves one of these three, as sub-scales are to come between products and
    sums.
    """
    if FORM is not Form.PORTABLE:
        if weights.negative is not None:
            sign = b.or_(weights.negative, const(V32I8, 1))
            activations = call(b, "llvm.x86.avx2.psign.b", V32I8, activations, sign)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", _SCALES, weights.magnitudes, activations)
        return b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", EIGHT_WORDS, pairs, scale))
    if weights.negative is not None:
        activations = b.sub(b.xor(activations, weights.negative), weights.negative)
    fours = const(EIGHT_WORDS, 0)
    for byte in range(4):
        lanes = ir.Constant(EIGHT_WORDS, [4 * lane + byte for lane in range(8)])
        pick = [b.shuffle_vector(v, ir.Constant(V32I8, ir.Undefined), lanes) for v in (weights.magnitudes, activations)]
        fours = b.add(fours, b.mul(b.zext(pick[0], EIGHT_WORDS), b.sext(pick[1], EIGHT_WORDS)))
    factors = b.shuffle_vector(
        scale, ir.Constant(_SCALES, ir.Undefined), ir.Constant(EIGHT_WORDS, list(range(0, 16, 2)))
    )
    return b.add(total, b.mul(fours, b.sext(factors, EIGHT_WORDS)))


def _lanes_added(b: Any, kept: Any, offset: int) -> Any:
    """Return the sums of the 8 lanes that each row has at `kept` plus `offset`, as WORDS."""
    eights = [_eight_added(b, [load(b, kept, offset + 32 * (first + r), EIGHT_WORDS, 32) for r in range(8)])
              for first in range(0, ROW_LANES, 8)]  # fmt: skip
    if len(eights) == 1:
        return eights[0]
    return b.shuffle_vector(*eights, ir.Constant(WORDS, list(range(16))))


def _eight_added(b: Any, rows: list[Any]) -> Any:
    """Return the sum of each of 8 vectors, side by side."""

    def added(left: Any, right: Any, *orders: list[int]) -> Any:
        parts = [b.shuffle_vector(left, right, ir.Constant(EIGHT_WORDS, order)) for order in orders]
        return b.add(*parts)

    def neighbours(left: Any, right: Any) -> Any:  # within each half, as `vphaddd` has it
        return added(left, right, [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15])

    twos = [neighbours(left, right) for left, right in itertools.pairwise(rows)][::2]
    fours = [neighbours(left, right) for left, right in itertools.pairwise(twos)][::2]
    return added(*fours, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


class CodeBookFormat:
    """What the decoders of these types have in common; each is a `BlockFormat`, and one of `CodeBookBlocks`."""

    block_weights = 256
    block_bytes: int
    sums_per_block = 16
    words: int
    halves = False
    zeros = False
    unit = 1.0  # the weights' scale is that of the block times this
    joined = False  # whether the integer sums of two planes, joined, fit int32

    def scale(self, b: Any, weights: TilePiece) -> Any:
        """Return the block's scale of each row as float32: a half float that comes first, unless a type says else."""
        return widen_half(b, weights.load(0, SHORTS))

    def accumulate(self, b: Any, weights: TilePiece, column: ActivationColumn, columns: int, acc: list[Any]) -> None:
        """See `BlockFormat`."""
        fmt: Any = self
        sums = row_sums(b, fmt, weights, column, columns)
        scale = b.fmul(self.scale(b, weights), const(FLOATS, self.unit))
        for c in range(columns):
            totals = [joined(b, sums[c])] if self.joined else sums[c]
            b.store(add_planes(b, totals, b.fmul(scale, column.scale(c)), b.load(acc[c])), acc[c])


def odd_pair(b: Any, words: Any, bits: int, first: int, second: int) -> Any:
    """Return 2 * s + 1 of the two numbers s of `bits` bits that begin at these bits of words, as 16 bits each."""
    mask = (1 << bits) - 1
    low = b.and_(_moved(b, words, 1 - first), const(WORDS, mask << 1))
    high = b.and_(_moved(b, words, 17 - second), const(WORDS, mask << 17))
    return b.or_(b.or_(low, high), const(WORDS, 0x10001))


def odd_twice(b: Any, words: Any, bits: int, first: int) -> Any:
    """Return 2 * s + 1 of the number s of `bits` bits that begins at a bit of words, twice."""
    return odd_pair(b, words, bits, first, first)


def number_pairs(b: Any, lower: Any, upper: Any, bits: int, step: int, first: int = 0) -> list[Any]:
    """Return the numbers of 4 entries, 16 bits each, in two words.

    Args:
        b: the builder.
        lower: words of their lowest 8 bits.
        upper: words of the `bits` bits above; those of entry i begin at bit `step` * i.
        bits, step: see there.
        first: the first entry among those of `upper`.
    """
    pairs = []
    for half in range(2):
        total = b.or_(
            b.and_(_moved(b, lower, -16 * half), const(WORDS, 0xFF)),
            b.and_(_moved(b, lower, 8 - 16 * half), const(WORDS, 0xFF0000)),
        )
        for i in range(2):
            shift = 8 + 16 * i - step * (first + 2 * half + i)
            total = b.or_(total, b.and_(_moved(b, upper, shift), const(WORDS, ((1 << bits) - 1) << 8 + 16 * i)))
        pairs.append(total)
    return pairs


def byte_of(b: Any, weights: TilePiece, offset: int, group: Any) -> Any:
    """Return words whose lowest byte is that of a group, of 8 bytes of each row from `offset` on."""
    word = weights.moved(times(b, b.lshr(group, i64(2)), 4 * ROWS)).load(offset, WORDS)
    return shifted(b, word, times(b, b.and_(group, i64(3)), 8))


def short_of(b: Any, weights: TilePiece, offset: int, group: Any) -> Any:
    """Return words whose lower half is that of a group, of 16 bytes of each row from `offset` on."""
    word = weights.moved(times(b, b.lshr(group, i64(1)), 4 * ROWS)).load(offset, WORDS)
    return shifted(b, word, times(b, b.and_(group, i64(1)), 16))


def _moved(b: Any, words: Any, left: int) -> Any:
    """Return words shifted to the left, or for a negative number to the right."""
    if left == 0:
        return words
    return b.shl(words, const(WORDS, left)) if left > 0 else b.lshr(words, const(WORDS, -left))


def with_parity(b: Any, signs: Any) -> Any:
    """Return words of four 7-bit signs each with the eighth ones, which make the negative ones of 8 even."""
    folded = signs
    for shift in (4, 2, 1):
        folded = b.xor(folded, b.lshr(folded, const(WORDS, shift)))
    return b.or_(signs, b.shl(b.and_(folded, const(WORDS, 0x01010101)), const(WORDS, 7)))


def sevens(b: Any, words: Any) -> Any:
    """Return the lowest four 7-bit fields of words as bytes."""
    parts = [b.and_(b.shl(words, const(WORDS, i)) if i else words, const(WORDS, 0x7F << 8 * i)) for i in range(4)]
    return b.or_(b.or_(*parts[:2]), b.or_(*parts[2:]))
