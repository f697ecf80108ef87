"""The `gemma4` architecture: Gemma 4 (Google DeepMind 2026), dense and with experts."""

from __future__ import annotations

import attrs

from mer.limits import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS, MAX_WIDTH
from mer.model.keys import Keys
from mer.model.operators import (
    GEGLU,
    Addition,
    Attention,
    Experts,
    FeedForward,
    Layer,
    Norm,
    Rope,
    RopeStyle,
    Routing,
    Scoring,
    vector,
)
from mer.model.spec import ModelSpec
from mer.model.transformer import Trunk, is_dense, read_routing


def model(keys: Keys) -> ModelSpec:
    """Return the model of a `gemma4` file.

    Most layers attend within a window; the others have wider heads, fewer of them for keys, and K's projection for V
    where the file has none. Q, K and V are normalized by head, so that scores are not scaled. A layer with experts has
    a network for every token too; the router, the experts and that network each read a norm of their own, and what
    they give is normalized apart and together.

    Raises:
        GGUFError: a hyperparameter is missing, out of range or contradicts another one.
        UnsupportedModel: the model has inputs of each layer's own, or layers that share keys and values.
    """
    keys.neutral("embedding_length_per_layer_input", 0)
    keys.neutral("attention.shared_kv_layers", 0)
    kv_heads = keys.per_layer("attention.head_count_kv", minimum=1, maximum=MAX_HEADS)
    windowed = keys.per_layer("attention.sliding_window_pattern", maximum=1)
    trunk = Trunk.read(keys, n_kv_heads=max(kv_heads))
    narrow = keys.integer("attention.key_length_swa", default=trunk.head_dim, maximum=MAX_HEAD_DIM)
    keys.neutral("attention.value_length_swa", narrow)
    window = keys.integer("attention.sliding_window", maximum=MAX_CONTEXT)
    # of layers that see everything, and of those with a window
    ropes = trunk.rope(RopeStyle.NEOX, factors=True), trunk.window_rope(narrow, base=10000.0, dim=narrow)
    dense = is_dense(keys)
    n, top_k = (0, 0) if dense else read_routing(keys, trunk.n_layers)
    experts_ff = 0 if dense else keys.integer("expert_feed_forward_length", maximum=MAX_WIDTH)
    layers = []
    for i in range(trunk.n_layers):
        own = attrs.evolve(
            trunk,
            n_kv_heads=kv_heads[i],
            head_dim=narrow if windowed[i] else trunk.head_dim,
            window=window if windowed[i] and window < trunk.context_length else None,
        )
        network = trunk.feed_forward(i, keys.integer("feed_forward_length", maximum=MAX_WIDTH), activation=GEGLU)
        ffn = network if dense else _experts(trunk, i, n, top_k, experts_ff, network)
        layers.append(_layer(trunk, i, _attention(own, i, ropes[windowed[i]]), ffn))
    cap = keys.real("final_logit_softcapping", default=30.0, maximum=1e6)
    return attrs.evolve(trunk.model(layers, embedding_scale=trunk.d_model**0.5), softcap=cap)


def _attention(trunk: Trunk, layer: int, rope: Rope) -> Attention:
    attention = trunk.attention(layer, rope, qk_norm=True, scale=1.0)
    if attention.v.weight.stored not in trunk.keys.gguf.tensors:
        attention = attrs.evolve(attention, v=attention.k)
    return attrs.evolve(attention, v_eps=trunk.eps)


def _experts(trunk: Trunk, layer: int, n: int, top_k: int, d_ff: int, network: FeedForward) -> Experts:
    block = f"blk.{layer}."
    routing = Routing(scoring=Scoring.SOFTMAX, normalize=True)
    experts = trunk.experts(layer, n, top_k, d_ff, routing=routing, shared=network, activation=GEGLU)
    scale = vector(f"{block}ffn_down_exps.scale", n)
    read = vector(f"{block}ffn_gate_inp.scale", trunk.d_model)
    return attrs.evolve(
        experts,
        router=attrs.evolve(experts.router, expert_scale=scale),
        router_norm=Norm(read, trunk.eps, trunk.d_model**-0.5),
        shared_norm=trunk.norm(f"{block}ffn_norm"),
        shared_post=trunk.norm(f"{block}post_ffw_norm_1"),
        routed_post=trunk.norm(f"{block}post_ffw_norm_2"),
    )


def _layer(trunk: Trunk, layer: int, mixer: Attention, ffn: FeedForward | Experts) -> Layer:
    block = f"blk.{layer}."
    name = "layer_output_scale"
    has_suffix = f"{block}{name}.weight" in trunk.keys.gguf.tensors
    scale = vector(f"{block}{name}.weight" if has_suffix else block + name, 1)
    return Layer(
        trunk.norm(f"{block}attn_norm"),
        mixer,
        trunk.norm(f"{block}ffn_norm" if isinstance(ffn, FeedForward) else f"{block}pre_ffw_norm_2"),
        ffn,
        mixer_add=Addition(trunk.norm(f"{block}post_attention_norm")),
        ffn_add=Addition(trunk.norm(f"{block}post_ffw_norm"), scale),
    )
