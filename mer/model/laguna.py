"""The `laguna` architecture: the Laguna models (Poolside 2026)."""

from __future__ import annotations

import attrs

from mer.limits import MAX_HEADS
from mer.model.keys import REQUIRED, Keys
from mer.model.mixture import Mixture
from mer.model.operators import Attention, Linear, RopeStyle, Scoring, Tensor
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `laguna` file.

    Layers have their own numbers of heads. Most see a window, and rotate otherwise; YaRN is for the others. What is
    attended passes a gate, whose rows say whether there is one for each head or for each element.
    """
    keys.neutral("expert_weights_norm", True)
    n_heads = keys.per_layer("attention.head_count", minimum=1, maximum=MAX_HEADS)
    trunk = Trunk.read(keys, n_heads=max(n_heads))
    windowed = keys.pattern("attention.sliding_window_pattern", default=REQUIRED)
    mixture = Mixture.read(trunk, Scoring.SIGMOID, normalize=True, n_shared=0)
    full = trunk.rope(RopeStyle.NEOX)
    near = trunk.window_rope(trunk.head_dim, base=full.base, dim=full.dim)
    layers = []
    for i in range(trunk.n_layers):
        own = attrs.evolve(trunk, n_heads=n_heads[i], window=trunk.window if windowed[i] else None)
        if own.n_heads % own.n_kv_heads:
            raise keys.error("attention.head_count", f"is {own.n_heads} in layer {i}, of {own.n_kv_heads} kv heads")
        attention = own.attention(i, near if windowed[i] else full, qk_norm=True)
        attention = attrs.evolve(attention, gate=_gate(own, i, attention))
        layers.append(trunk.layer(i, attention, mixture.ffn(i)))
    return trunk.model(layers)


def _gate(trunk: Trunk, layer: int, attention: Attention) -> Linear:
    """Return the map to a layer's gates."""
    name = f"blk.{layer}.attn_gate"
    stored = trunk.keys.gguf.tensors.get(f"{name}.weight")
    per_head = stored is None or stored.shape[0] == attention.n_heads
    return Linear(Tensor(f"{name}.weight", (attention.n_heads if per_head else attention.out.cols, trunk.d_model)))
