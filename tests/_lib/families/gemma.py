"""Gemma 4, dense and with experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests._lib.families.family import VOCAB, Array, Family, Rename, usual_names

FULL, WINDOW = "full_attention", "sliding_attention"


def keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Gemma 4 file."""
    kinds = config.layer_types
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    full, window = layers[kinds.index(FULL)], layers[kinds.index(WINDOW)]
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_per_layer_input": 0,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": window.head_dim,
        "attention.value_length_swa": window.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [kind == WINDOW for kind in kinds],
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": window.head_dim,
        "rope.freq_base": float(config.rope_parameters[FULL]["rope_theta"]),
        "rope.freq_base_swa": float(config.rope_parameters[WINDOW]["rope_theta"]),
    }
    if config.enable_moe_block:
        values |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.top_k_experts,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    return values


def names(config: Any) -> Rename:
    """Return the renaming of a Gemma 4 file."""
    usual = usual_names("gemma4", config.num_hidden_layers)
    own = {
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "layer_scalar": "layer_output_scale.weight",
    }

    def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        return [(f"blk.{layer}.{own[rest]}", array)] if rest in own else usual(name, array)

    return rename


def factors(model: Any) -> dict[str, Array]:
    """Return the factors of the layers that see everything: 1, or for pairs that do not turn so much that they stay."""
    turns = model.model.rotary_emb.full_attention_inv_freq.numpy()
    return {"rope_freqs.weight": np.where(turns > 0, 1, 1e30).astype(np.float32)}


SETTINGS = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": [WINDOW, FULL, WINDOW, FULL],
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "head_dim": 16,
    "global_head_dim": 24,
    "intermediate_size": 112,
    "sliding_window": 13,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 7.0,
    "rms_norm_eps": 1e-6,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GEMMA4 = Family(
    arch="gemma4",
    model="Gemma4ForCausalLM",
    config="Gemma4TextConfig",
    settings=SETTINGS | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 80},
    keys=keys,
    rename=names,
    extra=factors,
    variants={"dense": {"enable_moe_block": False, "attention_k_eq_v": False}},
)
