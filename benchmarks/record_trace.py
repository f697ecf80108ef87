"""Record the routing of a model: which experts every batch used, layer by layer.

Usage: python benchmarks/record_trace.py TRACE [MODEL] [MAX_TOKENS] [PROMPT ...]

Greedy answers to some prompts, one after another, 128 tokens each unless said otherwise; MODEL is a GGUF file, or "-"
for the model that comes with mer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import trio

import mer
from mer.config import EngineConfig
from mer.embedded import embedded_model_path
from mer.plan import load_model
from mer.sched.experts import ExpertCache
from mer.sched.fingerprint import model_fingerprint
from mer.sched.trace import TraceHeader, TraceWriter

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The old fisherman pulled his boat onto the beach and",
    "Tom and his dog went to the park. They saw",
    "It was a dark night, and the wind",
    "In the kitchen, the cook was making",
    "The king had three sons. The youngest",
)


async def record(target: Path, model_path: Path, max_tokens: int, prompts: Iterable[str]) -> None:
    """Generate, and write what the cache is asked for; it is not told how many tokens a batch has."""
    model = load_model(EngineConfig(path=model_path))
    sizes = tuple(max(extents.n_bytes for extents in layer) for layer in model.experts.experts)
    spec = model.spec
    header = TraceHeader(spec.n_layers, spec.n_experts, spec.top_k, model_fingerprint(model.gguf), sizes)
    lookup = ExpertCache.lookup
    with TraceWriter(target, header) as writer:

        def recorded(cache: ExpertCache, layer: int, experts: Iterable[int]) -> tuple[list[int], list[int]]:
            union = list(experts)
            writer.append(layer, 0, union)
            return lookup(cache, layer, union)

        ExpertCache.lookup = recorded  # type: ignore[method-assign, assignment]
        async with mer.open_engine(model_path) as engine:
            for prompt in prompts:
                done = await engine.generate(prompt, max_tokens=max_tokens, ignore_eos=True)
                print(f"{done.usage.prompt_tokens} + {done.usage.completion_tokens} tokens: {done.text[:60]!r}")


def main() -> None:
    """Run the command line."""
    target, model, max_tokens, *prompts = [*sys.argv[1:], *("-", "128")[len(sys.argv) - 2 :]]
    path = embedded_model_path() if model == "-" else Path(model)
    trio.run(record, Path(target), path, int(max_tokens), prompts or PROMPTS)


if __name__ == "__main__":
    main()
