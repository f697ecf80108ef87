"""Accounting of KV blocks: the holders of the blocks of the worker's KV memory, and shared blocks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import attrs

from mer.sched.prefix import PrefixNode, PrefixTree, Span


@attrs.frozen(kw_only=True)
class KVStatistics:
    """A snapshot of the KV accounting; the blocks that are neither free nor cached are in use."""

    n_blocks: int
    free: int  # hold nothing
    cached: int  # hold a prefix that no sequence uses now; evicted when no block is free
    evictions: int  # of cached blocks
    block_tokens: int  # positions in a block

    @property
    def available(self) -> int:
        """Blocks that can be reserved: free ones and cached ones."""
        return self.free + self.cached


@attrs.define(eq=False)
class Lease:
    """The blocks that one holder has, in order of position; `KVBlocks` alone changes it."""

    blocks: list[int]
    nodes: list[PrefixNode]  # the first of them: full, and shared with all sequences that have the same tokens there
    released: bool = False

    @property
    def n_own(self) -> int:
        """Blocks that are not shared."""
        return len(self.blocks) - len(self.nodes)


NextBlock: TypeAlias = tuple[PrefixNode | None, bytes]
"""A block that is not shared yet, by the one before it and its own tokens."""


class KVBlocks:
    """Hands out blocks of `block_tokens` positions, whole leases at a time.

    A sequence reserves all the blocks it may need before it starts, so that none ever waits for a block while it runs.
    Its blocks are its own until they are full, computed and shared. From then on no sequence writes to them, and
    sequences that begin with the same tokens hold the same blocks. Shared blocks without a holder stay cached until a
    block is needed and none is free. Then the least recently used one is evicted, the last block of a prefix before
    those in front of it.

    Args:
        n_blocks: blocks in all.
        block_tokens: positions in a block.
        prefix_reuse: false shares and keeps nothing.
    """

    def __init__(self, n_blocks: int, block_tokens: int, *, prefix_reuse: bool = True) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self.prefix_reuse = prefix_reuse
        self._free = list(range(n_blocks - 1, -1, -1))
        self._tree = PrefixTree(block_tokens)

    def needed(self, n_tokens: int) -> int:
        """Return how many blocks `n_tokens` positions take."""
        return -(-n_tokens // self.block_tokens)

    def find(self, span: Span, n_tokens: int) -> tuple[PrefixNode, ...]:
        """Return the shared blocks that hold the longest prefix of a sequence, at most its first `n_tokens` tokens.

        The result is for `fits` and `reserve`, and good until the next `reserve`.
        """
        return self._tree.find(span, n_tokens // self.block_tokens)

    def fits(self, n_blocks: int, shared: Sequence[PrefixNode] = (), without: Sequence[Lease] = ()) -> bool:
        """Return whether `n_blocks` blocks, those of `shared` included, fit after `without` are released."""
        given_up = Counter(node for lease in without for node in lease.nodes)
        available = len(self._free) + self._tree.n_unused + sum(lease.n_own for lease in without)
        available += sum(node.refs == times for node, times in given_up.items())
        held_by_others = sum(node.refs > given_up[node] for node in shared)
        return n_blocks - held_by_others <= available

    def reserve(self, n_blocks: int, shared: Sequence[PrefixNode] = ()) -> Lease | None:
        """Take `n_blocks` blocks, the first of them `shared` as `find` returned it, or return None if it does not fit.

        The other blocks are free ones, then the cached ones that were released first.
        """
        if not self.fits(n_blocks, shared):
            return None
        for node in shared:
            self._tree.hold(node)
        own = [self._free.pop() if self._free else self._tree.evict() for _ in range(n_blocks - len(shared))]
        return Lease([*(node.block for node in shared), *own], list(shared))

    def share(self, lease: Lease, span: Span, n_tokens: int) -> None:
        """Make the full blocks among the first `n_tokens` positions, which are computed, shareable.

        Where another holder has shared a block with the same tokens, that block replaces the lease's own, which is
        freed: both hold the same bits.
        """
        if not self.prefix_reuse:
            return
        for index in range(len(lease.nodes), n_tokens // self.block_tokens):
            parent, key = self._end(lease), self._tree.key_at(index, span)
            node = self._tree.next(parent, key)
            if node is None:
                lease.nodes.append(self._tree.add(parent, key, lease.blocks[index]))
            else:
                self._replace(lease, node)

    def adopt(self, lease: Lease, span: Span, n_tokens: int) -> int:
        """Replace blocks by those that others have shared since the lease was made, within `n_tokens` positions.

        Returns:
            The number of positions, from the first, that need not be computed.
        """
        while (index := len(lease.nodes)) < n_tokens // self.block_tokens:
            node = self._tree.next(self._end(lease), self._tree.key_at(index, span))
            if node is None:
                break
            self._replace(lease, node)
        return len(lease.nodes) * self.block_tokens

    def next_block(self, lease: Lease, span: Span, n_tokens: int) -> NextBlock | None:
        """Return the next block that a lease will share, within `n_tokens` positions; equal for equal blocks."""
        index = len(lease.nodes)
        if not self.prefix_reuse or (index + 1) * self.block_tokens > n_tokens:
            return None
        return self._end(lease), self._tree.key_at(index, span)

    def release(self, lease: Lease) -> None:
        """Release a lease: its own blocks become free, shared ones cached if no other lease holds them."""
        if lease.released:
            raise RuntimeError(f"the blocks {lease.blocks} are given back twice")
        lease.released = True
        self._free.extend(reversed(lease.blocks[len(lease.nodes) :]))
        for node in reversed(lease.nodes):
            self._tree.let_go(node)

    def statistics(self) -> KVStatistics:
        """Return a snapshot."""
        return KVStatistics(
            n_blocks=self.n_blocks,
            free=len(self._free),
            cached=self._tree.n_unused,
            evictions=self._tree.evictions,
            block_tokens=self.block_tokens,
        )

    def _end(self, lease: Lease) -> PrefixNode | None:
        return lease.nodes[-1] if lease.nodes else None

    def _replace(self, lease: Lease, node: PrefixNode) -> None:
        """Put a shared block in the place of the lease's first own one."""
        self._tree.hold(node)
        index = len(lease.nodes)
        self._free.append(lease.blocks[index])
        lease.blocks[index] = node.block
        lease.nodes.append(node)
