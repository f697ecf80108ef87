"""Quantizing activations, against the same arithmetic in NumPy, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.compute.kernels.elementwise import activate
from mer.compute.kernels.pack import pack
from tests._lib.steps import F32, Areas, address, run_step

Ints = npt.NDArray[np.int64]
Packed = tuple[Ints, F32, Ints]
FORMS = [(32, 1), (256, 16)]  # (weights, sums) per block
LARGEST = {1: 127, 2: 127 * 128}  # {planes: the largest integer}

every_form = pytest.mark.parametrize(("size", "sums"), FORMS)
every_precision = pytest.mark.parametrize("planes", LARGEST)


def unpacked(packed: npt.NDArray[Any], n: int, n_blocks: int, planes: int) -> npt.NDArray[Any]:
    """Return [n, blocks, planes, ...] of packed column tiles [n * blocks * planes, ...]."""
    out = np.zeros((n, n_blocks, planes, *packed.shape[1:]), packed.dtype)
    first = 0
    while first < n:
        width = next(w for w in (8, 4, 2, 1) if w <= n - first)
        tile = packed[first * n_blocks * planes : (first + width) * n_blocks * planes]
        tile = tile.reshape(n_blocks, planes, width, *packed.shape[1:])
        out[first : first + width] = np.moveaxis(tile, 2, 0)
        first += width
    return out


def packed(x: F32, size: int, sums: int, planes: int, *, index: list[int] | None = None, n_threads: int = 1) -> Packed:
    """Return the integers [n, blocks, size], scales [n, blocks] and sums [n, blocks, sums] of rows x, or x[index]."""
    areas = Areas()
    n, n_blocks = len(x) if index is None else len(index), x.shape[1] // size
    q = areas.room(planes * n * n_blocks * size).view(np.int8).reshape(-1, size)
    scales, partial = areas.floats(n * n_blocks), areas.ints(planes * n * n_blocks, sums)
    rows = 0 if index is None else areas.put(np.array(index, np.int32))
    run_step(
        pack, areas.put_entries([(n, 0, 0)]), 1, areas.put_rows(x), 4 * (-(-x.shape[1] // 16) * 16), rows, 0, 0,
        n_blocks, size, sums, address(q), address(scales), address(partial), planes, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    weights = np.array([1] if planes == 1 else [128, 1])[:, None]
    integers, totals = (unpacked(part, n, n_blocks, planes) for part in (q, partial))
    real = np.isfinite(unpacked(scales, n, n_blocks, 1)[:, :, 0])  # what a damaged block holds means nothing
    want = integers.reshape(*integers.shape[:3], sums, -1).sum(-1, dtype=np.int64)
    assert np.array_equal(totals[real], want[real])
    joined = (integers * weights).sum(2), (totals * weights).sum(2)
    return joined[0], unpacked(scales, n, n_blocks, 1)[:, :, 0], joined[1]


def check(x: F32, size: int, sums: int, planes: int, *, index: list[int] | None = None, n_threads: int = 1) -> None:
    q, scales, _ = packed(x, size, sums, planes, index=index, n_threads=n_threads)
    rows = x if index is None else x[index]
    blocks = rows.reshape(len(rows), -1, size)
    want = np.abs(blocks).max(-1) / np.float32(LARGEST[planes])
    inverse = np.zeros_like(want)
    np.divide(np.float32(1), want, out=inverse, where=want >= 2.0**-126)
    assert np.array_equal(scales, want)
    assert np.array_equal(q, np.rint(blocks * inverse[..., None]).astype(np.int64))


@every_precision
@every_form
def test_every_number_of_columns(size: int, sums: int, planes: int) -> None:
    rng = np.random.default_rng(1)
    for n in range(1, 20):
        check(rng.normal(size=(n, 3 * size)).astype(np.float32), size, sums, planes)


@every_precision
@settings(max_examples=30, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    blocks=hnp.arrays(np.float32, (3, 256), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
    n_threads=st.integers(1, 5),
)
@example(form=(32, 1), blocks=np.zeros((3, 256), np.float32), n_threads=1)
@example(form=(256, 16), blocks=np.full((3, 256), np.finfo(np.float32).max, np.float32), n_threads=1)
@example(form=(32, 1), blocks=np.full((3, 256), 1e-45, np.float32), n_threads=1)
@example(form=(32, 1), blocks=np.full((3, 256), 127 * 2.0**-126, np.float32), n_threads=1)
def test_any_finite_numbers(form: tuple[int, int], blocks: F32, n_threads: int, planes: int) -> None:
    check(blocks, *form, planes, n_threads=n_threads)


@every_form
def test_ties_go_to_the_even_integer(size: int, sums: int) -> None:
    x = np.zeros((1, size), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5]
    q, scales, partial = packed(x, size, sums, 1)
    assert scales[0, 0] == 1
    assert q[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, 126, -126]
    assert partial[0, 0, 0] == 127 + 0 + 2 + 2 + 0 - 2 + 126 - 126


def test_every_integer_of_two_planes() -> None:
    integers = np.arange(-127 * 128, 127 * 128 + 1)
    x = np.zeros((len(integers), 32), np.float32)
    x[:, 0] = 127 * 128  # makes the scale 1
    x[:, 9] = integers
    q, scales, _ = packed(x, 32, 1, 2)
    assert (scales == 1).all()
    assert np.array_equal(q[:, 0, 9], integers)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_precision
@every_form
def test_what_is_not_finite_marks_the_scale_of_its_block_alone(size: int, sums: int, planes: int, bad: float) -> None:
    x = np.random.default_rng(2).normal(size=(11, 3 * size)).astype(np.float32)
    blocks = np.ones((11, 3), bool)
    clean = packed(x, size, sums, planes)
    x[9, size + 5] = bad
    blocks[9, 1] = False
    q, scales, _ = packed(x, size, sums, planes)
    assert np.array_equal(q[blocks], clean[0][blocks])
    assert np.array_equal(scales[blocks], clean[1][blocks])
    assert not np.isfinite(scales[9, 1])


@pytest.mark.parametrize("n_threads", [1, 2, 3, 50])
@every_precision
def test_chosen_rows(planes: int, n_threads: int) -> None:
    x = np.random.default_rng(3).normal(size=(7, 512)).astype(np.float32)
    for size, sums in FORMS:
        check(x, size, sums, planes, index=[6, 0, 0, 3, 5, 1, 2, 6, 6, 4, 1], n_threads=n_threads)


@pytest.mark.parametrize(("n_threads", "numbers"), [(1, None), (3, None), (3, (1.702, 0.1, 1.5, 1.0))])
@every_precision
@every_form
def test_entries_are_packed_each_for_itself_in_rows_of_their_own(
    size: int, sums: int, planes: int, n_threads: int, numbers: tuple[float, ...] | None
) -> None:
    """With `up`, what is packed is the activation of x and up, and x holds it."""
    rng = np.random.default_rng(4)
    n_blocks, stride = 2, 4 * 2 * size
    gate, up = rng.normal(size=(2, 12, 2 * size)).astype(np.float32)
    areas = Areas()
    both = areas.floats(24, 2 * size)
    both[:12], both[12:] = gate, up
    activated = areas.floats(12, 2 * size)
    activated[:] = gate
    by = 0 if numbers is None else areas.put(np.array(numbers, np.float32))
    run_step(activate, areas.put_entries([(12, 0, 0)]), 1, address(activated), areas.put(up), stride, by)
    widths = (planes * size, 4, 4 * planes * sums)  # bytes of a block's values, scale and sums
    room = [areas.room(width * 12 * n_blocks) for width in widths]
    entries = [(3, 9, 0), (0, 4, 0), (5, 2, 3)]
    run_step(
        pack, areas.put_entries(entries), 3, address(both), stride, 0, 12 * stride, by, n_blocks, size,
        sums, *map(address, room), planes, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    rows = [part.reshape(12, n_blocks * width) for part, width in zip(room, widths, strict=True)]
    assert all((part[[0, 1, 7, 8]] == 0xFF).all() for part in rows)
    for n, first, _ in entries:
        alone = Areas()
        want = [alone.room(width * n * n_blocks) for width in widths]
        run_step(
            pack, alone.put_entries([(n, 0, 0)]), 1, alone.put(activated[first : first + n]), stride, 0, 0, 0,
            n_blocks, size, sums, *map(address, want), planes,
        )  # fmt: skip
        for part, expected in zip(rows, want, strict=True):
            assert np.array_equal(part[first : first + n].ravel(), expected)
    assert np.array_equal(both[2:7], activated[2:7])
    assert np.array_equal(both[:2], gate[:2])


def test_rows_of_an_entry_are_chosen_by_its_pairs() -> None:
    x = np.random.default_rng(5).normal(size=(4, 64)).astype(np.float32)
    index = [3, 1, 2, 0, 0]
    areas = Areas()
    q, scales, partial = areas.room(5 * 64), areas.floats(5, 2), areas.ints(5, 2)
    run_step(
        pack, areas.put_entries([(1, 4, 2), (2, 0, 3)]), 2, areas.put(x), 256, areas.put(np.array(index, np.int32)), 0,
        0, 2, 32, 1, address(q), address(scales), address(partial), 1,
    )  # fmt: skip
    areas.check()
    largest = np.abs(x.reshape(4, 2, 32)).max(-1) / np.float32(127)
    assert np.array_equal(scales[4], largest[2])
    assert np.array_equal(scales[:2].T, largest[[0, 0]])  # a tile of two columns, block by block
    assert np.isnan(scales[2:4]).all()
