"""The `dots1` architecture: dots.llm1 (rednote-hilab 2025, "dots.llm1 Technical Report")."""

from __future__ import annotations

from mer.model.keys import Keys
from mer.model.mixture import Mixture
from mer.model.operators import RopeStyle, Scoring
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `dots1` file: Q and K are normalized per head before RoPE, and nothing has a bias."""
    trunk = Trunk.read(keys)
    mixture = Mixture.read(trunk, Scoring.SIGMOID, normalize=False)
    rope = trunk.rope(RopeStyle.NEOX)
    return trunk.model(
        [trunk.layer(i, trunk.attention(i, rope, qk_norm=True), mixture.ffn(i)) for i in range(trunk.n_layers)]
    )
