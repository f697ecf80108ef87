"""The `glm4moe` architecture: GLM-4.5 to 4.7 (GLM-4.5 Team 2025) and Solar Open."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.mixture import Mixture
from mer.model.operators import RopeStyle, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `glm4moe` file.

    The norm before the feed-forward half is stored as `post_attention_norm`. The large models normalize Q and K per
    head, and GLM-4.5-Air does not; most have biases for Q, K and V.
    """
    trunk = Trunk.read(keys)
    mixture = Mixture.read(trunk, Scoring.SIGMOID, normalize=False, selection_bias=True)
    rope = trunk.rope(RopeStyle.NEOX)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qk_norm=None, qkv_bias=None)
        layers.append(trunk.layer(i, attention, mixture.ffn(i), ffn_norm="post_attention_norm"))
    return trunk.model(layers)
