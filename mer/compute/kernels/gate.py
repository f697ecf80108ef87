"""Gates on what attention gives."""

from __future__ import annotations

import math

import numpy as np

from mer.compute.kernels.claim import chunk_of, claim_unit
from mer.compute.kernels.ir import load_f32, load_i64, store_f32
from mer.compute.kernels.numba_api import njit
from mer.compute.kernels.step import step
from mer.compute.kernels.words import Words, columns

_MIN_VALUES = 512  # gates of fewer values take less time than claiming them


@njit
def _softplus(x):  # type: ignore[no-untyped-def]
    """Return log(1 + e**x), below -15 by its series: there 1 + e**x has no digits of e**x left."""
    power = math.exp(min(x, 40.0))
    if x < -15.0:
        return power * (1.0 - power / 2.0)
    return x if x > 40.0 else math.log(1.0 + power)


class GateWords(Words):
    """Words of a row of `gate_heads`.

    values (float32), stride (bytes), n, n_gates (of a row), width (values that a gate multiplies, side by side), gates
    (float32), gates_stride (bytes).
    """

    values: int
    stride: int
    n: int
    n_gates: int
    width: int
    gates: int
    gates_stride: int


GATE = columns(GateWords)


@step(GateWords)
def gate_heads(row: int, _thread: int, n_threads: int) -> None:
    """Multiply values by the softplus of their gates.

    Runs of (row, gate) pairs are claimed.
    """
    values, stride, n = load_i64(row, GATE.values), load_i64(row, GATE.stride), load_i64(row, GATE.n)
    n_gates, width = load_i64(row, GATE.n_gates), load_i64(row, GATE.width)
    gates, gates_stride = load_i64(row, GATE.gates), load_i64(row, GATE.gates_stride)
    items = n * n_gates
    chunk = chunk_of(items, n_threads, max(1, _MIN_VALUES // width))
    while True:
        begin = claim_unit(row) * chunk
        if begin >= items:
            return
        for item in range(begin, min(begin + chunk, items)):
            t, gate = item // n_gates, item % n_gates
            factor = np.float32(_softplus(np.float64(load_f32(gates + t * gates_stride, gate))))
            target = values + t * stride + 4 * width * gate
            for i in range(width):
                store_f32(target, i, load_f32(target, i) * factor)
