"""RoPE, the KV cache and attention over several blocks, against the reference."""

from __future__ import annotations

import itertools

import attrs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mer.compute import reference
from mer.compute.kernels.attention import KV_TILE, attention, rope_store
from mer.model.spec import RopeStyle
from tests._lib.steps import F32, Areas, address, run_step

BASE = 500.0
EPS = 1e-5


@attrs.frozen(kw_only=True)
class Shape:
    """A layer's attention; letters as in ModelSpec."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    style: RopeStyle
    norms: bool = False

    @property
    def padded(self) -> int:
        """Floats of a head in memory."""
        return -(-self.head_dim // 16) * 16


@attrs.frozen(eq=False)
class Sequence:
    """Raw Q [T, H, C], K and V [T, G, C] of one sequence, and its KV blocks."""

    q: F32
    k: F32
    v: F32
    table: list[int]

    @classmethod
    def random(cls, shape: Shape, length: int, table: list[int], rng: np.random.Generator) -> Sequence:
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        q, k, v = (rng.normal(size=(length, n, shape.head_dim)).astype(np.float32) for n in heads)
        return cls(q, k, v, table)


class Layer:
    """A layer's KV cache of `n_blocks` blocks, in whose unwritten positions there is NaN, and the steps on it."""

    def __init__(self, shape: Shape, n_blocks: int, blocks_per_sequence: int, norms: F32 | None = None) -> None:
        self.shape = shape
        self.areas = Areas()
        self.max_blocks = blocks_per_sequence
        self.kv = self.areas.floats(n_blocks, 2, shape.kv_heads, KV_TILE, shape.padded)
        self.kv[..., shape.head_dim :] = 0
        self.norms = [0, 0] if norms is None else [self.areas.put_rows(row[None]) for row in norms]

    def run(self, parts: list[tuple[Sequence, int, int]], n_threads: int = 1) -> list[npt.NDArray[np.float32]]:
        """Attend with rows start..end of each sequence, together, and return [T, H, C] of each."""
        shape, areas = self.shape, Areas()
        q, k, v = (
            np.concatenate([getattr(s, name)[start:end] for s, start, end in parts]).reshape(-1, heads * shape.head_dim)
            for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
        )
        n = len(q)
        positions = np.concatenate([np.arange(start, end) for _, start, end in parts]).astype(np.int32)
        sequences = np.concatenate([np.full(end - start, i) for i, (_, start, end) in enumerate(parts)])
        table = np.full((len(parts), self.max_blocks), 2**30, np.int32)  # a block that is not there
        for row, (s, _, _) in zip(table, parts, strict=True):
            row[: len(s.table)] = s.table
        angle = positions[:, None] * BASE ** (-2.0 * np.arange(shape.rope_dim // 2) / shape.rope_dim)
        angles = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        placed = areas.floats(n, shape.heads, shape.padded)
        placed[:] = 0
        heads = shape.heads << 32 | shape.kv_heads
        pair = 1 if shape.style is RopeStyle.INTERLEAVED else shape.rope_dim // 2
        strides = [4 * (-(-a.shape[1] // 16) * 16) for a in (q, k)]
        block_bytes = self.kv[0].nbytes
        where = (areas.put(positions), areas.put(sequences.astype(np.int32)), areas.put(table), self.max_blocks)
        constants = areas.put(np.array([EPS, shape.head_dim**-0.5], np.float32))
        run_step(
            rope_store, *map(areas.put_rows, (q, k, v)), *strides, address(placed), n, heads, shape.head_dim,
            shape.rope_dim << 32 | pair, areas.put(angles), *self.norms, constants, address(self.kv), block_bytes,
            *where, n_threads=n_threads,
        )  # fmt: skip
        out = areas.floats(n, strides[0] // 4)
        scratch_stride = 4 * (KV_TILE + shape.padded)
        scratch = areas.room(n_threads * scratch_stride)
        run_step(
            attention, address(placed), n, heads, shape.head_dim, constants + 4, address(self.kv), block_bytes, *where,
            address(out), strides[0], address(scratch), scratch_stride, n_threads=n_threads,
        )  # fmt: skip
        areas.check()
        self.areas.check()
        width = shape.heads * shape.head_dim
        assert np.isnan(out[:, width:]).all()
        ends = np.cumsum([end - start for _, start, end in parts])[:-1]
        return np.split(out[:, :width].reshape(n, shape.heads, shape.head_dim).copy(), ends)


def expected(shape: Shape, sequence: Sequence, norms: F32 | None = None) -> npt.NDArray[np.float64]:
    """Return the reference's [T, H, C] of the whole sequence."""
    q, k = (a.astype(np.float64) for a in (sequence.q, sequence.k))
    if norms is not None:
        q, k = reference.rms_norm(q, norms[0], EPS), reference.rms_norm(k, norms[1], EPS)
    q, k = (
        reference.rope(a, np.arange(len(a)), dim=shape.rope_dim, base=BASE, scale=1.0, style=shape.style)
        for a in (q, k)
    )
    return reference.attention(q, k, sequence.v.astype(np.float64))


def close(got: F32, want: npt.NDArray[np.float64]) -> bool:
    """Scores are a few units, so e**score is off by some 1e-6 of itself, and the mean of V likewise."""
    return bool((np.abs(got - want) <= 1e-5 * np.abs(want).max()).all())


shapes = st.builds(
    lambda kv, group, half, rope, style, norms: Shape(
        heads=kv * group, kv_heads=kv, head_dim=2 * half, rope_dim=2 * min(rope, half), style=style, norms=norms
    ),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(RopeStyle),
    st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(shape=shapes, length=st.sampled_from([1, 2, 63, 64, 65, 129, 200]), n_threads=st.integers(1, 4), data=st.data())
def test_any_layer_in_two_chunks(shape: Shape, length: int, n_threads: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    cut = data.draw(st.integers(0, length - 1), "cut")
    norms = (1 + 0.2 * rng.normal(size=(2, shape.head_dim))).astype(np.float32) if shape.norms else None
    sequence = Sequence.random(shape, length, [int(b) for b in rng.permutation(5)[:4]], rng)
    layer = Layer(shape, 5, 4, norms)
    first = layer.run([(sequence, 0, cut)], n_threads)[0] if cut else np.zeros((0, shape.heads, shape.head_dim))
    got = np.concatenate([first, *layer.run([(sequence, cut, length)], n_threads)])
    assert close(got, expected(shape, sequence, norms))


@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(24, 24), (24, 10), (32, 32), (6, 4), (80, 72)])
def test_keys_and_values_lie_where_the_table_says(style: RopeStyle, head_dim: int, rope_dim: int) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=head_dim, rope_dim=rope_dim, style=style)
    rng = np.random.default_rng(3)
    sequence = Sequence.random(shape, 70, [3, 1], rng)
    layer = Layer(shape, 4, 2)
    layer.run([(sequence, 0, 70)])
    keys = reference.rope(sequence.k.astype(np.float64), np.arange(70), dim=rope_dim, base=BASE, scale=1.0, style=style)
    for position in range(70):
        block, row = (3, 1)[position // 64], position % 64
        assert np.allclose(layer.kv[block, 0, :, row, :head_dim], keys[position], atol=1e-5)
        assert np.array_equal(layer.kv[block, 1, :, row, :head_dim], sequence.v[position])
    assert np.isnan(layer.kv[[0, 2], ..., :head_dim]).all()
    assert np.isnan(layer.kv[1, :, :, 6:, :head_dim]).all()
    assert (layer.kv[..., head_dim:] == 0).all()


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 139), max_size=4),
    n_threads=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
@example(lengths=[65, 64, 63], cuts=[63, 64], n_threads=2, seed=0)
def test_chunks_neighbours_blocks_and_threads_change_no_bit(
    lengths: list[int], cuts: list[int], n_threads: int, seed: int
) -> None:
    shape = Shape(heads=6, kv_heads=2, head_dim=20, rope_dim=20, style=RopeStyle.NEOX)
    rng = np.random.default_rng(seed)
    tables = rng.permutation(9).reshape(3, 3).tolist()
    sequences = [Sequence.random(shape, n, table, rng) for n, table in zip(lengths, tables, strict=False)]
    alone = []
    for s in sequences:
        one = Layer(shape, 3, 3)
        alone.append(one.run([(attrs.evolve(s, table=[0, 1, 2]), 0, len(s.q))])[0])
    layer = Layer(shape, 9, 3)
    rows: list[list[F32]] = [[] for _ in sequences]
    edges = sorted({0, max(lengths), *(cut for cut in cuts if cut < max(lengths))})
    for start, end in itertools.pairwise(edges):
        here = [i for i, s in enumerate(sequences) if len(s.q) > start]
        parts = layer.run([(sequences[i], start, min(end, len(sequences[i].q))) for i in here], n_threads)
        for i, part in zip(here, parts, strict=True):
            rows[i].append(part)
    for got, want in zip(rows, alone, strict=True):
        assert np.array_equal(np.concatenate(got), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_sequence_damages_no_other(bad: float) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=16, rope_dim=16, style=RopeStyle.NEOX)
    rng = np.random.default_rng(5)
    one, two = (Sequence.random(shape, 70, table, rng) for table in ([0, 1], [2, 3]))
    want = Layer(shape, 4, 2).run([(one, 0, 70), (two, 0, 70)])
    two.k[10, 0, 3] = bad
    got = Layer(shape, 4, 2).run([(one, 0, 70), (two, 0, 70)])
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1][:10], want[1][:10])
    assert np.array_equal(got[1][:, 2:], want[1][:, 2:])  # heads of the other kv head
    if np.isnan(bad):  # a score of minus infinity only leaves its position out
        assert np.isnan(got[1][10:, :2]).all()


def test_scores_far_apart_give_the_value_of_the_best_position() -> None:
    """Also where the best position is in a later block, so that what came before is scaled away."""
    shape = Shape(heads=1, kv_heads=1, head_dim=16, rope_dim=2, style=RopeStyle.NEOX)
    rng = np.random.default_rng(6)
    for best in (5, 100):
        s = Sequence.random(shape, 130, [2, 0, 1], rng)
        s.q[:], s.k[:] = 0, 0
        s.q[..., 7], s.k[:, 0, 7] = 4, -1000
        s.k[best, 0, 7] = 1000
        got = Layer(shape, 3, 3).run([(s, 0, 130)])[0]
        assert np.allclose(got[best:, 0], s.v[best, 0], atol=1e-6)
