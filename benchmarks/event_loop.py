"""How long the engine holds the event loop at most, with a vocabulary of 250 thousand tokens under load.

Usage: python benchmarks/event_loop.py [ROUNDS]

A small random model of Qwen3's shape is written to a temporary folder: what it computes takes little time, so that the
rest shows. Each round has four sampled streams, a chat of long messages, a long text and many token ids, first each
alone, then all at once. For each the longest step of a task and the 99th percentile are printed, in ms of wall time,
and the longest in ms of processor time, which a busy machine does not lengthen; the bar is 5 ms. Python's own garbage
collector stands apart: a full collection walks through all objects of the process, unless it is told to leave alone
those that are there already (`gc.freeze`), as it is here once the engine is open.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import time
from pathlib import Path

import attrs
import make_model
import trio
from shapes import SHAPES

import mer
from mer.engine import Prompt
from mer.testing import LoopWatch, watch_loop

BAR_MS = 5.0
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SHAPE = attrs.evolve(
    SHAPES["qwen3"].changed(2, d_model=64, d_ff=64, experts=8, vocab=250_000),
    keys=SHAPES["qwen3"].changed(2, d_model=64, d_ff=64, experts=8).keys
    | {
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "expert_used_count": 2,
    },
)
WORDS = " ".join(f"w{i * 7919 % 240_000}" for i in range(2000))
SAMPLED = mer.Sampling(temperature=0.8, top_p=0.95, seed=1)
LOAD: dict[str, list[Prompt]] = {
    "four sampled streams": ["w1 w2", "w3", "w4 w5 w6", "w7"],
    "a chat of long messages": [[mer.Message("user", WORDS), mer.Message("assistant", WORDS)]],
    "a long text": [WORDS],
    "16,000 token ids": [[300 + i % 1000 for i in range(16_000)]],
}


class Collections:
    """The longest collection of Python's garbage collector in the thread of the event loop."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._begun_s = 0.0
        self._thread = threading.get_ident()

    def __call__(self, phase: str, _: dict[str, int]) -> None:
        """See `gc.callbacks`."""
        if phase == "start":
            self._begun_s = time.perf_counter()
        elif threading.get_ident() == self._thread:
            self.longest_s = max(self.longest_s, time.perf_counter() - self._begun_s)


def report(name: str, wall: LoopWatch, cpu: LoopWatch, collections: Collections) -> None:
    """Print one line of the table."""
    figures = (wall.longest.seconds, wall.percentile_s(99), cpu.longest.seconds, collections.longest_s)
    print(f"{name:28}", *(f"{seconds * 1e3:12.2f}" for seconds in figures), f"{wall.steps:9}  {cpu.longest.task}")
    collections.longest_s = 0.0


async def measure(path: Path, rounds: int) -> None:
    """Print a line for the opening of an engine, and one for each part of the load and for all of it."""
    collections = Collections()
    gc.callbacks.append(collections)

    async def ask(engine: mer.Engine, prompt: Prompt) -> None:
        await engine.generate(prompt, max_tokens=16, sampling=SAMPLED, ignore_eos=True)

    with watch_loop() as wall, watch_loop(clock=time.thread_time) as cpu:
        opened = mer.open_engine(path, memory="8GiB", context=32_768, max_sequences=8, prefix_reuse=False)
        engine = await opened.__aenter__()
        await trio.lowlevel.checkpoint()
    report("opening", wall, cpu, collections)
    gc.collect()
    gc.freeze()
    collections.longest_s = 0.0
    for name, prompts in [*LOAD.items(), ("all of it at once", [p for group in LOAD.values() for p in group])]:
        with watch_loop() as wall, watch_loop(clock=time.thread_time) as cpu:
            for _ in range(rounds):
                async with trio.open_nursery() as nursery:
                    for prompt in prompts:
                        nursery.start_soon(ask, engine, prompt)
        report(name, wall, cpu, collections)
    await opened.__aexit__(None, None, None)


def main() -> None:
    """Write the model and print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        make_model.write(path, SHAPE, "q8_0", template=TEMPLATE)
        print(f"{'':28}", *(f"{title:>12}" for title in ("longest", "99 %", "longest CPU", "collection")), "    steps")
        print(f"{'bar':28}", *(f"{BAR_MS:12.2f}" for _ in range(3)))
        trio.run(measure, path, rounds)


if __name__ == "__main__":
    main()
