"""16-row tiles: nothing is lost, and every unit lies where the products look for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.compute.kernels.interleave import FIELDS, field_table, interleave, rows_of_tiles
from mer.io.ggml import GGMLType
from tests._lib.steps import U8, Areas, address, run_step

KINDS = [GGMLType(kind) for kind in FIELDS]


def tiled(kind: GGMLType, raw: U8, *, in_place: bool, n_threads: int = 1) -> U8:
    """Return the tiles [n_tiles, 16 * row bytes] of a matrix's bytes [rows, row bytes]."""
    rows, row_bytes = raw.shape
    areas = Areas()
    n_tiles = -(-rows // 16)
    table, scratch = field_table(int(kind)), areas.room(n_threads * 16 * row_bytes)
    target = areas.room(n_tiles * 16 * row_bytes, shift=5)
    target[: raw.size] = raw.reshape(-1) if in_place else 0xEE
    source = address(target) if in_place else areas.put(raw, shift=1)
    run_step(
        interleave, source, address(target), rows, row_bytes // kind.block_bytes, kind.block_bytes, address(table),
        len(table), address(scratch), 16 * row_bytes, n_threads=n_threads,
    )  # fmt: skip
    areas.check()
    return target.reshape(n_tiles, -1).copy()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 70), n_blocks=st.integers(1, 4), n_threads=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_rows_come_back_exactly(kind: GGMLType, rows: int, n_blocks: int, n_threads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, n_blocks * kind.block_bytes), np.uint8)
    tiles = tiled(kind, raw, in_place=False)
    assert np.array_equal(tiles, tiled(kind, raw, in_place=True, n_threads=n_threads))
    assert np.array_equal(rows_of_tiles(int(kind), tiles, kind.block_bytes, np.arange(rows)), raw)
    some = rng.integers(0, rows, 9)
    assert np.array_equal(rows_of_tiles(int(kind), tiles, kind.block_bytes, some), raw[some])
    for missing in range(rows, 16 * len(tiles)):
        assert not rows_of_tiles(int(kind), tiles, kind.block_bytes, np.array([missing])).any()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_fields_of_a_block_cover_it_once(kind: GGMLType) -> None:
    covered = np.zeros(kind.block_bytes, int)
    for offset, unit, count, _ in FIELDS[int(kind)]:
        covered[offset : offset + unit * count] += 1
    assert (covered == 1).all()


def test_where_a_q8_0_block_lies() -> None:
    raw = np.zeros((16, 34), np.uint8)
    raw[3] = np.arange(34)
    tile = tiled(GGMLType.Q8_0, raw, in_place=False)[0]
    assert tile[2 * 3 : 2 * 3 + 2].tolist() == [0, 1]  # row 3's scale
    for j in range(8):
        start = 32 + 64 * j + 4 * 3
        assert (tile[start : start + 4] ^ 0x80).tolist() == list(range(2 + 4 * j, 6 + 4 * j))
