"""The `ernie4_5-moe` architecture: the Mixture-of-Experts models of ERNIE 4.5 (Baidu 2025)."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.mixture import Mixture
from mer.model.operators import RopeStyle, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of an `ernie4_5-moe` file.

    RoPE rotates neighbouring elements, as in the original weights. Shares of a softmax over all experts, plus a bias,
    choose; those of the chosen are always normalized.
    """
    keys.neutral("expert_weights_norm", True)
    trunk = Trunk.read(keys)
    mixture = Mixture.read(trunk, Scoring.SOFTMAX, normalize=True, n_shared=0)
    rope = trunk.rope(RopeStyle.INTERLEAVED)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qkv_bias=None, out_bias=None)
        layers.append(trunk.layer(i, attention, mixture.ffn(i)))
    return trunk.model(layers)
