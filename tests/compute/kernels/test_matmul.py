"""Matrix products of every weight type against exact arithmetic on the very int8 activations, and gguf's weights."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.compute.kernels.matmul import STEPS, block_format
from mer.compute.reference.products import matmul_quantized
from mer.compute.reference.types import unpack
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from tests._lib import quantize
from tests._lib.quantize import Type, decode, put_half
from tests._lib.steps import F32, U8, product, products

F64 = npt.NDArray[np.float64]
KINDS = sorted(MATRIX_TYPES)
FLOATS = [kind for kind in KINDS if kind.block_size == 1]
BLOCKS = [kind for kind in KINDS if kind.block_size > 1]
HALVES = {kind: quantize.HALVES.get(Type(int(kind)), ()) for kind in BLOCKS}
LARGEST = {1: 127, 2: 127 * 128}  # {planes: the largest integer of an activation}
ROUNDING = 2.0**-24  # the largest relative error of one float32 operation

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_form = pytest.mark.parametrize(
    ("kind", "planes"),
    [
        pytest.param(kind, planes, id=f"{kind.name}-{planes}")
        for kind in KINDS
        for planes in ((1, 2) if kind in BLOCKS else (1,))
    ],
)


def random_weights(kind: GGMLType, rows: int, cols: int, rng: np.random.Generator) -> U8:
    """Return the bytes [rows, row bytes] of a matrix with any bit pattern in its integers, and all sorts of scales."""
    if kind in FLOATS:
        numbers = (rng.normal(size=(rows, cols)) * 10.0 ** rng.integers(-3, 4, (rows, 1))).astype(np.float32)
        return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType(int(kind))).view(np.uint8)
    raw = rng.integers(0, 256, (rows, cols // kind.block_size, kind.block_bytes), np.uint8)
    for at in HALVES[kind]:
        scales = (rng.normal(size=raw.shape[:2]) * 10.0 ** rng.integers(-4, 1, raw.shape[:2])).astype(np.float16)
        special = rng.random(scales.shape)
        scales[special < 0.1] = 0
        scales[special > 0.95] = 65504  # the largest half
        put_half(raw, Type(int(kind)), at, scales)
    if kind is GGMLType.MXFP4:
        raw[..., 0] = rng.integers(128 - 40, 128 + 40, raw.shape[:2])
    return raw.reshape(rows, -1)


def exact_activations(n: int, cols: int, rng: np.random.Generator, planes: int = 1) -> F32:
    """Return activations whose packed form is exact: in each 256 a power of two times integers of `planes` planes."""
    largest = LARGEST[planes]
    q = rng.integers(-largest, largest + 1, (n, cols)).astype(np.float32)
    scale = np.repeat(2.0 ** rng.integers(-20, 20, (n, -(-cols // 256))), 256, axis=1)[:, :cols]
    scale[rng.random(n) < 0.1] = 0
    q[:, ::16] = np.where(rng.random((n, -(-cols // 16))) < 0.5, largest, -largest)
    return (q * scale).astype(np.float32)


def magnitudes(kind: GGMLType, raw: U8, cols: int) -> F64:
    """Return for each weight a bound of the terms that make it up; with a minimum they are two that may cancel."""
    if kind in FLOATS:
        return np.abs(decode(raw, gguf.GGMLQuantizationType(int(kind))).astype(np.float64))
    parts = unpack(kind, raw.reshape(-1))
    run = kind.block_size // parts.factor.shape[1]
    size = np.abs(parts.scale.astype(np.float64) * np.repeat(parts.factor, run, axis=1) * parts.q)
    if parts.minimum is not None:
        size += np.abs(parts.minimum.astype(np.float64) * np.repeat(parts.lift, run, axis=1))
    return size.reshape(len(raw), cols)


def tolerance(kind: GGMLType, raw: U8, x: F32) -> F64:
    """Return the bound of the error [n, rows]: one rounding for each term that is added, and a few for the factors.

    A block adds up to three terms: one for each plane, and its minimum; NVFP4 one for each 16 weights.
    """
    cols = x.shape[1]
    additions = 3 * cols // kind.block_size if kind in BLOCKS and kind is not GGMLType.NVFP4 else cols // 16
    size = np.abs(x.astype(np.float64)) @ magnitudes(kind, raw, cols).T
    return (additions + 8) * ROUNDING * size + 1e-38


def check(
    kind: GGMLType, rows: int, cols: int, n: int, seed: int, *, planes: int, add: bool = False, n_threads: int = 1
) -> None:
    rng = np.random.default_rng(seed)
    raw, x = random_weights(kind, rows, cols, rng), exact_activations(n, cols, rng, planes)
    before = rng.normal(size=(n, rows)).astype(np.float32) if add else np.zeros((n, rows), np.float32)
    got = product(kind, raw, rows, x, planes=planes, out=before if add else None, n_threads=n_threads)
    weights = decode(raw, gguf.GGMLQuantizationType(int(kind))).astype(np.float64)
    want = x.astype(np.float64) @ weights.T + before
    bound = tolerance(kind, raw, x) + ROUNDING * np.abs(want)
    assert (np.abs(got - want) <= 2 * bound).all()  # GGUF's weights themselves are rounded once
    if planes == 1:
        want = matmul_quantized(kind, raw, x) + before
        assert (np.abs(got - want) <= bound).all()


@pytest.mark.slow
@every_form
def test_every_number_of_columns(kind: GGMLType, planes: int) -> None:
    cols = 2 * 256 if kind in BLOCKS else 2 * 256 - 13
    for n in range(1, 20):
        check(kind, rows=37, cols=cols, n=n, seed=n, planes=planes)


@every_form
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape(kind: GGMLType, planes: int, data: st.DataObject) -> None:
    blocks = st.integers(1, 5).map(lambda n: n * kind.block_size)
    check(
        kind,
        rows=data.draw(st.integers(1, 70), "rows"),
        cols=data.draw(blocks if kind in BLOCKS else st.integers(1, 70), "cols"),
        n=data.draw(st.integers(1, 19), "n"),
        seed=data.draw(st.integers(0, 2**32), "seed"),
        planes=planes,
        add=data.draw(st.booleans(), "add"),
        n_threads=data.draw(st.integers(1, 4), "n_threads"),
    )


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_byte_at_every_place_stands_for_its_weight(kind: GGMLType, planes: int) -> None:
    """One-hot columns of 127 give back 127 times each weight; every byte value comes at every place of a block."""
    place = np.arange(kind.block_bytes, dtype=np.uint8)
    raw = np.arange(256, dtype=np.uint8)[:, None] + place * np.uint8(7)
    for at in HALVES[kind]:
        put_half(raw, Type(int(kind)), at, 0.5 if at != 2 else -3.25)
    if kind is GGMLType.MXFP4:
        raw[:, 0] = 128 - 20 + np.arange(256) % 40
    weights = decode(raw, gguf.GGMLQuantizationType(int(kind)))
    got = product(kind, raw, 256, 127 * np.eye(kind.block_size, dtype=np.float32), planes=planes)
    assert np.array_equal(got, 127 * weights.T)


@every_kind
def test_every_half_float_and_bfloat_is_exact(kind: GGMLType) -> None:
    """As weights or scales: subnormals, infinities and NaN included."""
    bits = np.arange(65536, dtype=np.uint16)
    if kind in (GGMLType.F16, GGMLType.BF16):
        numbers = decode(bits.view(np.uint8).reshape(-1, 2), gguf.GGMLQuantizationType(int(kind)))[:, 0]
        got = product(kind, bits.view(np.uint8).reshape(-1, 2), len(bits), np.ones((1, 1), np.float32))
        assert np.array_equal(got[0], numbers, equal_nan=True)
        return
    if kind is GGMLType.F32:
        numbers = np.array([np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0], np.float32)
        got = product(kind, numbers.view(np.uint8).reshape(-1, 4), len(numbers), np.ones((1, 1), np.float32))
        assert np.array_equal(got[0], numbers, equal_nan=True)
        return
    halves = bits.view(np.float16).astype(np.float64)
    finite, infinite = np.isfinite(halves), np.isinf(halves)
    x = np.zeros((1, kind.block_size), np.float32)
    x[0, 0] = 127
    for at in HALVES[kind]:
        block = np.full(kind.block_bytes, 0x55, np.uint8)
        for other in HALVES[kind]:
            put_half(block, Type(int(kind)), other, 0)
        put_half(block, Type(int(kind)), at, 1)
        factor = float(decode(block[None], gguf.GGMLQuantizationType(int(kind)))[0, 0])
        assert factor != 0
        raw = np.tile(block, (len(bits), 1))
        put_half(raw, Type(int(kind)), at, bits.view(np.float16))
        got = product(kind, raw, len(bits), x)
        assert np.array_equal(got[0, finite], (127 * factor * halves[finite]).astype(np.float32))
        assert np.array_equal(np.isnan(got[0]), np.isnan(halves))
        assert np.array_equal(got[0, infinite], factor * halves[infinite])


@pytest.mark.parametrize("planes", [1, 2])
def test_every_exponent_of_mxfp4(planes: int) -> None:
    """From subnormal powers of two to the largest; none stands for NaN or infinity."""
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1:] = 0xA1  # 1, and -2 in the high nibbles
    x = np.zeros((2, 32), np.float32)
    x[0, 0] = x[1, 16] = 127 * 2.0**-7
    powers = np.ldexp(1.0, np.arange(-128, 128))
    weights = decode(raw[:255], gguf.GGMLQuantizationType.MXFP4)  # the last, -2**128, is no float32
    assert np.array_equal(weights[:, [0, 16]], np.stack([powers[:255], -2 * powers[:255]], axis=1))
    got = product(GGMLType.MXFP4, raw, 256, x, planes=planes)
    want = np.stack([powers, -2 * powers]) * x.max()
    assert np.array_equal(got[:, 12:], want[:, 12:])
    assert np.allclose(got, want, rtol=0, atol=2.0**-139)  # of the smallest the product of both scales loses bits


@pytest.mark.parametrize("planes", [1, 2])
def test_every_scale_of_nvfp4(planes: int) -> None:
    """Subnormal ones too; none stands for NaN, and 0x7F is 0."""
    raw = np.zeros((256, 36), np.uint8)
    raw[:, :4] = np.arange(256)[:, None] ^ np.arange(4)
    raw[:, 4:] = 0xC2  # 2, and -4 in the high nibbles
    x = np.zeros((8, 64), np.float32)
    x[np.arange(8), 8 * np.arange(8)] = 127 * 2.0**-7
    weights = decode(raw, gguf.GGMLQuantizationType.NVFP4)
    assert (weights[0x7F, 0], weights[0xFF, 0], weights[1, 8]) == (0, 480, -4 * 2.0**-10)
    got = product(GGMLType.NVFP4, raw, 256, x, planes=planes)
    assert np.array_equal(got, (weights[:, ::8] * x.max()).T)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in FLOATS or HALVES[kind]], ids=lambda kind: kind.name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 7, 8])
def test_a_damaged_weight_reaches_its_row_and_no_other(kind: GGMLType, bad: float, n: int) -> None:
    rng = np.random.default_rng(5)
    rows, cols = 37, 2 * 256
    raw, x = random_weights(kind, rows, cols, rng), exact_activations(n, cols, rng)
    x[:, :] = np.where(x == 0, np.float32(1), x)
    clean = product(kind, raw, rows, x)
    for row in (0, 17, 36):
        hurt = raw.copy()
        if kind in FLOATS:
            one = gguf.quants.quantize(np.array([[bad]], np.float32), gguf.GGMLQuantizationType(int(kind)))
            size = kind.block_bytes
            hurt[row, -size:] = one.view(np.uint8)[0]
        else:
            put_half(hurt[row, -kind.block_bytes :], Type(int(kind)), HALVES[kind][-1], bad)
        got = product(kind, hurt, rows, x)
        others = np.arange(rows) != row
        assert np.array_equal(got[:, others], clean[:, others])
        assert not np.isfinite(got[:, row]).any()
        if np.isnan(bad):
            assert np.isnan(got[:, row]).all()


@every_form
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_damaged_activation_reaches_its_column_and_no_other(kind: GGMLType, planes: int, bad: float) -> None:
    rng = np.random.default_rng(6)
    raw, x = random_weights(kind, 37, 512, rng), exact_activations(15, 512, rng)
    clean = product(kind, raw, 37, x, planes=planes)
    for column in (0, 9, 14):  # in tiles of 8, 4 and 1
        hurt = x.copy()
        hurt[column, 300] = bad
        got = product(kind, raw, 37, hurt, planes=planes)
        others = np.arange(15) != column
        assert np.array_equal(got[others], clean[others])
        if kind in FLOATS:
            damaged = decode(raw, gguf.GGMLQuantizationType(int(kind)))[:, 300] != 0
            assert not np.isfinite(got[column, damaged]).any()
        else:
            assert not np.isfinite(got[column]).any()


@every_form
def test_a_result_does_not_depend_on_the_other_columns_rows_or_threads(kind: GGMLType, planes: int) -> None:
    rng = np.random.default_rng(8)
    cols = 3 * 256 if kind in BLOCKS else 3 * 256 + 5
    raw, x = random_weights(kind, 83, cols, rng), rng.normal(size=(19, cols)).astype(np.float32)
    whole = product(kind, raw, 83, x, planes=planes)
    for t in range(19):
        assert np.array_equal(product(kind, raw, 83, x[t : t + 1], planes=planes), whole[t : t + 1])
    for rows in (1, 4, 16, 33):
        assert np.array_equal(product(kind, raw[:rows], rows, x[:5], planes=planes), whole[:5, :rows])
    for n_threads in (2, 3, 7):
        assert np.array_equal(product(kind, raw, 83, x, planes=planes, n_threads=n_threads), whole)


@every_form
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_table_of_matrices_gives_what_each_gives_alone(kind: GGMLType, planes: int, data: st.DataObject) -> None:
    """Two of three matrices of every entry, fresh or not, with activations of their own or in common."""
    rows = data.draw(st.integers(1, 40), "rows")
    cols = data.draw(st.integers(1, 3), "blocks") * (256 if kind in BLOCKS else 21)
    first, shared = data.draw(st.sampled_from([0, 1]), "first"), data.draw(st.booleans(), "shared")
    counts = data.draw(st.lists(st.sampled_from([1] if shared else [0, 1, 3, 9]), min_size=1, max_size=4), "counts")
    fresh = data.draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)), "fresh")
    n_threads = data.draw(st.integers(1, 3), "n_threads")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    weights = [[random_weights(kind, rows, cols, rng) for _ in range(2)] for _ in counts]
    x = rng.normal(size=(1 if shared else sum(counts), cols)).astype(np.float32)
    firsts = [0, *np.cumsum(counts)][: len(counts)]
    own = [x if shared else x[begin : begin + n] for begin, n in zip(firsts, counts, strict=True)]
    want = [[product(kind, raw, rows, part, planes=planes) for raw in pair] if len(part) else []
            for pair, part in zip(weights, own, strict=True)]  # fmt: skip
    got = products(kind, weights, rows, own, fresh, planes=planes, first=first, shared=shared, n_threads=n_threads)
    for expected, there in zip(want, got, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, there, strict=True))


def test_the_table_of_steps_covers_the_types_that_files_may_have() -> None:
    assert set(STEPS) == {int(kind) for kind in MATRIX_TYPES}
    for kind in BLOCKS:
        fmt = block_format(int(kind))
        assert fmt is not None
        assert (fmt.block_weights, fmt.block_bytes) == (kind.block_size, kind.block_bytes)
    assert all(block_format(int(kind)) is None for kind in FLOATS)
