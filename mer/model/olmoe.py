"""The `olmoe` architecture: OLMoE (Muennighoff et al. 2024)."""

from __future__ import annotations

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import HeadNorms, RopeStyle, Routing, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of an `olmoe` file.

    All heads of Q are normalized as one vector, and all of K. The router's weights are shares of all experts, and stay
    so.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    keys.neutral("expert_feed_forward_length", 0, d_ff)
    keys.neutral("expert_weights_norm", False)
    rope, routing = trunk.rope(RopeStyle.NEOX), Routing(scoring=Scoring.SOFTMAX)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qk_norm=True, norms=HeadNorms.WHOLE)
        layers.append(trunk.layer(i, attention, trunk.experts(i, n, top_k, d_ff, routing=routing)))
    return trunk.model(layers)
