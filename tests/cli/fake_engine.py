"""A fake of the engine's public door: it answers a fixed story word by word, and can wait, fail or overflow."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal

import attrs
import numpy as np
import trio
import trio.testing

import mer
from mer.config import Progress
from mer.io.files import IoMode
from mer.sched.heat import HeatProfile

STORY = ("Once", " upon", " a", " time", " gr\u00fcn", ".", "\n", "\x1b[31mred", " end")


@attrs.define
class FakeCache:
    hits: int
    misses: int


@attrs.define
class FakeSettings:
    memory_bytes: int = 1 << 30
    slots: int = 20
    slot_counts: tuple[int, ...] = (20,)
    slot_bytes: tuple[int, ...] = (2 << 20,)
    kernels: str = "portable"
    activations: str = "int15"
    kv_type: str = "f16"
    threads: int = 3
    device: str = "cpu"
    device_reason: str = "auto: no NVIDIA driver is loaded"
    vram: None = None
    io_engine: str = "io_uring"
    io_modes: tuple[IoMode, ...] = (IoMode(True, 4096, "it works"), IoMode(False, 4096, "refused"))
    policy: str = "layer-lru"
    context: int = 128
    batch_tokens: int = 32


@attrs.define
class FakeWorker:
    n_threads: int = 3
    active_threads: int = 2
    active_reason: str = "others have the cores"


@attrs.define
class FakeStatistics:
    n_asked: int  # generations; every one adds as much as the others
    load_s: float = 0.5
    private_bytes: int = 99 << 20
    peak_rss_bytes: int = 123 << 20
    settings: FakeSettings = attrs.Factory(FakeSettings)
    worker: FakeWorker = attrs.Factory(FakeWorker)

    @property
    def cache(self) -> FakeCache:
        return FakeCache(30 * self.n_asked, 10 * self.n_asked)

    @property
    def bytes_read(self) -> int:
        return 1024 + 4096 * self.n_asked


@attrs.define
class FakeEngine:
    """Stands for `mer.Engine`; `open` stands for `mer.open_engine`."""

    error: BaseException | None = None  # raised by stream
    load_error: BaseException | None = None
    hangs_after: int | None = None  # tokens
    hangs_loading: bool = False
    on_hang: Callable[[], None] = lambda: None
    context: int = 4096
    opened: list[tuple[Any, dict[str, Any]]] = attrs.Factory(list)
    encoded: list[Any] = attrs.Factory(list)
    asked: list[tuple[list[int], dict[str, Any]]] = attrs.Factory(list)
    closed: bool = False

    @contextlib.asynccontextmanager
    async def open(self, path: Any, **options: Any) -> AsyncIterator[FakeEngine]:
        self.opened.append((path, options))
        report = options["on_progress"]
        report(Progress(stage="kernels", done=0, total=3, unit="kernels"))
        report(Progress(stage="kernels", done=3, total=3, unit="kernels"))
        report(Progress(stage="dense weights", done=10, total=10, unit="bytes"))
        if self.load_error is not None:
            raise self.load_error
        if self.hangs_loading:
            self.on_hang()
            await trio.sleep_forever()
        try:
            yield self
        finally:
            self.closed = True

    @property
    def plan(self) -> Any:
        return type("Plan", (), {"context": self.context})

    def encode(self, prompt: Any) -> list[int]:
        """A message is 10 tokens, and a text one for each character."""
        self.encoded.append(prompt if isinstance(prompt, str | mer.Chat) else list(prompt))
        if isinstance(prompt, str):
            return [ord(character) for character in prompt]
        items = prompt.messages if isinstance(prompt, mer.Chat) else prompt
        return [i for item in items for i in ([item] if isinstance(item, int) else range(10))]

    async def encode_prompt(self, prompt: Any) -> list[int]:
        await trio.lowlevel.checkpoint()
        return self.encode(prompt)

    @contextlib.asynccontextmanager
    async def stream(self, ids: list[int], **options: Any) -> AsyncIterator[trio.MemoryReceiveChannel[Any]]:
        self.asked.append((ids, options))
        if self.error is not None:
            raise self.error
        if len(ids) + options["max_tokens"] > self.context:
            raise mer.ContextOverflow("too long")
        send, receive = trio.open_memory_channel[Any](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, send, options["max_tokens"])
            with receive:
                yield receive
            nursery.cancel_scope.cancel()

    async def _tell(self, send: trio.MemorySendChannel[Any], max_tokens: int) -> None:
        words = STORY[:max_tokens]
        with send:
            await send.send(mer.PrefillEvent(done=4, total=4))
            for index, word in enumerate(words):
                if index == self.hangs_after:
                    await trio.testing.wait_all_tasks_blocked()
                    self.on_hang()
                    await trio.sleep_forever()
                last = index == len(words) - 1
                reason: Literal["stop", "length"] = "stop" if len(words) == len(STORY) else "length"
                await send.send(
                    mer.TokenEvent(
                        token=100 + index,
                        text=word,
                        index=index,
                        finish_reason=reason if last else None,
                        completion=completion(words, reason) if last else None,
                    )
                )

    def heat_profile(self) -> HeatProfile:
        return HeatProfile(bytes(32), np.array([[1, 2]]), np.array([3]))

    def statistics(self) -> FakeStatistics:
        return FakeStatistics(len(self.asked))


def completion(words: Sequence[str], reason: Literal["stop", "length"]) -> mer.Completion:
    return mer.Completion(
        text="".join(words),
        tokens=tuple(range(100, 100 + len(words))),
        finish_reason=reason,
        usage=mer.Usage(prompt_tokens=4, completion_tokens=len(words)),
        timings=mer.Timings(queue_s=0.25, prefill_s=0.75, decode_s=2.0, decode_bytes_read=800),
        seed=1,
    )
