"""Families with routed experts and ordinary attention."""

from __future__ import annotations

from typing import Any

from tests._lib.families.dense import llama_names
from tests._lib.families.family import Family, common, common_keys


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
