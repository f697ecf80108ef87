"""Tree of the KV blocks that sequences can share, and the order of their eviction. Pure."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import attrs

Span: TypeAlias = Callable[[int, int], Sequence[int]]
"""Returns the tokens of a sequence from the first position to before the second."""


@attrs.define(eq=False)
class PrefixNode:
    """A full block of KV: its tokens follow those of its parent, the block before it."""

    block: int
    key: bytes  # the block's tokens, see `block_key`
    parent: PrefixNode | None  # None for the first positions
    children: dict[bytes, PrefixNode] = attrs.field(factory=dict, repr=False)
    refs: int = 1  # holders of it, and so of all blocks before it


def block_key(tokens: Sequence[int]) -> bytes:
    """Return a block's tokens as the key under which its parent knows it."""
    return array("i", tokens).tobytes()


class PrefixTree:
    """Full blocks in a tree: a path from the root is a prefix, and each prefix is there once.

    A block is found by walking from the root, block by block, through dictionaries of tokens. These hash the tokens of
    one block and then compare them, so that a hash alone is never trusted.

    The holder of a block holds all blocks before it. Blocks without a holder are kept, in the order of their release, a
    prefix's last block first. So the block that was released first has no block after it.

    Args:
        block_tokens: positions in a block.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._first: dict[bytes, PrefixNode] = {}
        self._unused: OrderedDict[PrefixNode, None] = OrderedDict()
        self.evictions = 0

    @property
    def n_unused(self) -> int:
        """Blocks without a holder."""
        return len(self._unused)

    def key_at(self, index: int, span: Span) -> bytes:
        """Return the key of the block of a sequence with that number, from 0."""
        return block_key(span(index * self._block_tokens, (index + 1) * self._block_tokens))

    def next(self, parent: PrefixNode | None, key: bytes) -> PrefixNode | None:
        """Return the block of these tokens that follows `parent`, if there is one."""
        return self._children(parent).get(key)

    def find(self, span: Span, n_blocks: int) -> tuple[PrefixNode, ...]:
        """Return the longest path of blocks with these tokens, at most `n_blocks`."""
        path: list[PrefixNode] = []
        node: PrefixNode | None = None
        while len(path) < n_blocks and (node := self.next(node, self.key_at(len(path), span))) is not None:
            path.append(node)
        return tuple(path)

    def add(self, parent: PrefixNode | None, key: bytes, block: int) -> PrefixNode:
        """Add a block after one that is held, and hold it."""
        node = PrefixNode(block, key, parent)
        children = self._children(parent)
        if key in children or (parent is not None and not parent.refs):
            raise RuntimeError(f"block {block} is known already, or what it follows is held by nobody")
        children[key] = node
        return node

    def hold(self, node: PrefixNode) -> None:
        """Hold a block whose parent is held."""
        if not node.refs:
            del self._unused[node]
        node.refs += 1

    def let_go(self, node: PrefixNode) -> None:
        """Release a block; its holder has released all blocks after it. Without a holder it is kept unused."""
        if not node.refs:
            raise RuntimeError(f"block {node.block} is given back twice")
        node.refs -= 1
        if not node.refs:
            self._unused[node] = None

    def evict(self) -> int:
        """Evict the unused block that was released first, and return its number."""
        node, _ = self._unused.popitem(last=False)
        if node.children:
            raise RuntimeError(f"block {node.block} would be forgotten before those behind it")
        del self._children(node.parent)[node.key]
        self.evictions += 1
        return node.block

    def _children(self, parent: PrefixNode | None) -> dict[bytes, PrefixNode]:
        return self._first if parent is None else parent.children
