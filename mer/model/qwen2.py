"""The `qwen2` architecture: the dense models of Qwen2 and Qwen2.5 (Qwen Team 2024)."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `qwen2` file: Q, K and V have biases."""
    trunk = Trunk.read(keys)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    rope = trunk.rope(RopeStyle.NEOX)
    return trunk.model(
        [
            trunk.layer(i, trunk.attention(i, rope, qkv_bias=True), trunk.feed_forward(i, d_ff))
            for i in range(trunk.n_layers)
        ]
    )
