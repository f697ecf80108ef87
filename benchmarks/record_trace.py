"""Record the routing of a model: which experts every batch used, layer by layer.

Usage: python benchmarks/record_trace.py TRACE [MODEL] [MAX_TOKENS] [TEMPERATURE] [PROMPT ...]

Answers to some prompts, one after another, 128 tokens each at temperature 0.8 unless said otherwise, with fixed seeds;
MODEL is a GGUF file, or "-" for the model that comes with mer. `mer run --trace` does the same for one prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import trio

import mer

PROMPTS = (
    "Once upon a time there was a little girl who",
    "The old fisherman pulled his boat onto the beach and",
    "Tom and his dog went to the park. They saw",
    "It was a dark night, and the wind",
    "In the kitchen, the cook was making",
    "The king had three sons. The youngest",
    "The history of the lighthouse begins with",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""',
    "Photosynthesis is the process by which",
    "Q: What is the capital of France? A:",
    "In 1815, after the battle of Waterloo,",
    "The derivative of a function measures",
)


async def record(target: Path, model: Path, max_tokens: int, temperature: float, prompts: Iterable[str]) -> None:
    """Generate, and let the engine write the trace."""
    async with mer.open_engine(model, trace=target) as engine:
        for seed, prompt in enumerate(prompts):
            sampling = mer.Sampling(temperature=temperature, seed=seed)
            done = await engine.generate(prompt, max_tokens=max_tokens, sampling=sampling, ignore_eos=True)
            print(f"{done.usage.prompt_tokens} + {done.usage.completion_tokens} tokens: {done.text[:60]!r}")
        print(engine.statistics().trace)


def main() -> None:
    """Run the command line."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    target, model, max_tokens, temperature, *prompts = [*sys.argv[1:], *("-", "128", "0.8")[len(sys.argv) - 2 :]]
    path = mer.embedded_model_path() if model == "-" else Path(model)
    trio.run(record, Path(target), path, int(max_tokens), float(temperature), prompts or PROMPTS)


if __name__ == "__main__":
    main()
