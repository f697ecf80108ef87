"""The `minimax-m2` architecture: MiniMax-M2 and its successors (MiniMax 2025)."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.mixture import Mixture
from mer.model.operators import HeadNorms, RopeStyle, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `minimax-m2` file.

    All heads of Q are normalized as one vector, and all of K, before RoPE, which rotates a part of each. Weights are
    always normalized.
    """
    keys.neutral("expert_weights_norm", True)
    trunk = Trunk.read(keys)
    mixture = Mixture.read(trunk, Scoring.SIGMOID, normalize=True, selection_bias=True, n_shared=0)
    rope = trunk.rope(RopeStyle.NEOX)
    layers = []
    for i in range(trunk.n_layers):
        attention = trunk.attention(i, rope, qk_norm=True, norms=HeadNorms.WHOLE)
        layers.append(trunk.layer(i, attention, mixture.ffn(i)))
    return trunk.model(layers)
