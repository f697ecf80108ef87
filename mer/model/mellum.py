"""The `mellum` architecture: Mellum 2 (JetBrains 2026)."""

from __future__ import annotations

import attrs

from mer.model.keys import Keys
from mer.model.operators import RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_expert_width, read_routing, refuse_dense

_PERIOD = 4


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `mellum` file: that of `qwen3moe`, with a window in three of four layers.

    Layers with a window may rotate with another base.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = read_expert_width(keys, top_k)
    windowed = keys.pattern("attention.sliding_window_pattern", default=_PERIOD)
    rope = trunk.rope(RopeStyle.NEOX)
    if rope.yarn is not None or rope.scale != 1:
        raise keys.unsupported(
            "a 'mellum' model with a scaled RoPE: whether layers with a window have it too is unknown"
        )
    near = attrs.evolve(rope, base=keys.real("rope.freq_base_swa", default=rope.base, maximum=1e15))
    full = attrs.evolve(trunk, window=None)
    layers = []
    for i in range(trunk.n_layers):
        attention = (trunk if windowed[i] else full).attention(i, near if windowed[i] else rope, qk_norm=True)
        layers.append(trunk.layer(i, attention, trunk.experts(i, n, top_k, d_ff)))
    return trunk.model(layers)
