"""F32, F16 and BF16 matrix products on float32 activations, on rows as they lie in the file.

Each result is 16 partial sums along K, lane i taking k = i, i + 16, ...; the lanes are added in one fixed tree.
"""

from __future__ import annotations

from typing import Any

from numba import types

from mer.compute.kernels.entry import ProductWords, claim, rows_of_piece
from mer.compute.kernels.ir import (
    F32,
    I64,
    LANES,
    V16F32,
    V16I16,
    const,
    fma,
    i64,
    lane_mask,
    load,
    load_i64,
    masked_load,
    store,
    sum16,
    widen_bfloat,
    widen_half,
)
from mer.compute.kernels.numba_api import cgutils, intrinsic, literally, njit
from mer.compute.kernels.step import step
from mer.compute.kernels.target import FORM, Form
from mer.compute.kernels.words import columns

F32_KIND, F16_KIND, BF16_KIND = 0, 1, 30  # ggml type ids
# Weight rows and activation rows at once: as many as have their partial sums in registers, of 16 or 8 lanes
_ROWS, _COLUMNS = (2, 3) if FORM in (Form.AVX_VNNI, Form.AVX2) else (4, 4)


def _weights(b: Any, kind: int, address: Any, index: Any, mask: Any = None) -> Any:
    """Load 16 weights starting at element `index` (a multiple of 16), or the masked ones of them."""
    vector, size = (V16F32, 4) if kind == F32_KIND else (V16I16, 2)
    offset = b.mul(index, i64(size))
    raw = load(b, address, offset, vector) if mask is None else masked_load(b, address, offset, vector, mask)
    if kind == F32_KIND:
        return raw
    return widen_half(b, raw) if kind == F16_KIND else widen_bfloat(b, raw)


@intrinsic(prefer_literal=True)
def float_tile(
    _ctx: Any,
    kind: Any,
    rows: Any,
    columns: Any,
    w: Any,
    row_bytes: Any,
    k: Any,
    x: Any,
    x_stride: Any,
    out: Any,
    out_stride: Any,
    add: Any,
) -> Any:
    """Multiply `rows` weight rows with `columns` activation rows of k floats."""
    # Lanes run along K and not, as in `tile.py`, across rows: these lie as in the file, and loads across them gather.
    n_rows, n_columns, ty = rows.literal_value, columns.literal_value, kind.literal_value
    signature = types.void(kind, rows, columns, *[types.int64] * 8)

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        w, row_bytes, k, x, x_stride, out, out_stride, add = args[3:]
        zero = const(V16F32, 0.0)
        acc = [[cgutils.alloca_once_value(b, zero) for _ in range(n_columns)] for _ in range(n_rows)]
        row = [b.add(w, b.mul(row_bytes, i64(r))) for r in range(n_rows)]
        column = [b.add(x, b.mul(x_stride, i64(c))) for c in range(n_columns)]

        def accumulate(index: Any, mask: Any = None) -> None:
            offset = b.mul(index, i64(4))
            if mask is None:
                xs = [load(b, a, offset, V16F32, 4) for a in column]
            else:  # what pads x may be NaN
                xs = [masked_load(b, a, offset, V16F32, mask) for a in column]
            for r in range(n_rows):
                weights = _weights(b, ty, row[r], index, mask)
                for c in range(n_columns):
                    b.store(fma(b, weights, xs[c], b.load(acc[r][c])), acc[r][c])

        with cgutils.for_range(b, b.lshr(k, i64(4)), intp=I64) as loop:
            accumulate(b.mul(loop.index, i64(LANES)))
        rest = b.and_(k, i64(LANES - 1))
        with b.if_then(b.icmp_signed(">", rest, i64(0))):
            accumulate(b.sub(k, rest), lane_mask(b, rest))
        adds = b.icmp_signed("!=", add, i64(0))
        for r in range(n_rows):
            for c in range(n_columns):
                offset = b.add(i64(4 * r), b.mul(out_stride, i64(c)))
                old = b.select(adds, load(b, out, offset, F32, 4), zero.type.element(0.0))
                store(b, b.fadd(old, sum16(b, b.load(acc[r][c]))), out, offset)
        return context.get_dummy_value()

    return signature, codegen


class FloatProductWords(ProductWords):
    """Words of a row of `float_rows`.

    table, n_entries, flags, chunk (see `ProductWords`), n_rows, k, row_bytes, x, x_stride (bytes), out, out_step (bytes
    from the results of one matrix to those of the next), out_stride (bytes).
    """

    n_rows: int
    k: int
    row_bytes: int
    x: int
    x_stride: int
    out: int
    out_step: int
    out_stride: int


FLOATS = columns(FloatProductWords)


@njit
def float_rows(row, kind):  # type: ignore[no-untyped-def]
    """Body of every float matmul step: out[t, r] (+)= sum over k of W[r, k] * x[t, k], for claimed rows."""
    literally(kind)
    n_rows, k, row_bytes = load_i64(row, FLOATS.n_rows), load_i64(row, FLOATS.k), load_i64(row, FLOATS.row_bytes)
    x0, x_stride, out0 = load_i64(row, FLOATS.x), load_i64(row, FLOATS.x_stride), load_i64(row, FLOATS.out)
    out_step, out_stride = load_i64(row, FLOATS.out_step), load_i64(row, FLOATS.out_stride)
    add = load_i64(row, FLOATS.flags) >> 32
    while True:
        entry, matrix, r, last = claim(row, n_rows)
        if entry == 0:
            return
        w, _, n, x_row, out_row = rows_of_piece(row, entry, matrix)
        x, out = x0 + x_row * x_stride, out0 + matrix * out_step + out_row * out_stride
        while r < last:
            wr, to = w + r * row_bytes, out + 4 * r
            tall = r + _ROWS <= last
            t = 0
            while t < n:
                xt, o = x + t * x_stride, to + t * out_stride
                wide = t + _COLUMNS <= n
                if tall and wide:
                    float_tile(kind, _ROWS, _COLUMNS, wr, row_bytes, k, xt, x_stride, o, out_stride, add)
                elif wide:
                    float_tile(kind, 1, _COLUMNS, wr, row_bytes, k, xt, x_stride, o, out_stride, add)
                elif tall:
                    float_tile(kind, _ROWS, 1, wr, row_bytes, k, xt, x_stride, o, out_stride, add)
                else:
                    float_tile(kind, 1, 1, wr, row_bytes, k, xt, x_stride, o, out_stride, add)
                t += _COLUMNS if wide else 1
            r += _ROWS if tall else 1


@step(FloatProductWords)
def matmul_f32(row: int, _thread: int, _n_threads: int) -> None:
    """F32 matrix product."""
    float_rows(row, F32_KIND)


@step(FloatProductWords)
def matmul_f16(row: int, _thread: int, _n_threads: int) -> None:
    """F16 matrix product."""
    float_rows(row, F16_KIND)


@step(FloatProductWords)
def matmul_bf16(row: int, _thread: int, _n_threads: int) -> None:
    """BF16 matrix product."""
    float_rows(row, BF16_KIND)
