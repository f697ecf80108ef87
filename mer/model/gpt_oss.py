"""The `gpt-oss` architecture: OpenAI's gpt-oss-20b and gpt-oss-120b (2025)."""

from __future__ import annotations

from typing import Final

import attrs

from mer.limits import MAX_CONTEXT, MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import Activation, Layer, RopeStyle
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, read_routing, refuse_dense

CLAMPED: Final = Activation(alpha=1.702, limit=7.0, shift=1.0)
"""The experts' activation; no key of a file has its numbers."""


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `gpt-oss` file.

    Every linear map of a layer has a bias, the router and the experts included. Each head has a sink. Layers of even
    numbers attend within a window, all others to everything. YaRN's limits are not rounded to whole pairs, as in
    transformers and in OpenAI's own code; llama.cpp rounds them, and no key tells. The norm before the experts has the
    name of one behind the attention.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: a window layer's angles are others, or the model has no experts.
    """
    refuse_dense(keys)
    trunk = Trunk.read(keys)
    n, top_k = read_routing(keys, trunk.n_layers)
    d_ff = keys.integer("expert_feed_forward_length", maximum=MAX_WIDTH)
    window = keys.integer("attention.sliding_window", maximum=MAX_CONTEXT)
    keys.ignore("feed_forward_length")  # of dense layers, which there are none of
    keys.neutral("expert_gating_func", 0, 3)  # 3: a softmax over the chosen, which it is without the key too
    rope = trunk.rope(RopeStyle.NEOX, whole_pairs=False)
    keys.neutral("rope.freq_base_swa", rope.base)
    if "output.weight" not in keys.gguf.tensors:
        raise keys.malformed("tensor 'output.weight' is missing")
    layers = []
    for i in range(trunk.n_layers):
        own = attrs.evolve(trunk, window=window if i % 2 == 0 and window < trunk.context_length else None)
        attention = own.attention(i, rope, qkv_bias=True, out_bias=True, sinks=True)
        experts = trunk.experts(i, n, top_k, d_ff, activation=CLAMPED, bias=True)
        norms = trunk.norm(f"blk.{i}.attn_norm"), trunk.norm(f"blk.{i}.post_attention_norm")
        layers.append(Layer(norms[0], attention, norms[1], experts))
    return trunk.model(layers)
