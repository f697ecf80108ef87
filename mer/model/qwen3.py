"""The `qwen3` architecture: the dense models of Qwen3 (Qwen Team 2025, "Qwen3 Technical Report")."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `qwen3` file: that of `qwen3moe` with one network in place of the experts."""
    trunk = Trunk.read(keys)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    rope = trunk.rope(RopeStyle.NEOX)
    return trunk.model(
        [
            trunk.layer(i, trunk.attention(i, rope, qk_norm=True), trunk.feed_forward(i, d_ff))
            for i in range(trunk.n_layers)
        ]
    )
