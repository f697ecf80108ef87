"""The family of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tests._lib.families.family import Array, Family, Rename, common, common_keys, usual_names


def keys(config: Any) -> dict[str, Any]:
    """Return the metadata of a gpt-oss file."""
    return common_keys(config) | {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.intermediate_size,
        "attention.sliding_window": config.sliding_window,
    }


def names(config: Any) -> Rename:
    """Return the renaming: experts are stored the other way round, and their rows of gate and up alternate."""
    usual = usual_names("gpt-oss", config.num_hidden_layers)

    def rename(name: str, array: Array) -> Iterable[tuple[str, Array]]:
        block = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        stored = array.swapaxes(1, 2) if array.ndim == 3 else array
        kind = "bias" if name.endswith("_bias") else "weight"
        if "experts.gate_up_proj" in name:
            return [(f"{block}ffn_{part}_exps.{kind}", stored[:, i::2]) for i, part in enumerate(("gate", "up"))]
        if "experts.down_proj" in name:
            return [(f"{block}ffn_down_exps.{kind}", stored)]
        if name.endswith("self_attn.sinks"):
            return [(f"{block}attn_sinks.weight", array)]
        if name.endswith("post_attention_layernorm.weight"):
            return [(f"{block}post_attention_norm.weight", array)]
        if ".mlp.router." in name:
            return [(f"{block}ffn_gate_inp.{name.rpartition('.')[2]}", array)]
        return usual(name, np.ascontiguousarray(array))

    return rename


GPT_OSS = Family(
    arch="gpt-oss",
    model="GptOssForCausalLM",
    config="GptOssConfig",
    settings=common(
        head_dim=24,
        intermediate_size=72,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=13,
        tie_word_embeddings=False,
        max_position_embeddings=32 * 512,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 512,
        },
    ),
    keys=keys,
    rename=names,
    variants={"blocks": {"intermediate_size": 64, "num_local_experts": 9, "num_experts_per_tok": 4}},
)
