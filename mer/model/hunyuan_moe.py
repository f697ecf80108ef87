"""The `hunyuan-moe` architecture: Hunyuan-A13B (Tencent Hunyuan Team 2025)."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import HeadNorms, RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `hunyuan-moe` file.

    Q and K are normalized per head after RoPE. In every layer the experts share a network.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    wide = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    d_ff = keys.integer("expert_feed_forward_length", default=wide, maximum=MAX_WIDTH)
    shared_ff = keys.integer("expert_shared_feed_forward_length", maximum=MAX_WIDTH)
    keys.ignore("expert_shared_count")  # the width says it all
    rope = trunk.rope(RopeStyle.NEOX)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qk_norm=True, norms=HeadNorms.AFTER)
        shared = trunk.feed_forward(i, shared_ff, "_shexp")
        layers.append(trunk.layer(i, attention, trunk.experts(i, n, top_k, d_ff, shared=shared)))
    return trunk.model(layers)
