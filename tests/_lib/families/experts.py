"""Families with routed experts and ordinary attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests._lib.families.dense import llama_names
from tests._lib.families.family import Array, Family, Rename, common, common_keys


def expert_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a family whose experts have a width of their own."""
    keys = common_keys(config) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "feed_forward_length": 4 * config.hidden_size,
    }
    if getattr(config, "sliding_window", None) is not None:
        keys["attention.sliding_window"] = config.sliding_window
    return keys


def mixtral_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Mixtral file."""
    return common_keys(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }


def shared_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a family whose experts share a network."""
    return expert_keys(config) | {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}


ROUTED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "tie_word_embeddings": False}

MIXTRAL = Family(
    arch="llama",
    name="mixtral",
    model="MixtralForCausalLM",
    config="MixtralConfig",
    settings=common(
        intermediate_size=160,
        num_local_experts=5,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
        sliding_window=None,
    ),
    keys=mixtral_keys,
    rename=llama_names,
)
QWEN2_MOE = Family(
    arch="qwen2moe",
    model="Qwen2MoeForCausalLM",
    config="Qwen2MoeConfig",
    settings=common(**ROUTED, shared_expert_intermediate_size=112, norm_topk_prob=False, sliding_window=None),
    keys=shared_keys,
)
QWEN3_MOE = Family(
    arch="qwen3moe",
    model="Qwen3MoeForCausalLM",
    config="Qwen3MoeConfig",
    settings=common(**ROUTED, head_dim=24, norm_topk_prob=True, sliding_window=None),
    keys=expert_keys,
    variants={
        "window": {"sliding_window": 13, "use_sliding_window": True, "max_window_layers": 0},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "max_position_embeddings": 128,
        },
    },
)


def granite_keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a Granite file."""
    keys = common_keys(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "feed_forward_length": config.intermediate_size,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention.scale": config.attention_multiplier,
        "logit_scale": config.logits_scaling,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
    }
    shared = getattr(config, "shared_intermediate_size", 0)
    return keys | ({"expert_shared_feed_forward_length": shared} if shared else {})


def granite_names(config: Any) -> Rename:
    """Return the renaming of a Granite file: Q and K permuted as for `llama`, gate and up apart."""
    usual = llama_names(config)

    def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if name.endswith("shared_mlp.input_linear.weight"):
            gate, up = np.split(array, 2)
            return [(f"{block}ffn_gate_shexp.weight", gate), (f"{block}ffn_up_shexp.weight", up)]
        if name.endswith("shared_mlp.output_linear.weight"):
            return [(f"{block}ffn_down_shexp.weight", array)]
        if name.endswith("block_sparse_moe.router.weight"):
            return [(f"{block}ffn_gate_inp.weight", array)]
        return usual(name, array)

    return rename


GRANITE = {
    "rms_norm_eps": 0.02,  # large, so that what is done to it shows
    "intermediate_size": 80,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 7.5,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.11,
    "logits_scaling": 6.0,
}
GRANITE_MOE = Family(
    arch="granitemoe",
    model="GraniteMoeForCausalLM",
    config="GraniteMoeConfig",
    settings=common(**GRANITE, tie_word_embeddings=True),
    keys=granite_keys,
    rename=granite_names,
)
GRANITE_SHARED = Family(
    arch="granitemoe",
    name="granitemoe-shared",
    model="GraniteMoeSharedForCausalLM",
    config="GraniteMoeSharedConfig",
    settings=common(**GRANITE, tie_word_embeddings=False, shared_intermediate_size=112),
    keys=granite_keys,
    rename=granite_names,
)
