"""The `granitemoe` architecture: the Mixture-of-Experts models of Granite 3 (IBM 2024)."""

from __future__ import annotations

import attrs

from mer.limits import MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing, refuse_dense


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `granitemoe` file.

    Embeddings, what each half of a layer adds, scores and logits are scaled. What layers add needs no step for its
    scale r: a stream that is r times smaller from the start takes the same steps unscaled, since a norm with eps / r**2
    gives the same for it.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("feed_forward_length", maximum=MAX_WIDTH)
    keys.neutral("expert_feed_forward_length", 0, d_ff)
    shared_ff = keys.integer("expert_shared_feed_forward_length", default=0, minimum=0, maximum=MAX_WIDTH)
    residual_scale = keys.real("residual_scale", default=1.0, maximum=1e3)
    embedding_scale = keys.real("embedding_scale", default=1.0, maximum=1e3) / residual_scale
    logit_scale = 1 / keys.real("logit_scale", default=1.0, maximum=1e6)
    scale = keys.real("attention.scale", default=trunk.head_dim**-0.5, maximum=1e3)
    trunk = attrs.evolve(trunk, eps=trunk.eps / residual_scale**2)
    rope = trunk.rope(RopeStyle.INTERLEAVED)
    layers = []
    for i in range(trunk.n_layers):
        shared = trunk.feed_forward(i, shared_ff, "_shexp") if shared_ff else None
        experts = trunk.experts(i, n, top_k, d_ff, shared=shared)
        layers.append(trunk.layer(i, trunk.attention(i, rope, scale=scale), experts))
    return trunk.model(layers, embedding_scale=embedding_scale, logit_scale=logit_scale)
