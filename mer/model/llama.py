"""The `llama` architecture: Llama and its like (Touvron et al. 2023), and Mixtral (Jiang et al. 2024), with experts."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, is_dense, read_routing


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `llama` file.

    Files of this architecture store the rows of Q and K permuted, so that RoPE on neighbouring elements of them equals
    RoPE on the two halves of each head of the original weights. Some models have biases, in any of their maps.
    """
    dense = is_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = (0, 0) if dense else read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    keys.neutral("expert_feed_forward_length", 0, d_ff)  # some converters write it too
    rope = trunk.rope(RopeStyle.INTERLEAVED, factors=True)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qkv_bias=None, out_bias=None)
        ffn = trunk.feed_forward(i, d_ff, bias=None) if dense else trunk.experts(i, n, top_k, d_ff)
        layers.append(trunk.layer(i, attention, ffn))
    return trunk.model(layers)
