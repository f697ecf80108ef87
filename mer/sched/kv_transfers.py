"""KV blocks on their way from and to the worker, in the gaps between batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import attrs
import trio

from mer.compute.messages import Done, ReadBlocks, WriteBlocks
from mer.errors import EngineClosed, MerError
from mer.sched.layer import WorkerLink


@attrs.define(eq=False)
class _Transfer:
    """An operation that somebody waits for."""

    operation: ReadBlocks | WriteBlocks
    ended: trio.Event = attrs.field(factory=trio.Event, init=False)
    result: Done | MerError | None = attrs.field(default=None, init=False)


class Transfers:
    """A line of operations on KV blocks, each served once, by the task that also runs the batches.

    Args:
        link: to the worker.
        wake: called when there is something to serve.
    """

    def __init__(self, link: WorkerLink, wake: Callable[[], None]) -> None:
        self._link = link
        self._wake = wake
        self._waiting: deque[_Transfer] = deque()
        self._closed = False

    async def run(self, operation: ReadBlocks | WriteBlocks) -> Done:
        """Wait until an operation has run in a gap between batches, and return its result.

        If cancelled, an operation that has not begun never does; one that has begun is finished before anything else
        happens to the blocks, and its result is dropped.

        Raises:
            MerError: the operation failed.
            EngineClosed: the scheduler has stopped.
        """
        if self._closed:
            raise EngineClosed("the engine is closed")
        transfer = _Transfer(operation)
        self._waiting.append(transfer)
        self._wake()
        try:
            await transfer.ended.wait()
        except BaseException:
            if transfer in self._waiting:
                self._waiting.remove(transfer)
            raise
        if isinstance(transfer.result, Done):
            return transfer.result
        raise transfer.result or EngineClosed("the engine was closed before the blocks were there")

    async def serve(self) -> None:
        """Run the operations that wait now; a batch may follow before those that come meanwhile.

        If cancelled, the operation that runs ends with EngineClosed.
        """
        for _ in range(len(self._waiting)):
            if not self._waiting:  # cancelled meanwhile
                return
            transfer = self._waiting.popleft()
            try:
                transfer.result = await self._link.run(transfer.operation)
            except EngineClosed:
                raise
            except MerError as error:
                transfer.result = error
            finally:
                transfer.ended.set()

    def close(self) -> None:
        """Let every `run` raise EngineClosed."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft().ended.set()
