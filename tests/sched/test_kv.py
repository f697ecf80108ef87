"""KV accounting against plain dictionaries: prefixes as tuples of tokens, and when each was used last."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import count

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mer.sched.kv import KVBlocks, Lease

Tokens = tuple[int, ...]


def span(tokens: list[int] | Tokens, first: int, last: int) -> list[int]:
    assert 0 <= first < last <= len(tokens)
    return list(tokens[first:last])


@attrs.define(eq=False)
class Holder:
    """What the model knows of a lease."""

    lease: Lease
    tokens: list[int]
    n_blocks: int
    computed: int  # positions
    shared: int  # leading blocks that are known to all
    own: list[int]  # the others


class KVMachine(RuleBasedStateMachine):
    """Leases as sequences use them: reserved with known tokens, computed, continued, released."""

    @initialize(n_blocks=st.integers(2, 9), block_tokens=st.integers(1, 3))
    def start(self, n_blocks: int, block_tokens: int) -> None:
        self.kv = KVBlocks(n_blocks, block_tokens)
        self.n, self.b = n_blocks, block_tokens
        self.holders: list[Holder] = []
        self.released: list[Lease] = []
        self.block_of: dict[Tokens, int] = {}  # {prefix of whole blocks: its last block}
        self.used_at: dict[Tokens, int] = {}  # when a prefix was let go last
        self.evicted = 0
        self.clock = count()

    # --- the model ---

    def chain(self, holder: Holder) -> list[Tokens]:
        return [tuple(holder.tokens[: (i + 1) * self.b]) for i in range(holder.shared)]

    def refs(self, holders: list[Holder]) -> Counter[Tokens]:
        return Counter(prefix for holder in holders for prefix in self.chain(holder))

    def in_use(self, holders: list[Holder]) -> int:
        return len(self.refs(holders)) + sum(len(holder.own) for holder in holders)

    def free(self) -> set[int]:
        held = {*self.block_of.values(), *(block for holder in self.holders for block in holder.own)}
        return set(range(self.n)) - held

    def longest(self, tokens: Tokens, n_tokens: int) -> int:
        """Return how many leading blocks within the first `n_tokens` tokens are known."""
        known = 0
        while (known + 1) * self.b <= n_tokens and tokens[: (known + 1) * self.b] in self.block_of:
            known += 1
        return known

    def evict(self) -> None:
        """Forget, of all prefixes that nobody uses and that nothing known follows, the least recently used."""
        refs = self.refs(self.holders)
        unused = [p for p in self.block_of if not refs[p]]
        ends = [p for p in unused if not any(q[: len(p)] == p and len(q) > len(p) for q in self.block_of)]
        del self.block_of[min(ends, key=self.used_at.__getitem__)]
        self.evicted += 1

    # --- rules ---

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10)

    @rule(tokens=prompts, more=st.integers(0, 3))
    def reserve(self, tokens: list[int], more: int) -> None:
        needed = min(self.n, self.kv.needed(len(tokens) + more))
        tokens = tokens[: needed * self.b]
        shared = self.longest(tuple(tokens), len(tokens) - 1)
        found = self.kv.find(partial(span, tokens), len(tokens) - 1)
        assert [node.block for node in found] == [
            self.block_of[tuple(tokens[: (i + 1) * self.b])] for i in range(shared)
        ]
        held = self.refs(self.holders)
        new = needed - sum(tuple(tokens[: (i + 1) * self.b]) in held for i in range(shared))
        fits = self.in_use(self.holders) + new <= self.n
        assert self.kv.fits(needed, found) == fits
        lease = self.kv.reserve(needed, found)
        assert (lease is not None) == fits
        if lease is None:
            return
        holder = Holder(lease, tokens, needed, shared * self.b, shared, [])
        self.holders.append(holder)
        free = self.free()
        while len(free) < needed - shared:
            self.evict()
            free = self.free()
        holder.own = lease.blocks[shared:]
        assert set(holder.own) <= free

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), n=st.integers(1, 8))
    def compute(self, data: st.DataObject, n: int) -> None:
        """Compute rows, and draw tokens where the known ones end; then share."""
        holder = data.draw(st.sampled_from(self.holders))
        holder.computed = min(holder.computed + n, holder.n_blocks * self.b)
        while len(holder.tokens) < holder.computed:
            holder.tokens.append(data.draw(st.integers(0, 1)))
        self.kv.share(holder.lease, partial(span, holder.tokens), holder.computed)
        while (holder.shared + 1) * self.b <= holder.computed:
            prefix, own = tuple(holder.tokens[: (holder.shared + 1) * self.b]), holder.own.pop(0)
            self.block_of.setdefault(prefix, own)
            holder.shared += 1

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        shared = self.longest(tuple(holder.tokens), len(holder.tokens) - 1)
        there = self.kv.adopt(holder.lease, partial(span, holder.tokens), len(holder.tokens) - 1)
        holder.own = holder.own[max(0, shared - holder.shared) :]
        holder.shared = max(holder.shared, shared)
        holder.computed = max(holder.computed, holder.shared * self.b)
        assert there == holder.shared * self.b

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(self.holders))
        self.kv.release(holder.lease)
        self.holders.remove(holder)
        self.released.append(holder.lease)
        now = next(self.clock)
        still = self.refs(self.holders)
        self.used_at |= {prefix: now for prefix in self.chain(holder) if not still[prefix]}

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        with pytest.raises(RuntimeError, match="twice"):
            self.kv.release(data.draw(st.sampled_from(self.released)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), tokens=prompts, begins_like_one=st.booleans())
    def fits_without(self, data: st.DataObject, tokens: list[int], begins_like_one: bool) -> None:
        """What would fit if some were released is what fits once they are, to the block."""
        going = data.draw(st.lists(st.sampled_from(self.holders), min_size=1, unique_by=id))
        staying = [holder for holder in self.holders if holder not in going]
        if begins_like_one:
            tokens = [*going[0].tokens, 0]
        found = self.kv.find(partial(span, tokens), len(tokens) - 1)
        held = self.refs(staying)
        shared = sum(tuple(tokens[: (i + 1) * self.b]) in held for i in range(len(found)))
        most = self.n - self.in_use(staying) + shared
        leases = [holder.lease for holder in going]
        for n_blocks in range(max(1, len(found), most - 1), most + 2):
            assert self.kv.fits(n_blocks, found, leases) == (n_blocks <= most)

    # --- what always holds ---

    @invariant()
    def nobody_has_what_is_anothers(self) -> None:
        own = [block for holder in self.holders for block in holder.own]
        known = list(self.block_of.values())
        assert len({*own, *known}) == len(own) + len(known)
        for holder in self.holders:
            assert holder.lease.blocks == [*(self.block_of[prefix] for prefix in self.chain(holder)), *holder.own]
            assert len(holder.lease.blocks) == holder.n_blocks

    @invariant()
    def every_block_is_free_cached_or_used(self) -> None:
        statistics = self.kv.statistics()
        assert statistics.free == len(self.free())
        assert statistics.cached == len(self.block_of) - len(self.refs(self.holders))
        assert statistics.evictions == self.evicted
        assert statistics.available + self.in_use(self.holders) == self.n == statistics.n_blocks

    @invariant()
    def a_prefix_is_known_whole(self) -> None:
        assert all(prefix[: -self.b] in self.block_of for prefix in self.block_of if len(prefix) > self.b)

    def teardown(self) -> None:
        for holder in self.holders:
            self.kv.release(holder.lease)
        statistics = self.kv.statistics()
        assert statistics.available == self.n
        everything = self.kv.reserve(self.n)
        assert everything is not None
        assert sorted(everything.blocks) == list(range(self.n))
        assert self.kv.find(partial(span, [0] * 9), 9) == self.kv.find(partial(span, [1] * 9), 9) == ()


KVMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestKVMachine = pytest.mark.slow(KVMachine.TestCase)


@given(st.integers(0, 1000), st.integers(1, 70))
def test_needed_is_the_smallest_number_that_holds_them(n_tokens: int, block_tokens: int) -> None:
    needed = KVBlocks(1, block_tokens).needed(n_tokens)
    assert needed * block_tokens >= n_tokens > (needed - 1) * block_tokens


def test_without_reuse_nothing_is_shared_or_kept() -> None:
    kv = KVBlocks(4, 2, prefix_reuse=False)
    tokens = [1, 2, 3, 4]
    lease = kv.reserve(2)
    assert lease is not None
    kv.share(lease, partial(span, tokens), 4)
    assert kv.find(partial(span, tokens), 4) == ()
    kv.release(lease)
    assert (kv.statistics().free, kv.statistics().cached) == (4, 0)


def test_equal_tokens_behind_different_ones_are_another_prefix() -> None:
    kv = KVBlocks(8, 2)
    leases = []
    for tokens in ([1, 2, 7, 7], [3, 4, 7, 7]):
        lease = kv.reserve(2, kv.find(partial(span, tokens), 3))
        assert lease is not None
        kv.share(lease, partial(span, tokens), 4)
        leases.append(lease)
    assert not set(leases[0].blocks) & set(leases[1].blocks)
    assert kv.find(partial(span, [7, 7]), 2) == ()


def test_tokens_that_hash_alike_are_not_taken_for_each_other() -> None:
    kv = KVBlocks(4, 1)
    lease = kv.reserve(1)
    assert lease is not None
    kv.share(lease, lambda first, last: [-1], 1)  # hash(-1) == hash(-2)
    assert kv.find(lambda first, last: [-2], 1) == ()


@given(
    n_prefix=st.integers(0, 4),
    givers_own=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    somebody_stays=st.booleans(),
    n_apart=st.integers(0, 3),
    n_free=st.integers(0, 3),
    beside=st.integers(-1, 1),
)
def test_what_fits_once_those_who_share_a_prefix_give_up_is_told_to_the_block(
    n_prefix: int, givers_own: list[int], somebody_stays: bool, n_apart: int, n_free: int, beside: int
) -> None:
    """Somebody with the same prefix wants as much as there will be, one block less, or one more.

    A prefix that others hold too costs nothing; one that only those who give up hold is among what they free. Either
    way all blocks can be had but those that are held `n_apart`.
    """
    tokens = list(range(n_prefix)) or [0]
    kv = KVBlocks(n_prefix + sum(givers_own) + n_apart + n_free + 1, 1)

    def holder(n_own: int) -> Lease:
        lease = kv.reserve(n_prefix + n_own, kv.find(partial(span, tokens), n_prefix))
        assert lease is not None
        kv.share(lease, partial(span, tokens), n_prefix)
        return lease

    givers = [holder(n_own) for n_own in givers_own]
    if somebody_stays:
        holder(0)
    assert kv.reserve(n_apart) is not None
    wanted = kv.n_blocks - n_apart + beside
    assert kv.fits(wanted, kv.find(partial(span, tokens), n_prefix), givers) == (beside <= 0)
