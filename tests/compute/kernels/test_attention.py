"""RoPE, the KV cache in every type and attention over several blocks, against the reference."""

from __future__ import annotations

import itertools

import attrs
import gguf
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mer.compute.kernels.attention import ATTENTION, SPAN, split_bytes, split_tokens, thread_bytes
from mer.compute.kernels.kv_layout import F16_KIND, F32_KIND, KV_TILE, Q8_0_KIND, tile_bytes
from mer.compute.kernels.rope import ROPE_STORE
from mer.compute.reference.blocks.attention import attention, pair_turns, round_kv
from mer.compute.reference.blocks.attention import rotated as rotate
from mer.compute.reference.blocks.norm import rms_norm
from mer.config import KVType
from mer.model.operators import Rope, RopeStyle
from tests._lib.steps import F32, Areas, address, run_step

BASE = 500.0
EPS = 1e-5
KINDS = [F32_KIND, F16_KIND, Q8_0_KIND]
NAMES: dict[int, KVType] = {F32_KIND: "f32", F16_KIND: "f16", Q8_0_KIND: "q8_0"}


F64 = npt.NDArray[np.float64]


@attrs.frozen(kw_only=True)
class Shape:
    """A layer's attention; letters as in ModelSpec."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    style: RopeStyle
    norms: bool = False
    norms_last: bool = False  # after RoPE
    kind: int = F32_KIND
    window: int = 0
    sinks: bool = False

    @property
    def padded(self) -> int:
        """Values of a head in the KV cache."""
        return -(-self.head_dim // 32) * 32

    @property
    def tile(self) -> int:
        """Bytes of a tile."""
        return tile_bytes(self.kind, self.head_dim)


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
    """A layer's KV cache of `n_blocks` blocks, in whose unwritten positions there is NaN, and the steps on it.

    Bytes 0xFF are NaN in every type but Q8_0's int8, whose scales are NaN.
    """

    def __init__(self, shape: Shape, n_blocks: int, blocks_per_sequence: int, norms: F32 | None = None) -> None:
        self.shape = shape
        self.areas = Areas()
        self.max_blocks = blocks_per_sequence
        size = n_blocks * 2 * shape.kv_heads * shape.tile
        self.kv = self.areas.room(size).reshape(n_blocks, 2, shape.kv_heads, shape.tile)
        self.norms = [0, 0] if norms is None else [self.areas.put_rows(row[None]) for row in norms]

    def run(
        self, parts: list[tuple[Sequence, int, int]], n_threads: int = 1, split: int | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Attend with rows start..end of each sequence, together, and return [T, H, C] of each.

        Of a batch of up to `split` rows spans are given out one by one; by default as a worker does.
        """
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
        placed = areas.floats(n, shape.heads, -(-shape.head_dim // 16) * 16)
        heads = shape.heads << 32 | shape.kv_heads
        pair = 1 if shape.style is RopeStyle.INTERLEAVED else shape.rope_dim // 2
        strides = [4 * (-(-a.shape[1] // 16) * 16) for a in (q, k)]
        block_bytes = self.kv[0].nbytes
        where = (areas.put(positions), areas.put(sequences.astype(np.int32)), areas.put(table), self.max_blocks)
        constants = areas.put(np.array([EPS, shape.head_dim**-0.5], np.float32))
        run_step(
            ROPE_STORE[shape.kind], *map(areas.put_rows, (q, k, v)), *strides, address(placed), n, heads,
            shape.head_dim, shape.rope_dim << 32 | pair, areas.put(angles), *self.norms, constants,
            address(self.kv), block_bytes, *where, int(shape.norms_last), n_threads=n_threads,
        )  # fmt: skip
        out = self._attend(areas, placed, where, constants + 4, n_threads, split)
        ends = np.cumsum([end - start for _, start, end in parts])[:-1]
        return np.split(out, ends)

    def attend_only(self, sequence: Sequence, position: int) -> F32:
        """Return the results [1, H, C] of a sequence's one row, unrotated, over what the cache holds."""
        shape, areas = self.shape, Areas()
        placed = areas.floats(1, shape.heads, -(-shape.head_dim // 16) * 16)
        placed[..., : shape.head_dim] = sequence.q
        table = np.array([sequence.table], np.int32)
        where = (areas.put(np.array([position], np.int32)), areas.put(np.zeros(1, np.int32)), areas.put(table), 4)
        scale = areas.put(np.array([shape.head_dim**-0.5], np.float32))
        return self._attend(areas, placed, where, scale, 2, None)

    def _attend(
        self, areas: Areas, q: F32, where: tuple[int, ...], scale: int, n_threads: int, split: int | None
    ) -> F32:
        """Run the attention step on placed queries q [T, H, padded] and return [T, H, C]."""
        shape, n = self.shape, len(q)
        width = shape.heads * shape.head_dim
        out_stride = 4 * (-(-width // 16) * 16)
        out = areas.floats(n, out_stride // 4)
        scratch_stride = thread_bytes(shape.heads, shape.kv_heads, shape.head_dim)
        scratch = areas.room(n_threads * scratch_stride)
        split = split_tokens(n_threads, shape.kv_heads, n) if split is None else split
        states = areas.room(split_bytes(split, shape.heads, shape.kv_heads, shape.head_dim, self.max_blocks))
        states[: 4 * split * shape.kv_heads] = 0
        for _ in range(2):  # the second time finds the counters as the first has left them
            out[:] = np.nan
            run_step(
                ATTENTION[shape.kind], address(q), n, shape.heads << 32 | shape.kv_heads, shape.head_dim, scale,
                address(self.kv), self.kv[0].nbytes, *where, address(out), out_stride, address(scratch), scratch_stride,
                shape.window, split, address(states), areas.put(sinks_of(shape)) if shape.sinks else 0,
                n_threads=n_threads,
            )  # fmt: skip
        areas.check()
        self.areas.check()
        assert np.isnan(out[:, width:]).all()
        return out[:, :width].reshape(n, shape.heads, shape.head_dim).copy()


def sinks_of(shape: Shape) -> F32:
    """Return a sink for each head: some that take nearly everything, some next to nothing."""
    return (2 + 5 * np.random.default_rng(9).normal(size=shape.heads)).astype(np.float32)


def attended(shape: Shape, q: F64, keys: F64, values: F64) -> F64:
    """Return the reference's attention of a layer."""
    return attention(q, keys, values, shape.window or None, sinks=sinks_of(shape) if shape.sinks else None)


def rotated(shape: Shape, sequence: Sequence, norms: F32 | None = None) -> tuple[F64, F64]:
    """Return the reference's Q [T, H, C] and K [T, G, C], normalized and rotated."""
    q, k = (a.astype(np.float64) for a in (sequence.q, sequence.k))
    turns = pair_turns(Rope(shape.rope_dim, BASE, 1.0, shape.style))
    for last in (False, True):
        if norms is not None and last == shape.norms_last:
            q, k = rms_norm(q, norms[0], EPS), rms_norm(k, norms[1], EPS)
        if not last:
            q, k = (rotate(a, np.arange(len(a)), turns, shape.style) for a in (q, k))
    return q, k


def cached(layer: Layer, table: list[int], length: int) -> tuple[F64, F64]:
    """Return the keys and the values [S, G, C] that a sequence's blocks hold."""
    shape = layer.shape
    out = []
    for part in range(2):
        tiles = layer.kv[table, part]  # [blocks, G, bytes]
        if shape.kind == Q8_0_KIND:
            ends = KV_TILE * shape.padded
            scales = tiles[..., ends:].view(np.float16).astype(np.float64)
            scales = scales.reshape(*tiles.shape[:2], -1, KV_TILE).swapaxes(-1, -2)  # [blocks, G, 64, C / 32]
            numbers = tiles[..., :ends].view(np.int8).astype(np.float64)
            pairs = 2  # of elements in K, of positions in V
        else:
            scales = np.ones((1, 1, 1, 1))
            numbers = tiles.view(np.float32 if shape.kind == F32_KIND else np.float16).astype(np.float64)
            pairs = 1
        where = tiles.shape[:2]
        if part == 0:  # [2, C / pairs, 32, pairs]
            numbers = numbers[..., : KV_TILE * shape.head_dim].reshape(*where, 2, -1, 32, pairs)
            numbers = numbers.transpose(0, 1, 2, 4, 3, 5).reshape(*where, KV_TILE, shape.head_dim)
        else:  # [P / 32, 64 / pairs, 32, pairs]
            numbers = numbers.reshape(*where, -1, KV_TILE // pairs, 32, pairs)
            numbers = numbers.transpose(0, 1, 3, 5, 2, 4).reshape(*where, KV_TILE, shape.padded)
        numbers = numbers[..., : shape.head_dim]
        values = numbers * np.repeat(scales, 32 if shape.kind == Q8_0_KIND else shape.head_dim, axis=-1)
        values = values.swapaxes(1, 2).reshape(-1, shape.kv_heads, shape.head_dim)
        out.append(values[:length])
    return out[0], out[1]


def close(got: F32, want: F64, kind: int = F32_KIND) -> bool:
    """Scores are a few units, so e**score is off by some 1e-6 of itself, and the mean of V likewise.

    What meets Q8_0 is rounded to 2**-16 of its largest: a query that is 3 at most, and so a score, by some 2e-5.
    """
    near = 1e-4 if kind == Q8_0_KIND else 1e-5
    return bool((np.abs(got - want) <= near * np.abs(want).max()).all())


shapes = st.builds(
    lambda kv, group, half, rope, style, norms, norms_last, kind, window, sinks: Shape(
        heads=kv * group,
        kv_heads=kv,
        head_dim=32 * (1 + half % 2) if kind == Q8_0_KIND else 2 * half,
        rope_dim=2 * min(rope, half),
        style=style,
        norms=norms,
        norms_last=norms_last,
        kind=kind,
        window=window,
        sinks=sinks,
    ),
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 6, 8, 9, 15]),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(RopeStyle),
    st.booleans(),
    st.booleans(),
    st.sampled_from(KINDS),
    st.sampled_from([0, 0, 1, 7, 63, 64, 65, 100, 129, 1000]),
    st.booleans(),
)
LENGTHS = [1, 2, 63, 64, 65, 129, 200, SPAN + 1, 2 * SPAN + 70]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(shape=shapes, length=st.sampled_from(LENGTHS), n_threads=st.integers(1, 4), data=st.data())
def test_any_layer_in_two_chunks(shape: Shape, length: int, n_threads: int, data: st.DataObject) -> None:
    """What is kept is the rounded K and V, and attention is the reference's on exactly what is kept."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    cut = data.draw(st.one_of(st.integers(0, length - 1), st.just(length - 1)), "cut")
    norms = (1 + 0.2 * rng.normal(size=(2, shape.head_dim))).astype(np.float32) if shape.norms else None
    n_blocks = -(-length // KV_TILE)
    sequence = Sequence.random(shape, length, [int(b) for b in rng.permutation(n_blocks + 1)[:n_blocks]], rng)
    layer = Layer(shape, n_blocks + 1, n_blocks + 1, norms)
    first = layer.run([(sequence, 0, cut)], n_threads)[0] if cut else np.zeros((0, shape.heads, shape.head_dim))
    got = np.concatenate([first, *layer.run([(sequence, cut, length)], n_threads)])
    q, k = rotated(shape, sequence, norms)
    keys, values = cached(layer, sequence.table, length)
    assert np.array_equal(values, round_kv(sequence.v.astype(np.float64), NAMES[shape.kind]))
    near = {F32_KIND: 3e-6, F16_KIND: 2.0**-10, Q8_0_KIND: 1 / 127}[shape.kind]  # a rounding may go the other way
    assert (np.abs(keys - round_kv(k, NAMES[shape.kind])) <= near * (1 + np.abs(k).max())).all()
    assert close(got, attended(shape, q, keys, values), shape.kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 9])
def test_rows_go_together_in_any_numbers(group: int, head_dim: int, kind: int) -> None:
    """Several tokens that see a whole tile go 8, 4, 2 or 1 rows at a time, then one by one through the last tile."""
    shape = Shape(heads=group, kv_heads=1, head_dim=head_dim, rope_dim=8, style=RopeStyle.NEOX, kind=kind)
    sequence = Sequence.random(shape, 150, [2, 0, 1], np.random.default_rng(group))
    layer = Layer(shape, 3, 3)
    got = layer.run([(sequence, 0, 150)])[0]
    keys, values = cached(layer, sequence.table, 150)
    assert close(got, attention(rotated(shape, sequence)[0], keys, values), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("style", RopeStyle)
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(32, 32), (64, 10), (24, 24), (6, 4), (80, 72)])
def test_keys_and_values_lie_where_the_table_says(style: RopeStyle, head_dim: int, rope_dim: int, kind: int) -> None:
    if kind == Q8_0_KIND and head_dim % 32:
        head_dim += 32 - head_dim % 32
    shape = Shape(heads=4, kv_heads=2, head_dim=head_dim, rope_dim=rope_dim, style=style, kind=kind)
    rng = np.random.default_rng(3)
    sequence = Sequence.random(shape, 70, [3, 1], rng)
    layer = Layer(shape, 4, 2)
    layer.run([(sequence, 0, 70)])
    keys, values = cached(layer, [3, 1], 70)
    name = NAMES[kind]
    assert np.array_equal(values, round_kv(sequence.v.astype(np.float64), name))
    assert np.array_equal(keys[0], round_kv(sequence.k[0].astype(np.float64), name))  # position 0 stays
    exact = np.mean(keys == round_kv(rotated(shape, sequence)[1].astype(np.float32), name))
    assert exact > (0.3 if kind == F32_KIND else 0.98)
    assert np.isnan(layer.kv[[0, 2]].view(np.float16 if kind else np.float32)).all()
    rest = [part[70:] for part in cached(layer, [3, 1], 128)]
    assert all(np.isnan(part).all() for part in rest)


VALUES = [0.0, -0.0, 1.0, -1.5, 65504.0, 65519.9, 65520.0, -7e4, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25, 1e-30]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [0, 100])
def test_sinks_count_once_however_positions_are_divided(kind: int, window: int) -> None:
    """By spans, in parts that are merged, and in several passes of a span; each head has its own."""
    shape = Shape(
        heads=6, kv_heads=2, head_dim=32, rope_dim=8, style=RopeStyle.NEOX, kind=kind, window=window, sinks=True
    )
    length = 2 * SPAN + 70
    n_blocks = -(-length // KV_TILE)
    sequence = Sequence.random(shape, length, list(range(n_blocks)), np.random.default_rng(5))
    layer = Layer(shape, n_blocks, n_blocks)
    whole = layer.run([(sequence, 0, length)], 2, split=0)[0]
    keys, values = cached(layer, sequence.table, length)
    want = attended(shape, rotated(shape, sequence)[0], keys, values)
    assert close(whole, want, kind)
    assert not close(whole, attention(rotated(shape, sequence)[0], keys, values, window or None), kind)
    last = layer.run([(sequence, length - 2, length)], 3, split=2)[0]
    assert np.array_equal(last, whole[-2:])


def test_half_floats_round_as_ieee_says() -> None:
    """Every kind of number: ties, subnormals, what overflows, infinities and NaN, against NumPy."""
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 64 * 128 - 300, np.uint32)
    halves = rng.integers(0, 0x7BFF, 100).astype(np.uint16)  # finite, and the points half-way to the next
    middle = (halves.view(np.float16).astype(np.float32) + (halves + 1).astype(np.uint16).view(np.float16)) / 2
    special = np.array([*VALUES, np.inf, -np.inf, np.nan], np.float32)
    v = np.concatenate([bits.view(np.float32), middle, np.nextafter(middle, np.float32(0)), special])
    v = np.resize(v, (64, 1, 128))
    shape = Shape(heads=1, kv_heads=1, head_dim=128, rope_dim=2, style=RopeStyle.NEOX, kind=F16_KIND)
    sequence = Sequence(np.zeros_like(v), np.zeros_like(v), v, [0])
    layer = Layer(shape, 1, 1)
    layer.run([(sequence, 0, 64)])
    got = layer.kv[0, 1, 0].view(np.float16).reshape(4, 64, 1, 32).transpose(1, 2, 0, 3).reshape(64, 1, 128)
    with np.errstate(over="ignore", invalid="ignore"):
        want = v.astype(np.float16)
    finite = ~np.isnan(want)
    assert np.array_equal(got.view(np.uint16)[finite], want.view(np.uint16)[finite])
    assert np.array_equal(np.isnan(got), ~finite)


def test_q8_0_rounds_as_the_gguf_package_does() -> None:
    """Ties between integers, blocks of zeros, scales that are subnormal or vanish as half floats."""
    rng = np.random.default_rng(4)
    v = (rng.normal(size=(64, 1, 128)) * 10.0 ** rng.integers(-9, 6, (64, 1, 1))).astype(np.float32)
    v[1] = 0
    v[2, 0] = np.resize(np.arange(-127, 128) / 2, 128)
    v[2, 0, ::32] = 127  # the scale is 1, and halves are ties
    shape = Shape(heads=1, kv_heads=1, head_dim=128, rope_dim=2, style=RopeStyle.NEOX, kind=Q8_0_KIND)
    layer = Layer(shape, 1, 1)
    layer.run([(Sequence(np.zeros_like(v), np.zeros_like(v), v, [0]), 0, 64)])
    raw = gguf.quants.quantize(v[:, 0], gguf.GGMLQuantizationType.Q8_0)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(cached(layer, [0], 64)[1][:, 0], want.astype(np.float64))
    assert np.array_equal(round_kv(v[:, 0].astype(np.float64), "q8_0"), want.astype(np.float64))


def test_half_floats_have_the_arithmetic_of_float32() -> None:
    """The bits are those of a float32 cache that holds the rounded values: widening is exact."""
    shape = Shape(heads=6, kv_heads=2, head_dim=64, rope_dim=2, style=RopeStyle.NEOX, kind=F16_KIND, window=150)
    rng = np.random.default_rng(1)
    sequence = Sequence.random(shape, 230, [2, 0, 3, 1], rng)
    sequence.q[..., :2] = 0  # so that rotating changes nothing
    layer = Layer(shape, 4, 4)
    got = layer.run([(sequence, 0, 230)])[0]
    keys, values = cached(layer, sequence.table, 230)
    plain = Layer(attrs.evolve(shape, kind=F32_KIND), 4, 4)
    plain.run([(sequence, 0, 230)])
    tiles = plain.kv.view(np.float32).reshape(4, 2, 2, -1)
    keys, values = (np.concatenate([a, np.zeros((26, 2, 64))]) for a in (keys, values))
    for index, block in enumerate(sequence.table):
        here = slice(64 * index, 64 * index + 64)
        tiles[block, 0] = keys[here].reshape(2, 32, 2, 64).transpose(2, 0, 3, 1).reshape(2, -1)
        tiles[block, 1] = values[here].reshape(64, 2, 2, 32).transpose(1, 2, 0, 3).reshape(2, -1)
    last = attrs.evolve(sequence, q=sequence.q[-1:], k=sequence.k[-1:], v=sequence.v[-1:])
    want = plain.attend_only(last, 229)
    assert np.array_equal(got[-1:], want)


@pytest.mark.parametrize("size", [0.0, 1e-25, 1.0, 1e6])
def test_the_largest_sums_of_q8_0_fit(size: float) -> None:
    """Every key and value is the largest int8 there is, of one sign, and so is every query; scores are alike."""
    shape = Shape(heads=8, kv_heads=1, head_dim=128, rope_dim=2, style=RopeStyle.NEOX, kind=Q8_0_KIND)
    s = Sequence.random(shape, 128, [1, 0], np.random.default_rng(9))
    s.q[:], s.k[:], s.v[:] = size, -3e-3, -5.0
    s.q[..., :2] = s.k[..., :2] = 0  # what is rotated
    got = Layer(shape, 2, 2).run([(s, 0, 128)])[0]
    assert np.allclose(got, -5.0, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_query_that_is_no_number_gives_none(bad: float) -> None:
    shape = Shape(heads=8, kv_heads=1, head_dim=32, rope_dim=2, style=RopeStyle.NEOX, kind=Q8_0_KIND)
    s = Sequence.random(shape, 70, [1, 0], np.random.default_rng(10))
    want = Layer(shape, 2, 2).run([(s, 0, 70)])[0]
    s.q[66, 3, 20] = bad
    got = Layer(shape, 2, 2).run([(s, 0, 70)])[0]
    assert np.isnan(got[66, 3]).all()
    got[66, 3] = want[66, 3]
    assert np.array_equal(got, want)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=3),
    long=st.sampled_from([0, 0, 600, 1100]),
    cuts=st.lists(st.integers(1, 1000), max_size=4),
    n_threads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 5, 8]),
    kind=st.sampled_from(KINDS),
    window=st.sampled_from([0, 0, 50, 700]),
    seed=st.integers(0, 2**32),
)
@example(lengths=[65, 64, 63], long=0, cuts=[63, 64], n_threads=2, group=3, kind=F16_KIND, window=0, seed=0)
@example(lengths=[3], long=1100, cuts=[1, 1099], n_threads=3, group=8, kind=F32_KIND, window=0, seed=0)
def test_chunks_neighbours_blocks_and_threads_change_no_bit(
    lengths: list[int], long: int, cuts: list[int], n_threads: int, group: int, kind: int, window: int, seed: int
) -> None:
    shape = Shape(heads=2 * group, kv_heads=2, head_dim=32, rope_dim=20, style=RopeStyle.NEOX, kind=kind, window=window)
    rng = np.random.default_rng(seed)
    lengths = [*lengths, long] if long else lengths
    most = -(-max(lengths) // KV_TILE)
    tables = rng.permutation(len(lengths) * most).reshape(-1, most).tolist()
    sequences = [Sequence.random(shape, n, table, rng) for n, table in zip(lengths, tables, strict=True)]
    alone = []
    for s in sequences:
        one = Layer(shape, most, most)
        alone.append(one.run([(attrs.evolve(s, table=list(range(most))), 0, len(s.q))], split=0)[0])
    layer = Layer(shape, len(lengths) * most, most)
    rows: list[list[F32]] = [[] for _ in sequences]
    edges = sorted({0, max(lengths), *(cut for cut in cuts if cut < max(lengths))})
    for start, end in itertools.pairwise(edges):
        here = [i for i, s in enumerate(sequences) if len(s.q) > start]
        parts = layer.run([(sequences[i], start, min(end, len(sequences[i].q))) for i in here], n_threads)
        for i, part in zip(here, parts, strict=True):
            rows[i].append(part)
    for got, want in zip(rows, alone, strict=True):
        assert np.array_equal(np.concatenate(got).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_sequence_damages_no_other(bad: float, kind: int) -> None:
    shape = Shape(heads=4, kv_heads=2, head_dim=32, rope_dim=32, style=RopeStyle.NEOX, kind=kind)
    rng = np.random.default_rng(5)
    one, two = (Sequence.random(shape, 70, table, rng) for table in ([0, 1], [2, 3]))
    want = Layer(shape, 4, 2).run([(one, 0, 70), (two, 0, 70)])
    two.k[10, 0, 3] = bad
    two.v[20, 1, 5] = bad
    got = Layer(shape, 4, 2).run([(one, 0, 70), (two, 0, 70)])
    assert np.array_equal(got[0], want[0])
    assert np.array_equal(got[1][:10], want[1][:10])
    assert np.array_equal(got[1][:20, 2:], want[1][:20, 2:])  # heads of the other kv head, and earlier positions
    assert not np.isfinite(got[1][20:, 2:, 5]).any()
    if np.isnan(bad) or kind == Q8_0_KIND:  # a score of minus infinity only leaves its position out
        assert np.isnan(got[1][10:, :2]).all()


def test_damage_outside_the_window_is_not_seen() -> None:
    """Neither NaN in a tile that is skipped, nor in positions of the window's own first tile."""
    shape = Shape(heads=2, kv_heads=1, head_dim=16, rope_dim=16, style=RopeStyle.NEOX, window=30)
    rng = np.random.default_rng(8)
    sequence = Sequence.random(shape, 200, [0, 1, 2, 3], rng)
    want = Layer(shape, 4, 4).run([(sequence, 0, 200)])[0]
    sequence.k[[3, 100]], sequence.v[[3, 100]] = np.nan, np.inf
    got = Layer(shape, 4, 4).run([(sequence, 0, 200)])[0]
    seen = np.zeros(200, bool)
    seen[3:33] = seen[100:130] = True
    assert np.array_equal(got[~seen], want[~seen])
    assert np.isnan(got[seen]).all()


def test_scores_far_apart_give_the_value_of_the_best_position() -> None:
    """Also where the best position is in a later block or span, so that what came before is scaled away."""
    shape = Shape(heads=1, kv_heads=1, head_dim=16, rope_dim=2, style=RopeStyle.NEOX)
    rng = np.random.default_rng(6)
    for best in (5, 100, SPAN + 3):
        s = Sequence.random(shape, SPAN + 40, list(range(9)), rng)
        s.q[:], s.k[:] = 0, 0
        s.q[..., 7], s.k[:, 0, 7] = 4, -1000
        s.k[best, 0, 7] = 1000
        got = Layer(shape, 9, 9).run([(s, 0, SPAN + 40)])[0]
        assert np.allclose(got[best:, 0], s.v[best, 0], atol=1e-6)


@pytest.mark.parametrize("length", [64, SPAN + 64])
def test_scores_of_minus_infinity_leave_their_positions_out(length: int) -> None:
    """Even a whole tile, or a whole span, of them."""
    shape = Shape(heads=1, kv_heads=1, head_dim=16, rope_dim=2, style=RopeStyle.NEOX)
    s = Sequence.random(shape, length + 9, list(range(10)), np.random.default_rng(7))
    s.q[..., 7] = 1
    s.k[:length, 0, 7] = -np.inf
    got = Layer(shape, 10, 10).run([(s, length + 8, length + 9)])  # what is before is not computed
    assert np.isnan(got[0]).all()
    layer = Layer(shape, 10, 10)
    layer.run([(s, 0, length)])
    got = layer.run([(s, length, length + 9)])
    keys = rotated(shape, s)[1][length:]
    assert close(got[0], attention(rotated(shape, s)[0][length:], keys, s.v[length:].astype(np.float64)))
