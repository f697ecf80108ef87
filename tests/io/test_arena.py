"""The arena: alignment, separate slots, and memory that outlives a close for as long as someone looks at it."""

from __future__ import annotations

import mmap
import os
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st

from mer.errors import ConfigError, NotEnoughMemory
from mer.io import arena as arena_module
from mer.io.arena import PAGE_BYTES, Arena


@pytest.mark.parametrize(("asked", "given"), [(1, 4096), (4096, 4096), (4097, 8192), (3 * 4096, 3 * 4096)])
def test_slots_are_whole_aligned_pages_side_by_side(asked: int, given: int) -> None:
    arena = Arena((3,), (asked,))
    assert arena.class_bytes == (given,)
    assert arena.n_bytes == 3 * given
    for slot in range(3):
        view = arena.view(slot)
        assert arena.slot_bytes(slot) == given
        assert view.shape == (given,)
        assert view.dtype == np.uint8
        assert view.ctypes.data == arena.address(slot) == arena.address(0) + slot * given
        assert arena.address(slot) % PAGE_BYTES == 0
    arena.close()


@hypothesis_given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20_000)), min_size=1, max_size=5))
def test_classes_follow_each_other_and_no_slot_shares_a_byte(classes: list[tuple[int, int]]) -> None:
    counts, sizes = zip(*classes, strict=True)
    arena = Arena(counts, sizes)
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    assert arena.n_slots == len(kinds)
    assert [arena.kind(slot) for slot in range(arena.n_slots)] == kinds
    for slot, kind in enumerate(kinds):
        assert sizes[kind] <= arena.slot_bytes(slot) == arena.class_bytes[kind] < sizes[kind] + PAGE_BYTES
        assert arena.address(slot) % PAGE_BYTES == 0
        arena.view(slot)[:] = slot + 1
    written = 0
    for slot in range(arena.n_slots):
        view = arena.view(slot)
        assert view.ctypes.data == arena.address(slot)
        assert len(view) == arena.slot_bytes(slot)
        assert (view == slot + 1).all()
        written += len(view)
    assert written == arena.n_bytes, "no gaps"
    arena.close()


def test_memory_lives_until_the_last_view_is_gone() -> None:
    arena = Arena((1, 1), (4096, 4096))
    view = arena.view(1)
    whole = weakref.ref(view.base if view.base is not None else view)
    arena.close()
    arena.close()
    view[:] = 7  # as a late read would
    assert view.sum() == 7 * 4096
    with pytest.raises(RuntimeError, match="closed"):
        arena.view(0)
    with pytest.raises(RuntimeError, match="closed"):
        arena.address(0)
    del view
    assert whole() is None


@pytest.mark.parametrize("slot", [-1, 2])
def test_unknown_slot(slot: int) -> None:
    arena = Arena((1, 1), (4096, 4096))
    with pytest.raises(IndexError, match="not one of the 2"):
        arena.view(slot)
    with pytest.raises(IndexError, match="not one of the 2"):
        arena.address(slot)
    with pytest.raises(IndexError, match="not one of the 2"):
        arena.slot_bytes(slot)


def test_an_arena_without_classes_has_no_slots() -> None:
    arena = Arena([], [])
    assert (arena.n_slots, arena.n_bytes, arena.slot_counts) == (0, 0, ())
    arena.close()


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ((0,), (4096,)),
        ((1,), (0,)),
        ((-1,), (-1,)),
        ((2, 0), (8192, 4096)),
        ((2, 1), (8192,)),
        ((1,), (9, 9)),
    ],
)
def test_classes_without_slots_or_bytes_are_refused(counts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"not {list(counts)} slots of {list(sizes)} bytes")):
        Arena(counts, sizes)


@pytest.mark.parametrize("n_bytes", [1 << 61, 1 << 80])
def test_refused_mapping(n_bytes: int) -> None:
    with pytest.raises(NotEnoughMemory, match="refuses a mapping") as caught:
        Arena((1,), (n_bytes,))
    assert caught.value.needed_bytes == n_bytes


def test_huge_pages_report_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "enabled"
    monkeypatch.setattr(arena_module, "_THP_SWITCH", switch)
    assert not Arena((1,), (4096,)).huge_pages  # no such file: a kernel without them
    switch.write_text("always madvise [never]\n")
    assert not Arena((1,), (4096,)).huge_pages
    switch.write_text("always [madvise] never\n")
    assert Arena((1,), (4096,)).huge_pages


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
def test_huge_pages_are_asked_for_and_forked_children_do_not_get_the_mapping() -> None:
    arena = Arena((3,), (4096,))
    flags = _mapping_flags(arena.address(0))
    assert "dc" in flags  # do not copy on fork
    if arena.huge_pages:
        assert "hg" in flags


def _mapping_flags(address: int) -> list[str]:
    """Return the VmFlags of the mapping that holds an address, proc_pid_smaps(5)."""
    inside = False
    for line in Path(f"/proc/{os.getpid()}/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise AssertionError("the address is not mapped")
