"""KV accounting against a model made of sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.sched.kv import KVBlocks


@given(st.integers(1, 12), st.lists(st.integers(0, 6) | st.just(None), max_size=40), st.randoms())
def test_blocks_are_in_one_hand_each(n_blocks: int, steps: list[int | None], random: object) -> None:
    kv = KVBlocks(n_blocks, 4)
    held: list[tuple[int, ...]] = []
    for step in steps:
        free = n_blocks - sum(map(len, held))
        if step is not None:
            blocks = kv.reserve(step)
            assert (blocks is None) == (step > free)
            if blocks is not None:
                assert len(blocks) == step
                held.append(blocks)
        elif held:
            kv.release(held.pop(random.randrange(len(held))))  # type: ignore[attr-defined]
        everything = [block for blocks in held for block in blocks]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(n_blocks))
        statistics = kv.statistics()
        assert (statistics.n_blocks, statistics.block_tokens) == (n_blocks, 4)
        assert statistics.free == n_blocks - len(everything)


@given(st.integers(0, 1000), st.integers(1, 70))
def test_needed_is_the_smallest_number_that_holds_them(n_tokens: int, block_tokens: int) -> None:
    needed = KVBlocks(1, block_tokens).needed(n_tokens)
    assert needed * block_tokens >= n_tokens > (needed - 1) * block_tokens


def test_giving_back_twice_is_an_error_and_changes_nothing() -> None:
    kv = KVBlocks(4, 1)
    blocks = kv.reserve(3)
    assert blocks is not None
    kv.release(blocks[:1])
    for twice in (blocks, blocks[:1], (blocks[1], blocks[1])):
        with pytest.raises(RuntimeError, match="twice"):
            kv.release(twice)
    assert kv.statistics().free == 2
    kv.release(())
    kv.release(blocks[1:])
    assert sorted(kv.reserve(4) or ()) == [0, 1, 2, 3]
