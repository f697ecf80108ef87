"""The `qwen3moe` architecture: the Mixture-of-Experts models of Qwen3 (Qwen Team 2025, "Qwen3 Technical Report")."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_expert_width, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `qwen3moe` file.

    Q and K are normalized per head before RoPE, which pairs the two halves of a head; their rows are stored unpermuted.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = read_expert_width(keys, top_k)
    rope = trunk.rope(RopeStyle.NEOX)
    return trunk.model(
        [
            trunk.layer(i, trunk.attention(i, rope, qk_norm=True), trunk.experts(i, n, top_k, d_ff))
            for i in range(trunk.n_layers)
        ]
    )
