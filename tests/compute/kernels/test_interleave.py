"""16-row tiles: nothing is lost, and every unit lies where the products look for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.compute.cpu.matrix import raw_bytes
from mer.compute.kernels.entry import RAW_INNER, flags
from mer.compute.kernels.interleave import FIELDS, rows_of_tiles
from mer.compute.kernels.matmul import INTERLEAVE_STEPS, matmul_step
from mer.io.ggml import GGMLType
from tests._lib.steps import CANARY, U8, Areas, address, run_step

KINDS = [GGMLType(kind) for kind in FIELDS]


def tiled(kind: GGMLType, raw: U8, n_threads: int = 1) -> U8:
    """Return the tiles [n_tiles, 16 * row bytes] of a matrix's bytes [rows, row bytes]."""
    rows, row_bytes = raw.shape
    areas = Areas()
    n_tiles = -(-rows // 16)
    target, scratch = areas.room(n_tiles * 16 * row_bytes, shift=5), areas.room(n_threads * 16 * row_bytes, shift=3)
    run_step(
        INTERLEAVE_STEPS[int(kind)], areas.put(raw, shift=1), address(target), rows, row_bytes // kind.block_bytes,
        kind.block_bytes, address(scratch), n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    return target.reshape(n_tiles, -1).copy()


def tiled_in_place(kind: GGMLType, raw: U8, n_threads: int, chunk: int) -> U8:
    """Return the same by a product with a raw matrix and no activations, which arranges it where it lies."""
    rows, row_bytes = raw.shape
    areas = Areas()
    n_tiles, n_blocks = -(-rows // 16), row_bytes // kind.block_bytes
    there = areas.room(n_tiles * 16 * row_bytes, shift=5)
    there[: raw.size] = raw.reshape(-1)
    there[raw.size :] = 0xEE
    thread_bytes = raw_bytes(kind, n_blocks * kind.block_size) + 192  # room for a larger matrix of another step
    scratch = areas.room(n_threads * thread_bytes)
    entry = areas.put(np.array([0, address(there), 0, 0, 0, 0, RAW_INNER, 0], np.int64))
    run_step(
        matmul_step(int(kind), 1), entry, 1, flags(first=1), chunk, rows, n_blocks, kind.block_bytes, kind.block_size,
        1, 0, 0, 0, 0, 0, 0, address(scratch), thread_bytes, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    assert (scratch[: (n_threads - 1) * thread_bytes] == CANARY).all(), "the last thread, which comes first, did it all"
    assert (scratch[-192:] == CANARY).all()
    return there.reshape(n_tiles, -1).copy()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 70), n_blocks=st.integers(1, 4), n_threads=st.integers(1, 4), chunk=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_rows_come_back_exactly(
    kind: GGMLType, rows: int, n_blocks: int, n_threads: int, chunk: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, n_blocks * kind.block_bytes), np.uint8)
    tiles = tiled(kind, raw, n_threads)
    assert np.array_equal(tiles, tiled_in_place(kind, raw, n_threads, chunk))
    assert np.array_equal(rows_of_tiles(int(kind), tiles, kind.block_bytes, np.arange(rows)), raw)
    some = rng.integers(0, rows, 9)
    assert np.array_equal(rows_of_tiles(int(kind), tiles, kind.block_bytes, some), raw[some])
    for missing in range(rows, 16 * len(tiles)):
        assert not rows_of_tiles(int(kind), tiles, kind.block_bytes, np.array([missing])).any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_byte_at_every_place_of_a_block_comes_back(kind: GGMLType) -> None:
    raw = np.arange(256, dtype=np.uint8)[:, None] + 7 * np.arange(2 * kind.block_bytes, dtype=np.uint8)
    tiles = tiled_in_place(kind, raw, 3, 2)
    assert np.array_equal(rows_of_tiles(int(kind), tiles, kind.block_bytes, np.arange(256)), raw)
    assert np.array_equal(tiles, tiled(kind, raw))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_fields_of_a_block_cover_it_once(kind: GGMLType) -> None:
    covered = np.zeros(kind.block_bytes, int)
    for offset, unit, count, _ in FIELDS[int(kind)]:
        covered[offset : offset + unit * count] += 1
    assert (covered == 1).all()


def test_where_a_q8_0_block_lies() -> None:
    raw = np.zeros((16, 34), np.uint8)
    raw[3] = np.arange(34)
    tile = tiled(GGMLType.Q8_0, raw)[0]
    assert tile[2 * 3 : 2 * 3 + 2].tolist() == [0, 1]  # row 3's scale
    for j in range(8):
        start = 32 + 64 * j + 4 * 3
        assert (tile[start : start + 4] ^ 0x80).tolist() == list(range(2 + 4 * j, 6 + 4 * j))
