"""The `qwen3vlmoe` architecture: the language model of Qwen3-VL's Mixture-of-Experts models (Qwen Team 2025)."""

from __future__ import annotations

from mer.model import qwen3moe
from mer.model.keys import Keys
from mer.model.spec import ModelSpec


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `qwen3vlmoe` file, which for text is that of `qwen3moe`.

    Positions of text are the same number in each of RoPE's sections, and nothing of an image is added to its layers.
    """
    keys.ignore("rope.dimension_sections", "n_deepstack_layers")
    return qwen3moe.model(keys)
