"""Slots: places for the matrices of an expert, and few sizes that waste little where experts differ in size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from mer.errors import ConfigError
from mer.io.arena import Arena
from mer.io.extents import PROJECTIONS, ExpertExtents, ExpertMap, ExpertPart, aligned_hull
from mer.io.fetcher import Fetcher
from mer.io.ggml import GGMLType
from mer.io.gguf import read_gguf
from mer.io.pool import BufferPool
from mer.model.experts import map_experts
from mer.model.operators import gated_experts
from mer.testing.simdisk import open_sim_disk
from tests._lib.tiny_models import Type, random_gguf

PAGE = 4096
ALIGNMENTS = st.sampled_from([1, 512, PAGE, 65536])
TYPES = [GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.Q4_1, GGMLType.Q4_0]
Sizes = tuple[int, int, int]
Types = tuple[GGMLType, GGMLType, GGMLType]


def expert(number: int, sizes: Sizes, *, layer: int = 0, rows: int = 16, offset: int = 0) -> ExpertExtents:
    """Return an expert whose matrices have these sizes and lie one after another."""
    starts = itertools.accumulate(sizes, initial=offset)
    gate, up, down = (
        ExpertPart(name, GGMLType.Q8_0, rows, 1, 0, start, n_bytes)
        for name, start, n_bytes in zip(PROJECTIONS, starts, sizes, strict=False)
    )
    return ExpertExtents(layer, number, (gate, up, down))


def of_needs(needs: Sequence[int]) -> ExpertMap:
    """Return experts that need so many pages of a slot, at least 3."""
    return ExpertMap((tuple(expert(i, (PAGE, PAGE, (need - 2) * PAGE)) for i, need in enumerate(needs)),))


def allowed(needs: Sequence[int]) -> int:
    """Pages that slots may have beyond what experts need: a 20th in all, or three for each."""
    return max(sum(needs) // 20, 3 * len(needs))


@given(
    sizes=st.tuples(*[st.integers(1, 300_000)] * 3),
    offsets=st.tuples(*[st.integers(0, 2**40)] * 3),
    rows=st.integers(1, 70),
    alignment=ALIGNMENTS,
)
def test_a_layout_has_room_for_reads_and_for_whole_groups_of_rows(
    sizes: Sizes, offsets: Sizes, rows: int, alignment: int
) -> None:
    parts = [
        ExpertPart(name, GGMLType.Q8_0, rows, 1, 0, offset, n_bytes * rows)
        for name, offset, n_bytes in zip(PROJECTIONS, offsets, sizes, strict=True)
    ]
    layout = ExpertExtents(0, 0, tuple(parts)).layout(alignment)
    ends = (*layout.part_offsets[1:], layout.n_bytes)
    for part, begin, end, row_bytes in zip(parts, layout.part_offsets, ends, sizes, strict=True):
        assert begin % alignment == end % alignment == 0
        _, length, lead = aligned_hull(part.offset, part.n_bytes, alignment)
        assert begin + length <= end, "a read ends in its own area"
        groups = -(-rows // 16) * 16 * row_bytes
        assert begin + lead + groups <= end, "so do 16 rows at a time"
        assert end - begin < groups + 2 * alignment, "and no more than alignment is lost"
    assert layout.part_offsets[0] == 0


# --- classes ---


@given(st.lists(st.integers(3, 3000), min_size=1, max_size=60), st.integers(1, 8))
def test_classes_hold_their_experts_and_waste_little(needs: list[int], per_layer: int) -> None:
    flat = of_needs(needs).experts[0]
    experts = ExpertMap(tuple(flat[i : i + per_layer] for i in range(0, len(flat), per_layer)))
    classes = experts.slot_classes(PAGE)
    assert classes.alignment == PAGE
    assert list(classes.slot_bytes) == sorted(set(classes.slot_bytes), reverse=True)
    given_to = [classes.kind_of(i // per_layer, i % per_layer) for i in range(len(needs))]
    total = 0
    for need, kind in zip(needs, given_to, strict=True):
        assert need * PAGE <= classes.slot_bytes[kind]
        assert kind == len(classes.slot_bytes) - 1 or need * PAGE > classes.slot_bytes[kind + 1], "no smaller one does"
        total += classes.slot_bytes[kind]
    for kind, size in enumerate(classes.slot_bytes):
        mine = [need * PAGE for need, k in zip(needs, given_to, strict=True) if k == kind]
        assert max(mine) == size, "a slot is no larger than its largest expert"
        assert classes.n_experts[kind] == len(mine)
        assert classes.needed_bytes[kind] == sum(mine)
    assert total - sum(needs) * PAGE <= allowed(needs) * PAGE + PAGE
    assert classes.waste(classes.n_experts) == pytest.approx(1 - sum(needs) * PAGE / total, abs=1e-9)
    if sum(needs) > 60 * len(needs):  # three pages are less than a 20th
        assert total <= 1.05 * sum(needs) * PAGE


@given(st.lists(st.sampled_from([3, 5, 40, 90, 100, 104, 130, 150, 151, 400]), min_size=1, max_size=24))
def test_no_fewer_classes_would_do_and_none_cost_less(needs: list[int]) -> None:
    """Compare with every way to choose the sizes of the slots."""
    classes = of_needs(needs).slot_classes(PAGE)
    distinct = sorted(set(needs))

    def cost(sizes: tuple[int, ...]) -> int:
        return sum(min(size for size in sizes if size >= need) for need in needs)

    def cheapest(n_classes: int) -> int:
        smaller = itertools.combinations(distinct[:-1], n_classes - 1)
        return min(cost((*chosen, distinct[-1])) for chosen in smaller)

    n_classes = len(classes.slot_bytes)
    ours = cost(tuple(size // PAGE for size in classes.slot_bytes))
    limit = sum(needs) + allowed(needs)
    assert ours == cheapest(n_classes) <= limit
    if n_classes > 1:
        assert cheapest(n_classes - 1) > limit


@given(st.integers(3, 10**6), st.integers(1, 40))
def test_equal_experts_have_one_class_and_waste_nothing(need: int, n: int) -> None:
    classes = of_needs([need] * n).slot_classes(PAGE)
    assert classes.slot_bytes == (need * PAGE,)
    assert classes.n_experts == (n,)
    assert classes.waste((1,)) == 0.0


@given(st.lists(st.tuples(*[st.sampled_from(TYPES)] * 3), min_size=1, max_size=40), st.integers(0, 4095))
def test_mixes_of_types_at_a_real_size_waste_no_more_than_a_20th(kinds: list[Types], offset: int) -> None:
    """Experts of 768 x 2048, which may differ one by one; padding of a slot included."""
    weights = 768 * 2048
    experts = []
    for i, triple in enumerate(kinds):
        gate, up, down = (weights // kind.block_size * kind.block_bytes for kind in triple)
        experts.append(expert(i, (gate, up, down), offset=offset))
    flat = tuple(experts)
    classes = ExpertMap((flat,)).slot_classes(PAGE)
    slots = sum(classes.slot_bytes[classes.kind_of(0, i)] for i in range(len(flat)))
    hulls = sum(aligned_hull(part.offset, part.n_bytes, PAGE)[1] for e in flat for part in e.parts)
    assert slots <= 1.05 * hulls


def test_many_sizes_are_sorted_out_quickly() -> None:
    """1500 sizes a page apart: all pairs of them for each class would take minutes."""
    needs = list(range(200, 1700))
    classes = of_needs(needs).slot_classes(PAGE)
    assert 5 < len(classes.slot_bytes) < 30
    assert classes.waste(classes.n_experts) <= 0.05


@pytest.mark.parametrize("merged", [True, False])
def test_layers_of_two_types_have_two_classes(tmp_path: Path, merged: bool) -> None:
    path = random_gguf(
        tmp_path / "m.gguf",
        expert_type=Type.Q4_0,
        types={f"blk.{layer}.ffn_down_exps.weight": Type.Q8_0 for layer in (1, 2)},
        merged=merged,
        n_layers=4, d_model=256, d_ff=512, n_experts=3, tokenizer=False,
    )  # fmt: skip
    experts = map_experts(read_gguf(path), {layer: gated_experts(layer, 3, 256, 512) for layer in range(4)})
    classes = experts.slot_classes(PAGE)
    assert classes.kinds == ((1,) * 3, (0,) * 3, (0,) * 3, (1,) * 3)
    assert classes.n_experts == (6, 6)
    low, high = 256 * 512 // 32 * 18, 256 * 512 // 32 * 34
    for size, n_bytes in zip(classes.slot_bytes, (2 * low + high, 3 * low), strict=True):
        assert n_bytes <= size <= n_bytes + 6 * PAGE
    assert classes.waste((1, 1)) < 0.02


async def test_a_pool_and_an_arena_that_class_slots_differently_are_refused(autojump_clock: MockClock) -> None:
    experts = of_needs([100, 100, 20])
    classes = experts.slot_classes(PAGE)
    assert len(classes.slot_bytes) == 2
    async with open_sim_disk([200 * PAGE]) as disk:
        with pytest.raises(ConfigError, match="slot 1 has class 1 in the pool, 0 in the arena"):
            Fetcher(BufferPool((1, 2)), Arena((2, 1), classes.slot_bytes), classes, experts, disk)
        Fetcher(BufferPool((2, 1)), Arena((2, 1), classes.slot_bytes), classes, experts, disk)
