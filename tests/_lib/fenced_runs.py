"""Everything that kernels do, between guard pages; a program of its own, as it dies of an overrun.

    python -m tests._lib.fenced_runs FOLDER [BUG [TYPE ...]]

Products of each weight type, by default of all, on areas that are fenced, and engines of models of odd sizes that
generate in memory that is. FOLDER takes the models. BUG seeds an overrun: with "element" each area that products write
to is a byte too short, with "kv" the memory of keys and values 64 bytes; "" seeds none.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trio

import mer
from mer.compute.kernels.target import FORM
from mer.config import KVType
from mer.io.extents import MATRIX_TYPES
from mer.io.ggml import GGMLType
from tests._lib import fence, steps
from tests._lib.tiny_models import Type, tiny_model
from tests.compute.kernels.test_matmul import exact_activations, random_weights

KV_TYPES: tuple[KVType, ...] = ("f32", "f16", "q8_0")
SHAPE: dict[str, Any] = {"vocab_size": 301, "n_experts": 5, "top_k": 3, "context_length": 192}
ODD: dict[str, Any] = SHAPE | {"d_model": 72, "d_ff": 75, "n_heads": 3, "n_kv_heads": 1, "head_dim": 26}  # of F32, F16
SMALL: dict[str, Any] = SHAPE | {"d_model": 96, "d_ff": 160, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32}  # by 32
LARGE: dict[str, Any] = SHAPE | {"d_model": 256, "d_ff": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64}  # by 256
SHAPES = {1: ("ODD", ODD), 32: ("SMALL", SMALL), 64: ("LARGE", LARGE), 256: ("LARGE", LARGE)}  # by weights to a block


async def generate(path: Path, number: int) -> None:
    """Generate from five prompts of odd lengths, two at once, which take all of the KV memory, with evictions."""
    kv_type: KVType = KV_TYPES[number % (2 if "ODD" in path.name else 3)]  # q8_0 needs whole blocks to a head
    async with mer.open_engine(
        path, memory="8GiB", slots=3, threads=2, batch_tokens=37, max_sequences=2, kv_type=kv_type,
        activations=("int8", "int15")[number % 2],
    ) as engine:  # fmt: skip

        async def one(length: int) -> None:
            prompt = [3 + (7 * i + length) % 290 for i in range(length)]
            done = await engine.generate(prompt, max_tokens=6, ignore_eos=True)
            assert len(done.tokens) == 6

        async with trio.open_nursery() as nursery:
            for length in (185, 186, 66, 5, 1):
                nursery.start_soon(one, length)
        assert engine.statistics().cache.evictions > 0
        assert engine.plan.limits.kv_blocks == 6, engine.plan.limits


def model(folder: Path, kind: GGMLType, number: int) -> Path:
    """Write a model of a type and return its path; the architectures take turns."""
    name, shape = SHAPES[kind.block_size]
    path = folder / f"{kind.name}-{name}.gguf"
    more: dict[str, Any] = {"arch": ("llama", "qwen3moe")[number % 2], "sliding_window": (None, 50)[number % 2]}
    tiny_model(path, weight_type=Type(int(kind)), **more, **shape)
    return path


def products(kinds: Sequence[GGMLType]) -> None:
    """Multiply by matrices of odd sizes, each on its own between fences."""
    rng = np.random.default_rng(0)
    for kind in kinds:
        for planes in (1, 2) if kind.block_size > 1 else (1,):
            rows, cols = (37, 256) if kind.block_size > 1 else (7, 21)
            raw, x = random_weights(kind, rows, cols, rng), exact_activations(15, cols, rng, planes)
            assert np.isfinite(steps.product(kind, raw, rows, x, planes=planes, n_threads=2)).all()


def main(folder: str, bug: str = "", *names: str) -> None:
    """Run everything for each type, and print its name; before that the form of the kernels."""
    kinds = [GGMLType[name] for name in names] or sorted(MATRIX_TYPES)
    fence.install()
    steps.Areas = fence.FencedAreas  # type: ignore[misc]
    if bug == "kv":
        fence.FencedMemory.shortened = 64
    elif bug == "element":
        fence.FencedAreas.shortened = 1
    elif bug:
        raise SystemExit(f"no bug is called {bug!r}")
    print(FORM.value, flush=True)
    for number, kind in enumerate(kinds):
        products([kind])
        trio.run(generate, model(Path(folder), kind, number), number)
        print(kind.name, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
