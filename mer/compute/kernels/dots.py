"""Exact integer dot products of unsigned weights with int8 activations, in the instructions of each form.

VNNI adds four products of a byte pair to a lane of 32 bits at once. AVX2 has `vpmaddubsw`, which adds two products to a
lane of 16 bits and saturates there: unsigned weights up to 128 times activations from -127 to 127 never reach that
(2 * 128 * 127 = 32512). Of smaller weights several such vectors are added in 16 bits, as many as surely fit, before
`vpmaddwd` brings them to 32 bits, by ones or by the sub-scale of a sub-block. Weights up to 255 stand for int8 that lie
128 lower: their magnitudes, up to 128, are multiplied with activations that `vpsignb` gave the weights' signs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from llvmlite import binding, ir

from mer.compute.kernels.blocks import ActivationColumn
from mer.compute.kernels.ir import I1, call, const
from mer.compute.kernels.lanes import PAIRS, QUADS, WORDS
from mer.compute.kernels.target import FORM, Form

_ACTIVATION = 127  # the largest magnitude of an int8 activation
# LLVM 22 gives the operands of vpdpbusd the type that they have
_VNNI_ARG = QUADS if binding.llvm_version_info[0] >= 22 else WORDS
_VNNI = {Form.AVX512_VNNI: "llvm.x86.avx512.vpdpbusd.512", Form.AVX_VNNI: "llvm.x86.avx512.vpdpbusd.256"}


@dataclasses.dataclass(frozen=True)
class Quants:
    """Weights of each row, 4 to a vector: bytes from 0 to `largest` that stand for themselves less `zero`."""

    vectors: list[Any]
    largest: int
    zero: int = 0


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in a block, and of which column and plane, the activations are that weights meet.

    `position` is the first one's place and `sums` the numbers of the sums of all of them; weights that stand for
    themselves need no sums.
    """

    column: ActivationColumn
    plane: int
    c: int
    position: int = 0
    sums: tuple[int, ...] = (0,)

    def quads(self) -> Iterator[Any]:
        """Yield four activations after four, as QUADS."""
        position = self.position
        while True:
            yield self.column.quad(self.plane, self.c, position)
            position += 4

    def sum(self, factor: int) -> Any:
        """Return the activations' sum times a constant, as WORDS."""
        return self.column.sum(self.plane, self.c, self.sums, factor)


def _dot4(b: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Add to each int32 lane the dot product of its 4 unsigned and 4 signed bytes."""
    if FORM in _VNNI:
        return call(b, _VNNI[FORM], WORDS, total, b.bitcast(unsigned, _VNNI_ARG), b.bitcast(signed, _VNNI_ARG))
    for byte in range(4):
        lanes = ir.Constant(WORDS, [4 * lane + byte for lane in range(WORDS.count)])
        pick = [b.shuffle_vector(v, ir.Constant(QUADS, ir.Undefined), lanes) for v in (unsigned, signed)]
        total = b.add(total, b.mul(b.zext(pick[0], WORDS), b.sext(pick[1], WORDS)))
    return total


def dot2(b: Any, total: Any, left: Any, right: Any) -> Any:
    """Add to each int32 lane the dot product of its 2 and 2 signed int16, both given as PAIRS."""
    if FORM is Form.AVX512_VNNI:  # with the addition one instruction
        return b.add(total, call(b, "llvm.x86.avx512.pmaddw.d.512", WORDS, left, right))
    if FORM is not Form.PORTABLE:
        return b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", WORDS, left, right))
    for word in range(2):
        lanes = ir.Constant(WORDS, [2 * lane + word for lane in range(WORDS.count)])
        pick = [b.sext(b.shuffle_vector(v, ir.Constant(PAIRS, ir.Undefined), lanes), WORDS) for v in (left, right)]
        total = b.add(total, b.mul(*pick))
    return total


def _pair_dots(b: Any, weights: Quants, place: Place) -> Iterator[Any]:
    """Yield PAIRS whose sums over all of them and both int16 of a lane are the dot products of AVX2.

    Weights above 128 meet their activations as int8, so that no zero is left to take back.
    """
    each = 2 * min(weights.largest, 128) * _ACTIVATION
    held = 0
    total = None
    for vector, quad in zip(weights.vectors, place.quads(), strict=False):
        if weights.largest > 128:
            signed = b.xor(vector, const(QUADS, 128))
            vector = call(b, "llvm.abs.v32i8", QUADS, signed, ir.Constant(I1, 0))
            quad = call(b, "llvm.x86.avx2.psign.b", QUADS, quad, signed)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", PAIRS, vector, quad)
        if total is not None and held + each <= 32767:
            total, held = b.add(total, pairs), held + each
            continue
        if total is not None:
            yield total
        total, held = pairs, each
    yield total


def _left_to_take_back(weights: Quants) -> int:
    """Return the zero of weights that meet their activations as AVX2 has them."""
    if weights.largest <= 128:
        return weights.zero
    if weights.zero != 128:
        raise ValueError("weights above 128 must stand for int8")
    return 0


def dots(b: Any, weights: Quants, place: Place) -> Any:
    """Return each row's int32 dot product of weights with activations."""
    zero = _left_to_take_back(weights) if FORM is Form.AVX2 else weights.zero
    total = place.sum(-zero) if zero else const(WORDS, 0)
    if FORM is Form.AVX2:
        for pairs in _pair_dots(b, weights, place):
            total = dot2(b, total, pairs, const(PAIRS, 1))
        return total
    for vector, quad in zip(weights.vectors, place.quads(), strict=False):
        total = _dot4(b, total, vector, quad)
    return total


def add_scaled_dots(b: Any, total: Any, scale: Any, weights: Quants, place: Place) -> Any:
    """Return total + scale * dot product, for int32 sub-scales from -128 to 127 and sub-blocks of 16 or 32 weights."""
    if FORM is not Form.AVX2:
        return b.add(total, b.mul(dots(b, weights, place), scale))
    low = b.and_(scale, const(WORDS, 0xFFFF))
    both = b.bitcast(b.or_(low, b.shl(scale, const(WORDS, 16))), PAIRS)
    for pairs in _pair_dots(b, weights, place):
        total = dot2(b, total, pairs, both)
    zero = _left_to_take_back(weights)
    if zero:  # the sum fits int16, and the upper half of its lane meets 0
        factor = b.and_(b.mul(scale, const(WORDS, -zero)), const(WORDS, 0xFFFF))
        total = dot2(b, total, b.bitcast(place.sum(1), PAIRS), b.bitcast(factor, PAIRS))
    return total
