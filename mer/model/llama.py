"""The `llama` architecture with experts: Mixtral (Jiang et al. 2024, "Mixtral of Experts") and its finetunes."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `llama` file with experts.

    Files of this architecture store the rows of Q and K permuted, so that RoPE on neighbouring elements of them equals
    RoPE on the two halves of each head of the original weights.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    keys.neutral("expert_feed_forward_length", 0, d_ff)  # some converters write it too
    rope = trunk.rope(RopeStyle.INTERLEAVED)
    return trunk.model(
        [trunk.layer(i, trunk.attention(i, rope), trunk.experts(i, n, top_k, d_ff)) for i in range(trunk.n_layers)]
    )
