"""Memory that areas are cut from."""

from __future__ import annotations

import numpy as np
import pytest

from mer.compute.cpu.program import Memory


def test_areas_are_aligned_zeroed_and_apart() -> None:
    memory = Memory(300)
    areas = [memory.cut(size) for size in (1, 65, 64, 4)]
    assert all(address % 64 == 0 for address in areas)
    assert np.diff(areas).tolist() == [64, 128, 64]
    assert not memory.bytes.any()
    memory.floats(areas[1], 2, 3)[1, 2] = 1.5
    assert memory.view(areas[1] + 20, 4).view(np.float32)[0] == 1.5
    memory.ints(areas[3], 1)[0] = -7
    assert memory.view(areas[3], 4).tolist() == [0xF9, 0xFF, 0xFF, 0xFF]
    assert memory.bytes.nonzero()[0].min() >= 64


def test_more_than_there_is_cannot_be_cut() -> None:
    memory = Memory(4096)
    memory.cut(4000)
    with pytest.raises(RuntimeError, match="area of 100 bytes at 4032 does not fit 4096"):
        memory.cut(100)
