"""The `qwen2moe` architecture: Qwen1.5-MoE and the Mixture-of-Experts model of Qwen2 (Qwen Team 2024)."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle, Routing, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_expert_width, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `qwen2moe` file.

    Q, K and V have biases. The router's weights are shares of all experts, and stay so. In every layer the experts
    share a network, which a sigmoid gates.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = read_expert_width(keys, top_k)
    shared_ff = keys.integer("expert_shared_feed_forward_length", maximum=MAX_WIDTH)
    keys.ignore("expert_shared_count")  # the width says it all
    keys.neutral("expert_weights_norm", False)
    rope = trunk.rope(RopeStyle.NEOX)
    routing = Routing(scoring=Scoring.SOFTMAX)
    layers = []
    for i in range(trunk.n_layers):
        shared = trunk.feed_forward(i, shared_ff, "_shexp", gated=True)
        experts = trunk.experts(i, n, top_k, d_ff, routing=routing, shared=shared)
        layers.append(trunk.layer(i, trunk.attention(i, rope, qkv_bias=True), experts))
    return trunk.model(layers)
