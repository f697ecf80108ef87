"""Accounting of KV blocks: which sequence holds which blocks of the worker's KV memory."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class KVStatistics:
    """A snapshot of the KV accounting."""

    n_blocks: int
    free: int
    block_tokens: int  # positions in a block


class KVBlocks:
    """Hands out blocks of `block_tokens` positions, whole reservations at a time.

    A sequence reserves all the blocks it may need before it starts, so that none ever waits for a block while it runs.
    """

    def __init__(self, n_blocks: int, block_tokens: int) -> None:
        self.n_blocks = n_blocks
        self.block_tokens = block_tokens
        self._free = list(range(n_blocks - 1, -1, -1))

    def needed(self, n_tokens: int) -> int:
        """Return how many blocks `n_tokens` positions take."""
        return -(-n_tokens // self.block_tokens)

    def reserve(self, n_blocks: int) -> tuple[int, ...] | None:
        """Take blocks, or return None if too few are free."""
        if n_blocks > len(self._free):
            return None
        return tuple(self._free.pop() for _ in range(n_blocks))

    def release(self, blocks: tuple[int, ...]) -> None:
        """Give blocks back."""
        if len({*self._free, *blocks}) != len(self._free) + len(blocks):
            raise RuntimeError(f"some of the blocks {blocks} are given back twice")
        self._free.extend(reversed(blocks))

    def statistics(self) -> KVStatistics:
        """Return a snapshot."""
        return KVStatistics(n_blocks=self.n_blocks, free=len(self._free), block_tokens=self.block_tokens)
