"""Prefixes that go from KV memory to files and back, while the engine goes on."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar, TypeVarTuple

import attrs
import trio

from mer.compute.messages import Done, ReadBlocks, WriteBlocks
from mer.errors import ConfigError
from mer.sched.kv import KVBlocks, Lease
from mer.sched.kv_file import KVLayout, PrefixFileError, PrefixReader, PrefixWriter

Ts = TypeVarTuple("Ts")
T = TypeVar("T")

PIECE_BYTES = 4 << 20  # blocks that are on their way at once, or a single one if it is larger


class InThread(Protocol):
    """Runs a function where it may block; checks for cancellation before and then waits for the end of it."""

    async def __call__(self, sync_fn: Callable[[*Ts], T], *args: *Ts) -> T:
        """Return what `sync_fn(*args)` returns."""


@attrs.frozen(kw_only=True)
class PrefixFiles:
    """Saves and restores the KV of prefixes, a few blocks at a time; files are read and written in threads.

    One prefix is on its way at a time, others wait, so that buffers never take more than `PIECE_BYTES` or one block.
    """

    kv: KVBlocks
    layout: KVLayout
    transfer: Callable[[ReadBlocks | WriteBlocks], Awaitable[Done]]  # between batches
    give_back: Callable[[Lease], None]
    in_thread: InThread = trio.to_thread.run_sync
    _turn: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    @property
    def whole_block(self) -> int:
        """Tokens of a block."""
        return self.kv.block_tokens

    def whole(self, n_tokens: int) -> int:
        """Return how many of the first `n_tokens` tokens whole blocks hold."""
        return n_tokens // self.kv.block_tokens * self.kv.block_tokens

    def hold(self, tokens: Sequence[int]) -> Lease | None:
        """Return a lease of the blocks of all `tokens` if they are shared or cached; the caller gives it back."""
        shared = self.kv.find(partial(_slice, tokens), len(tokens))
        if len(shared) * self.kv.block_tokens < len(tokens):
            return None
        return self.kv.reserve(len(shared), shared)

    async def save(self, lease: Lease, tokens: Sequence[int], path: str | os.PathLike[str]) -> None:
        """Write the blocks of `tokens`, the first ones of a lease, to a file; it is there whole or as it was before.

        If cancelled, the part of the file that is being written is still written, and then removed.

        Raises:
            OSError: the file cannot be written.
            EngineClosed: the engine was closed.
        """
        in_thread = self.in_thread
        n_blocks = len(tokens) // self.kv.block_tokens
        async with self._turn:
            with PrefixWriter(path, self.layout, tokens) as writer:
                await in_thread(writer.begin)
                for first in range(0, n_blocks, self._piece):
                    piece = tuple(lease.blocks[first : min(first + self._piece, n_blocks)])
                    done = await self.transfer(ReadBlocks(piece))
                    assert done.kv is not None
                    for block in done.kv:
                        await in_thread(writer.write, block)
                await in_thread(writer.commit)

    async def load(self, path: str | os.PathLike[str]) -> int:
        """Read a file into cached blocks and return how many tokens they hold; what is cached already stays.

        If cancelled, or if anything in the file is wrong, nothing has changed, but that cached blocks may have given
        way.

        Raises:
            PrefixFileError: the file is malformed, damaged or of another model, or its blocks do not fit.
            ConfigError: the KV accounting keeps no prefixes.
            OSError: it cannot be read.
            EngineClosed: the engine was closed.
        """
        if not self.kv.prefix_reuse:
            raise ConfigError("prefix_reuse is off, so that nothing restored would be used; open the engine with it on")
        in_thread = self.in_thread
        async with self._turn:
            with PrefixReader(path, self.layout, self.kv.n_blocks) as reader:
                await in_thread(reader.begin)
                await in_thread(reader.verify)
                lease = self._reserve(reader)
                try:
                    for first in range(len(lease.nodes), reader.n_blocks, self._piece):
                        numbers = range(first, min(first + self._piece, reader.n_blocks))
                        data = tuple([await in_thread(reader.read, number) for number in numbers])
                        await self.transfer(WriteBlocks(tuple(lease.blocks[n] for n in numbers), data))
                    self.kv.share(lease, partial(_slice, reader.tokens), len(reader.tokens))
                finally:
                    self.give_back(lease)
                return len(reader.tokens)

    def _reserve(self, reader: PrefixReader) -> Lease:
        """Take the blocks that a file needs; those that hold its beginning already are taken as they are."""
        shared = self.kv.find(partial(_slice, reader.tokens), len(reader.tokens))
        lease = self.kv.reserve(reader.n_blocks, shared)
        if lease is None:
            statistics = self.kv.statistics()
            raise PrefixFileError(
                reader.path,
                None,
                f"its {reader.n_blocks} blocks do not fit beside the sequences that run: "
                f"{statistics.available} of {statistics.n_blocks} can be had now; load it before, or raise the memory",
            )
        return lease

    @property
    def _piece(self) -> int:
        """Blocks that are on their way at once."""
        return max(1, PIECE_BYTES // self.layout.block_bytes)


def _slice(tokens: Sequence[int], first: int, last: int) -> Sequence[int]:
    return tokens[first:last]
