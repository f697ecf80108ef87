"""The `bailingmoe2` architecture: Ling 2.0 and Ring 2.0 (Ling Team 2025, "Every Activation Boosted")."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.mixture import Mixture
from mer.model.operators import RopeStyle, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `bailingmoe2` file.

    Q, K and V are stored as one tensor. Q and K are normalized per head before RoPE, which rotates a part of it.
    """
    trunk = Trunk.read(keys)
    mixture = Mixture.read(trunk, Scoring.SIGMOID, normalize=False)
    rope = trunk.rope(RopeStyle.NEOX)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qk_norm=True, qkv_bias=None, out_bias=None)
        layers.append(trunk.layer(i, attention, mixture.ffn(i)))
    return trunk.model(layers)
